"""Stand-ins for rooms that a test is not about."""

import hashlib
from pathlib import Path

import numpy as np


class FakeTokenizer:
    """Bytes as ids, then BOS and EOS."""

    vocab_size = 258
    bos_id = 256
    adds_bos = True
    eos_id = 257
    fingerprint = hashlib.sha256(b"bytes").hexdigest()

    def save(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "tokenizer.model").write_text("bytes")

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]


class Texts:
    """Documents in memory, as `PackedRows` takes them."""

    def __init__(self, documents):
        self.documents = [np.asarray(document, np.uint32) for document in documents]
        self.lengths = np.array([len(document) for document in documents], np.int64)

    def tokens(self, i: int):
        return self.documents[i]

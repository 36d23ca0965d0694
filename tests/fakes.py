"""Stand-ins for rooms that a test is not about."""

import numpy as np

from llamita.tokenizer import Tokenizer


def byte_tokenizer() -> Tokenizer:
    """Bytes as ids, then BOS and EOS."""
    return Tokenizer([bytes([byte]) for byte in range(256)])


class Texts:
    """Documents in memory, as `PackedRows` takes them."""

    def __init__(self, documents):
        self.documents = [np.asarray(document, np.uint32) for document in documents]
        self.lengths = np.array([len(document) for document in documents], np.int64)

    def tokens(self, i: int):
        return self.documents[i]

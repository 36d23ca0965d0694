"""Any vocabulary that Hugging Face's tokenizer.json holds, to compare with: GPT-2's, SmolLM2's, Qwen's, ..."""

import json
from collections.abc import Iterable
from pathlib import Path

from llamita.tokenizer.emit import LETTERS
from llamita.tokenizer.llama2 import BYTE_PIECE, piece_bytes
from llamita.tokenizer.llama3 import is_partial
from llamita.tokenizer.vocabulary import JSON_NAME, PROBE, PieceTable, read_file, well_formed

_BYTE_OF = {letter: byte for byte, letter in enumerate(LETTERS)}


def byte_level_bytes(name: str) -> bytes:
    """A token's bytes by GPT-2's letters; a name with others stands for itself, as the library has it."""
    if any(letter not in _BYTE_OF for letter in name):
        return name.encode()
    return bytes(_BYTE_OF[letter] for letter in name)


class JsonTokenizer(PieceTable):
    """Ids for text and text for ids as the tokenizers library gives them, from the bytes of a tokenizer.json.

    Byte-level where the decoder is, else like SentencePiece with byte_fallback. Truncation, padding, dropout
    and the BOS of the file are off. Names of added tokens marked special are text (`encode_special_tokens`); the
    library offers no such switch for added tokens not so marked (<think>, ...): they are found in text, and count
    as text. A vocabulary that adds a space of its own may add none to a text that begins with one (RoBERTa's,
    Metaspace): such a text loses a space in `decode`. A normaliser (Qwen's NFC) loses what it changes.

    ValueError if `data` is no whole tokenizer.json, if its tokens do not give text back (WordPiece, lower case,
    no byte_fallback), or if the library is missing.
    """

    def __init__(self, data: bytes):
        try:
            import tokenizers
        except ImportError:
            raise ValueError("tokenizers is not installed; run: pip install 'llamita[compare]'") from None
        try:
            tokenizer = tokenizers.Tokenizer.from_str(data.decode())
            tokenizer.encode(PROBE, add_special_tokens=False)  # some faults show only in use
            decoder = json.loads(data).get("decoder") or {}
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # the library raises nothing narrower, and its panics are no Exception
            raise ValueError("no whole tokenizer.json of Hugging Face; give one that tokenizers can read") from None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        if getattr(tokenizer.model, "dropout", None):
            tokenizer.model.dropout = None
        self._tokenizer = tokenizer
        byte_level = "ByteLevel" in [kind["type"] for kind in [decoder, *decoder.get("decoders", [])] if kind]
        read = byte_level_bytes if byte_level else piece_bytes
        added = tokenizer.get_added_tokens_decoder()
        names = {i: name for name, i in tokenizer.get_vocab().items()}
        pieces = {i: name.encode() if i in added else read(name) for i, name in names.items()}
        super().__init__(
            pieces,
            fallback={
                i
                for i, name in names.items()
                if i not in added and (is_partial(pieces[i]) if byte_level else BYTE_PIECE.fullmatch(name))
            },
            special={i for i, token in added.items() if token.special},
        )

    @classmethod
    def load(cls, path: str | Path) -> "JsonTokenizer":
        """From a folder that holds tokenizer.json, or from such a file; ValueError as the class, with the file."""
        file, data = read_file(path, JSON_NAME)
        try:
            return cls(data)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None

    def encode(self, text: str) -> list[int]:
        """Ids of `text`."""
        ids: list[int] = self._tokenizer.encode(well_formed(text), add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        texts = [well_formed(text) for text in texts]
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

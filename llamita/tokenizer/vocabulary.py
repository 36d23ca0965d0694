"""What every vocabulary offers, llamita's own or another's, and how to open one whatever its kind."""

import re
from abc import ABC, abstractmethod
from collections.abc import Container, Iterable, Mapping, Set
from pathlib import Path
from typing import Literal, Protocol

from llamita.tokenizer.llama3 import FILE_NAME, MAX_FILE_BYTES, Tokenizer

JSON_NAME = "tokenizer.json"
_FIRST_RANK = re.compile(rb"[A-Za-z0-9+/]+={0,2} 0\r?\n")
# What lossy vocabularies change: blanks, case, accents, and characters that they have no token for
PROBE = "Hello,  World!\n\n\tCaf\u00e9 \u4e2d\u6587 \U0001f999\U0010fffd "


class Vocabulary(Protocol):
    """Text to ids and back. Names of special tokens in a text are text; no BOS or EOS is added.

    `vocab_size` is one more than the highest id. `decode` and `token_bytes` raise ValueError for an id that the
    vocabulary lacks; `is_fallback` and `is_special` are False for it.
    """

    vocab_size: int

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; a surrogate pair counts as its character, a lone surrogate as U+FFFD."""

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, specials as their names; bytes that are no UTF-8 become U+FFFD."""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that the id stands for in a text; a special's name."""

    def is_fallback(self, token_id: int) -> bool:
        """Whether the id spells one byte (SentencePiece's <0xNN>) or is a part of a character (byte-level BPE)."""

    def is_special(self, token_id: int) -> bool:
        """Whether the id stands for no text."""


class PieceTable(ABC):
    """The ids of a vocabulary by their bytes, and decoding with them: what the foreign vocabularies share.

    `pieces` maps each id to its bytes; `fallback` and `special` hold ids. A vocabulary that puts a space of its
    own before a text loses it in `decode`, which drops one space at the start, behind any specials there.
    ValueError if the bytes of a text's ids are not that text: such a vocabulary cannot be counted by the byte.
    """

    def __init__(self, pieces: Mapping[int, bytes], *, fallback: Container[int], special: Set[int]):
        self._pieces = pieces
        self._fallback = fallback
        self._special = special
        self.vocab_size = max(pieces, default=-1) + 1
        back = self.decode_bytes(self.encode(PROBE))
        if back.removeprefix(b" ") != PROBE.encode():
            raise ValueError(
                f"its tokens for the text {PROBE!r} give {back!r}; "
                "give a vocabulary that is byte-level or has byte_fallback, and that changes no text"
            )
        self._adds_space = back.startswith(b" ")

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """See Vocabulary."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, specials as their names; bytes that are no UTF-8 become U+FFFD."""
        ids = list(ids)
        start = next((at for at, i in enumerate(ids) if not self.is_special(i)), len(ids))
        text = self.decode_bytes(ids[start:])
        if self._adds_space:
            text = text.removeprefix(b" ")
        return (self.decode_bytes(ids[:start]) + text).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """`token_bytes` of all `ids` in a row: no space is dropped, so parts of a reply add up to the whole."""
        return b"".join(map(self.token_bytes, ids))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that the id stands for in a text, a special's name; ValueError for an unknown id."""
        try:
            return self._pieces[token_id]
        except KeyError:
            raise ValueError(f"token id {token_id} is outside the vocabulary of {self.vocab_size}") from None

    def is_fallback(self, token_id: int) -> bool:
        """See Vocabulary."""
        return token_id in self._fallback

    def is_special(self, token_id: int) -> bool:
        """See Vocabulary."""
        return token_id in self._special


def well_formed(text: str) -> str:
    """`text` without surrogates: pairs become their character, lone ones U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def read_file(path: str | Path, name: str) -> tuple[Path, bytes]:
    """The file at `path`, or `name` in that folder, and its bytes; ValueError if there is none, or over 64 MiB."""
    path = Path(path)
    file = path / name if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{file}: no such file; give a folder that holds {name}, or that file")
    if file.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"{file}: more than {MAX_FILE_BYTES // 2**20} MiB, so no vocabulary; give a {name}")
    return file, file.read_bytes()


def kind_of(file: Path) -> Literal["ranks", "sentencepiece", "json"] | None:
    """What kind of vocabulary a file looks like by its first bytes; None where it is no file, or none of them."""
    head = b""
    if file.is_file():
        with file.open("rb") as opened:
            head = opened.read(4096)
    if _FIRST_RANK.match(head):
        return "ranks"
    if head.startswith(b"\n"):  # the key of a protobuf's first field, which is a piece
        return "sentencepiece"
    return "json" if head.startswith(b"{") else None


def open_vocabulary(path: str | Path) -> Vocabulary:
    """The vocabulary in a file, told by its content, or in a folder, where tokenizer.model comes first.

    ValueError, with what is accepted, if it is none, or from `load` of the class that its kind has.
    """
    from llamita.tokenizer.foreign import JsonTokenizer
    from llamita.tokenizer.llama2 import SentencePieceTokenizer

    path = Path(path)
    if path.is_dir():
        path = next((path / name for name in (FILE_NAME, JSON_NAME) if (path / name).is_file()), path)
    kind = kind_of(path)
    if kind == "ranks":
        return Tokenizer.load(path)
    if kind == "sentencepiece":
        return SentencePieceTokenizer.load(path)
    if kind == "json":
        return JsonTokenizer.load(path)
    raise ValueError(
        f"{path}: no vocabulary; give a {FILE_NAME} of tiktoken ranks or of SentencePiece, a {JSON_NAME} of "
        "Hugging Face, or a folder that holds one of them"
    )

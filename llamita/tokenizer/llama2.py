"""The Llama 1 and 2 tokenizer (TinyLlama's too): SentencePiece BPE with byte pieces, arXiv 1808.06226."""

import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from llamita.tokenizer.llama3 import FILE_NAME
from llamita.tokenizer.vocabulary import PieceTable, read_file, well_formed

SPACE = "\u2581"  # how SentencePiece spells a space
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_TRAINER_SPEC, _MODEL_TYPE = 2, 3  # field numbers of ModelProto and TrainerSpec in sentencepiece_model.proto
_TYPES = {1: "unigram", 2: "BPE", 3: "word", 4: "char"}


def piece_bytes(name: str) -> bytes:
    """What a piece that is not special stands for: <0xNN> for its byte, others for their text."""
    if byte := BYTE_PIECE.fullmatch(name):
        return bytes([int(byte[1], 16)])
    return name.replace(SPACE, " ").encode()


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number that starts at `at`, and where it ends."""
    value = shift = 0
    while data[at] >= 128:
        value |= (data[at] & 127) << shift
        shift += 7
        at += 1
    return value | data[at] << shift, at + 1


def protobuf_fields(message: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Each field of a protobuf message: its field number, then its value as a number, or as bytes.

    Wire format: protobuf.dev/programming-guides/encoding. LookupError on groups, which SentencePiece has none of.
    """
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind, size, number = key & 7, 0, 0
        if kind == 0:
            number, at = _varint(message, at)
        elif kind == 2:
            size, at = _varint(message, at)
        else:
            size = {1: 8, 5: 4}[kind]
        yield key >> 3, number, message[at : at + size]
        at += size


def _model_type(model: bytes) -> int:
    """The TrainerSpec's model type, which protobuf takes for unigram where it is absent; LookupError on groups."""
    spec = b"".join(value for field, _, value in protobuf_fields(model) if field == _TRAINER_SPEC)
    return next((number for field, number, _ in protobuf_fields(spec) if field == _MODEL_TYPE), 1)


class SentencePieceTokenizer(PieceTable):
    """Ids for text and text for ids as the sentencepiece library gives them, from a serialized BPE model.

    The rule, with Llama's settings (normaliser `identity`, add_dummy_prefix, no remove_extra_whitespaces):

    - A text that is not empty gets one space in front; the empty text has no ids. So "Hello" begins with
      "\u2581Hello", " Hello" with "\u2581" and "\u2581Hello", and " " is the one piece of two spaces.
    - Every space is U+2581, several may be one piece, and nothing splits the text before the merges. The pair
      that makes the piece of the highest score is merged first, the leftmost of equals.
    - A character that is no piece is spelt in UTF-8 by pieces <0xNN>: a newline is <0x0A>.
    - Control pieces (<s>, </s>) and <unk> never come from text: "</s>" is "\u2581</", "s", ">".

    What a text loses: U+2581 comes back as a space, and a lone surrogate as U+FFFD. `decode` drops one space at
    the start, which `encode` has put there; so ids joined from two texts decode to both with a space between,
    and ids that continue a text want `decode_bytes`, which drops nothing.

    `pad_id` is None where there is none, as in Llama's own. ValueError if `model` is no whole BPE model, lacks
    a begin or an end piece, or changes text (other normalisers, no byte pieces), or if sentencepiece is missing.
    """

    def __init__(self, model: bytes):
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError:
            raise ValueError("sentencepiece is not installed; run: pip install 'llamita[compare]'") from None
        processor = SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(model)
            ids = range(processor.vocab_size())
            names = [processor.id_to_piece(i) for i in ids]
            kind = _model_type(model)
        except (RuntimeError, UnicodeDecodeError, LookupError):
            raise ValueError(f"no whole SentencePiece model; give Llama 1's or 2's {FILE_NAME}") from None
        if _TYPES.get(kind) != "BPE":
            raise ValueError(
                f"a SentencePiece model of type {_TYPES.get(kind, kind)}, or cut short; "
                f"give a whole BPE model, as Llama 1's or 2's {FILE_NAME}"
            )
        self._processor = processor
        self.bos_id: int = processor.bos_id()
        self.eos_id: int = processor.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise ValueError("a SentencePiece model without <s> or </s>; give one that was trained with both")
        self.stop_ids = frozenset((self.eos_id,))
        self.pad_id: int | None = processor.pad_id() if processor.pad_id() >= 0 else None
        self.fingerprint = hashlib.sha256(model).hexdigest()
        special = {i for i in ids if processor.is_control(i) or processor.is_unknown(i)}
        fallback = {i for i in ids if processor.is_byte(i)}
        pieces = {i: name.encode() if i in special else piece_bytes(name) for i, name in enumerate(names)}
        super().__init__(pieces, fallback=fallback, special=special)

    @classmethod
    def load(cls, path: str | Path) -> "SentencePieceTokenizer":
        """From a folder that holds tokenizer.model, or from such a file; ValueError as the class, with the file."""
        file, model = read_file(path, FILE_NAME)
        try:
            return cls(model)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of `text`, with BOS and EOS around them where asked for."""
        ids: list[int] = self._processor.encode(well_formed(text))
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """`encode` of each text with no BOS or EOS, on all cores."""
        ids: list[list[int]] = self._processor.encode([well_formed(text) for text in texts])
        return ids

"""SentencePiece vocabularies as the tokenizer.json that Hugging Face gives Llama 1 and 2: pieces, scores, types."""

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llamita.tokenizer.carried import MAX_TOKENS, CarriedTokenizer
from llamita.tokenizer.emit import added_token
from llamita.tokenizer.llama2 import BYTE_PIECE, SPACE, SentencePieceTokenizer, protobuf_fields
from llamita.tokenizer.llama3 import FILE_NAME, MAX_TOKEN_BYTES
from llamita.tokenizer.vocabulary import read_file

# Token types, one numbering in sentencepiece_model.proto and in GGUF
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def token_tables(names: Sequence[str], types: Sequence[int]) -> dict[str, Any]:
    """The `vocab` and `added_tokens` of a tokenizer.json in which every token keeps its id; UNUSED ones have none.

    ValueError for tables of unequal or too great length, a type that is none, a name too long or there before.
    """
    if len(names) != len(types) or len(names) > MAX_TOKENS:
        raise ValueError(f"{len(names)} tokens with {len(types)} types: give each its own, and at most {MAX_TOKENS}")
    ids: dict[str, int] = {}
    for i, (name, kind) in enumerate(zip(names, types, strict=True)):
        if not NORMAL <= kind <= BYTE or len(name) > MAX_TOKEN_BYTES:
            raise ValueError(
                f"token {i} has the type {kind} and {len(name)} characters; 6 and {MAX_TOKEN_BYTES} are most"
            )
        if kind != UNUSED and ids.setdefault(name, i) != i:
            raise ValueError(f"the vocabulary holds the token {name[:40]!r} twice; each needs one id")
    added = [
        added_token(name, i, special=types[i] != USER_DEFINED)
        for name, i in ids.items()
        if types[i] in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    # Added tokens behind all others stay out of `vocab`, where a word of a text might be taken for one. The library
    # counts their ids on from the last, so this needs a table without holes.
    inside = [i for i in ids.values() if types[i] in (NORMAL, BYTE)]
    end = max(inside, default=-1) + 1 if max(ids.values(), default=-1) == len(ids) - 1 else MAX_TOKENS
    return {"vocab": {name: i for name, i in ids.items() if i < end}, "added_tokens": added}


def tokenizer_json(
    names: Sequence[str], scores: Sequence[float], types: Sequence[int], adds_space: bool, unk: str
) -> dict[str, Any]:
    """The tokenizer.json of a SentencePiece BPE vocabulary with byte pieces; `unk` is the unknown piece's name."""
    tables = token_tables(names, types)
    if len(scores) != len(names):
        raise ValueError(f"{len(names)} tokens with {len(scores)} scores: give each its own")
    score = {name: value for name, value, kind in zip(names, scores, types, strict=True) if kind == NORMAL}
    model = {"type": "BPE", "unk_token": unk, "fuse_unk": True, "byte_fallback": True}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if adds_space else []
    unspell = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    return {
        "version": "1.0",
        "added_tokens": tables["added_tokens"],
        "normalizer": normalizer(adds_space),
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [unspell, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": model | {"vocab": tables["vocab"], "merges": merges(score)},
    }


def merges(score: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a third, in the order in which SentencePiece may merge them.

    The highest score first; of equal ones the longest first part, then the second, as transformers has it.
    """
    place = {name: i for i, name in enumerate(score)}
    pairs = []
    for name in score:
        cuts = [(name[:cut], name[cut:]) for cut in range(1, len(name))]
        known = [pair for pair in cuts if pair[0] in place and pair[1] in place]
        pairs += sorted(known, key=lambda pair: (place[pair[0]], place[pair[1]]))
    return sorted(pairs, key=lambda pair: (score[pair[0] + pair[1]], len(pair[0]), len(pair[1])), reverse=True)


def normalizer(adds_space: bool) -> dict[str, Any]:
    """How a tokenizer.json spells spaces as SentencePiece does, with or without one of its own before a text."""
    prepend = [{"type": "Prepend", "prepend": SPACE}] if adds_space else []
    spell = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    return {"type": "Sequence", "normalizers": [*prepend, spell]}


def from_sentencepiece(path: str | Path) -> CarriedTokenizer:
    """The tokenizer of a SentencePiece BPE model (Llama 1's or 2's), which begins texts with BOS.

    ValueError as SentencePieceTokenizer, which checks the file.
    """
    whole = SentencePieceTokenizer.load(path)
    _, model = read_file(path, FILE_NAME)
    found = [piece for field, _, piece in protobuf_fields(model) if field == 1]
    rows = [{key: (number, value) for key, number, value in protobuf_fields(piece)} for piece in found]
    names = [row[1][1].decode() for row in rows]
    scores = [struct.unpack("<f", row[2][1])[0] if 2 in row else 0.0 for row in rows]
    types = [row[3][0] if 3 in row else NORMAL for row in rows]
    unk = types.index(UNKNOWN)
    adds_space = whole.decode_bytes(whole.encode("a")).startswith(b" ")
    content = tokenizer_json(names, scores, types, adds_space, names[unk])
    controls: dict[str, Any] = {"bos_id": whole.bos_id, "eos_id": whole.eos_id, "pad_id": whole.pad_id, "unk_id": unk}
    return CarriedTokenizer(content, **controls, adds_bos=True)


def from_llama2c(path: str | Path, vocab_size: int) -> CarriedTokenizer:
    """The tokenizer in llama2.c's tokenizer.bin, whose model has `vocab_size` tokens (run.c and tokenizer.py there).

    The file: int32 longest piece, then for each token float32 score, int32 number of bytes, the bytes, in which
    spaces are themselves. Ids 0, 1, 2 are <unk>, <s>, </s> under whatever name, 3 .. 258 the bytes.
    ValueError for a file that ends too early or too late, or is no such vocabulary.
    """
    file, data = read_file(path, "tokenizer.bin")
    names, scores, offset = ["<unk>", "<s>", "</s>"], list[float](), 4
    for token in range(vocab_size):
        score, length = struct.unpack_from("<fi", data, offset) if offset + 8 <= len(data) else (0.0, -1)
        offset += 8 + length
        if not 0 <= length <= MAX_TOKEN_BYTES or offset > len(data):
            raise ValueError(f"{file} is no llama2.c tokenizer of {vocab_size} tokens: it breaks at token {token}")
        scores.append(score)
        if token > 2:
            names.append(data[offset - length : offset].decode("utf-8", "replace").replace(" ", SPACE))
    if offset != len(data):
        raise ValueError(
            f"{file} has {len(data) - offset} bytes after {vocab_size} tokens; give the model's vocab_size"
        )
    types = [UNKNOWN, CONTROL, CONTROL, *(BYTE if BYTE_PIECE.fullmatch(name) else NORMAL for name in names[3:])]
    try:
        content = tokenizer_json(names, scores, types, True, "<unk>")
        return CarriedTokenizer(content, bos_id=1, eos_id=2, unk_id=0, adds_bos=True)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None

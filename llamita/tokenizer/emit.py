"""What other programs read, made from the ranks alone: Hugging Face's files and llama.cpp's GGUF fields."""

import base64
import json
import os
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamita.tokenizer.chat import TEMPLATES
from llamita.tokenizer.llama3 import FILE_NAME, PATTERN, Tokenizer

if TYPE_CHECKING:
    from llamita.tokenizer.carried import CarriedTokenizer


def _byte_letters() -> list[str]:
    """GPT-2's printable stand-in for each byte: itself where Latin-1 prints it, else one from U+0100 on."""
    printable = set(chain(range(0x21, 0x7F), range(0xA1, 0xAD), range(0xAE, 0x100)))
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


LETTERS = _byte_letters()
_LETTER_OF = dict(enumerate(LETTERS))


def spell(token: bytes) -> str:
    """A token's name in tokenizer.json and GGUF: a letter for each byte."""
    return token.decode("latin-1").translate(_LETTER_OF)


def merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """Every way to join two tokens to a third, by its rank, then the parts': what tiktoken may merge."""
    ranks = {token: rank for rank, token in enumerate(tokenizer.tokens)}
    names = [spell(token) for token in tokenizer.tokens]
    pairs: list[tuple[str, str]] = []
    for token in tokenizer.tokens:
        known = [
            (first, ranks[token[cut:]])
            for cut in range(1, len(token))
            if (first := ranks.get(token[:cut])) is not None and token[cut:] in ranks
        ]
        pairs += [(names[first], names[second]) for first, second in sorted(known)]
    return pairs


def byte_level(use_regex: bool) -> dict[str, Any]:
    """The step of a tokenizer.json that spells bytes in LETTERS, with or without GPT-2's split before it."""
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def split(pattern: str) -> dict[str, Any]:
    """The step of a tokenizer.json that parts a text at what the pattern finds, and keeps all of it."""
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def added_token(name: str, i: int, special: bool = True) -> dict[str, Any]:
    """An entry of a tokenizer.json's added_tokens: found in a text as it stands, with nothing around it."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    return {"id": i, "content": name, **flags}


def begins_with(bos: str, bos_id: int) -> dict[str, Any]:
    """The post-processor of a tokenizer.json that puts BOS before a text."""
    bos_piece = {"SpecialToken": {"id": bos, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [bos_piece, first],
        "pair": [bos_piece, first, {"SpecialToken": {"id": bos, "type_id": 1}}, second],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of tokenizer.json, as Hugging Face's `tokenizers` reads it."""
    letters, add_bos = byte_level(use_regex=False), begins_with("<|begin_of_text|>", tokenizer.bos_id)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(name, i) for name, i in tokenizer.specials.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split(PATTERN), letters]},
        "post_processor": {"type": "Sequence", "processors": [letters, add_bos]},
        "decoder": letters,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {spell(token): rank for rank, token in enumerate(tokenizer.tokens)},
            "merges": merges(tokenizer),
        },
    }


def _tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """EOS is the text's end; generation_config.json adds <|eot_id|> and <|eom_id|> (Tokenizer.stop_ids)."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|end_of_text|>",
        "pad_token": "<|finetune_right_pad_id|>",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "chat_template": TEMPLATES[tokenizer.chat_format],
    }


def ranks(tokenizer: Tokenizer) -> bytes:
    """The content of tokenizer.model, as Meta's code and tiktoken read it."""
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokenizer.tokens))


def write(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the tokenizer's files into `folder`, each whole or not at all; tokenizer.model comes last."""
    files = {
        "tokenizer.json": json.dumps(tokenizer_json(tokenizer), ensure_ascii=False).encode(),
        "tokenizer_config.json": json.dumps(_tokenizer_config(tokenizer), indent=2).encode(),
        FILE_NAME: ranks(tokenizer),
    }
    replace_files(folder, files)


def replace_files(folder: Path, files: dict[str, bytes]) -> None:
    """Write the named files into `folder` in their order, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        half = folder / f".{name}.half"
        half.write_bytes(data)
        os.replace(half, folder / name)


def gguf_fields(tokenizer: "Tokenizer | CarriedTokenizer") -> dict[str, Any]:
    """The tokenizer's part of a GGUF file's metadata, key for key, in plain Python types.

    `pre` names llama.cpp's own copy of Llama 3's split; token types are its 1 (normal) and 3 (control).
    ValueError for a carried tokenizer that llama.cpp could not run as it is.
    """
    if not isinstance(tokenizer, Tokenizer):
        from llamita.tokenizer.llamacpp import carried_fields  # it needs this module first

        return carried_fields(tokenizer)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": [*map(spell, tokenizer.tokens), *tokenizer.specials],
        "tokenizer.ggml.token_type": [1] * len(tokenizer.tokens) + [3] * len(tokenizer.specials),
        "tokenizer.ggml.merges": [f"{a} {b}" for a, b in merges(tokenizer)],
        "tokenizer.ggml.bos_token_id": tokenizer.bos_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_id,
        "tokenizer.ggml.eot_token_id": tokenizer.eot_id,
        "tokenizer.ggml.eom_token_id": tokenizer.specials["<|eom_id|>"],
        "tokenizer.ggml.padding_token_id": tokenizer.pad_id,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": TEMPLATES[tokenizer.chat_format],
    }


def write_gguf(tokenizer: "Tokenizer | CarriedTokenizer", path: Path) -> None:
    """A GGUF file of the vocabulary alone, as llama.cpp loads with `vocab_only`; whole or not at all."""
    import gguf

    half = path.with_name(f".{path.name}.half")
    writer = gguf.GGUFWriter(half, "llama")
    for key, value in gguf_fields(tokenizer).items():
        kind = {list: "array", bool: "bool", int: "uint32", str: "string"}[type(value)]
        getattr(writer, f"add_{kind}")(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    os.replace(half, path)

"""The splits that llama.cpp has too, and a tokenizer.json that is Llama 3's told from any other."""

import re
from collections.abc import Mapping
from typing import Any

from llamita.tokenizer import emit
from llamita.tokenizer.carried import CarriedTokenizer, ids_of, merges_of
from llamita.tokenizer.chat import format_of
from llamita.tokenizer.emit import byte_level, split
from llamita.tokenizer.foreign import byte_level_bytes
from llamita.tokenizer.llama3 import PATTERN, SPECIALS, Tokenizer

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
# llama.cpp's name of a split -> its steps in a tokenizer.json (src/llama-vocab.cpp), each within the parts of the last
SPLITS: dict[str, list[dict[str, Any]]] = {
    "llama-bpe": [split(PATTERN), byte_level(use_regex=False)],
    "smollm": [{"type": "Digits", "individual_digits": True}, byte_level(use_regex=True)],
    "gpt-2": [byte_level(use_regex=True)],
    "default": [
        *map(split, (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
        byte_level(use_regex=False),
    ],
}

_RESERVED = re.compile(r"<\|reserved_special_token_\d+\|>")
# The specials that have one name in every Llama 3; others were reserved at first, and Meta counts those anew each time
_FIRM = {"<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"}


def split_name(content: Mapping[str, Any]) -> str | None:
    """llama.cpp's name of the split that a byte-level tokenizer.json has, None where it has none."""
    model, step = content["model"], content.get("pre_tokenizer") or {}
    steps = [_plain(part) for part in step.get("pretokenizers", [step])]
    if content.get("normalizer") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return None
    for name, wanted in SPLITS.items():
        if steps == [_plain(part) for part in wanted] and bool(model.get("ignore_merges")) == (name == "llama-bpe"):
            return name
    return None


def _plain(step: Mapping[str, Any]) -> dict[str, Any]:
    """A step without what changes no id, and with what it is where left out."""
    return {"use_regex": True, **step, "trim_offsets": None, "invert": step.get("invert", False)}


def settled(content: dict[str, Any], **controls: Any) -> Tokenizer | CarriedTokenizer:
    """The tokenizer of a tokenizer.json and its controls, as CarriedTokenizer takes them.

    Where ids, merges, split and specials are Llama 3's, `Tokenizer`: only names of reserved specials may differ.
    """
    return _llama3(content, **controls) or CarriedTokenizer(content, **controls)


def _llama3(content: dict[str, Any], *, adds_bos: bool, chat_template: str | None, **_: Any) -> Tokenizer | None:
    ids = ids_of(content)
    names = sorted(ids, key=ids.__getitem__)
    first = len(names) - len(SPECIALS)
    added = {token["id"] for token in content.get("added_tokens") or () if token.get("special")}
    of_llama3 = (
        split_name(content) == "llama-bpe"
        and adds_bos
        and "<|start_header_id|>" in (chat_template or "<|start_header_id|>")
        and sorted(ids.values()) == list(range(len(names)))
        and added == set(range(first, len(names)))
        and all(map(_same_special, SPECIALS, names[first:]))
    )
    tokens = [byte_level_bytes(name) for name in names[:first]] if of_llama3 else []
    if not tokens or [*map(emit.spell, tokens)] != names[:first]:
        return None
    try:
        tokenizer = Tokenizer(tokens, format_of(chat_template or ""))
    except ValueError:  # a byte without a token: the other class says what it is about
        return None
    return tokenizer if merges_of(content) == emit.merges(tokenizer) else None


def _same_special(ours: str, name: str) -> bool:
    return ours == name or (ours not in _FIRM and _RESERVED.fullmatch(name) is not None)

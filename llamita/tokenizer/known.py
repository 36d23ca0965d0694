"""The splits that llama.cpp has too, and a tokenizer.json that is Llama 3's told from any other."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from llamita.tokenizer import chat, emit, template
from llamita.tokenizer.carried import CarriedTokenizer, ids_of, merges_of
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


# Whatever a template writes of its own shows in one of these, as does whether it trims
_USER, _TRIMMED = {"role": "user", "content": "Hi"}, {"role": "user", "content": " 2 + 2?\n"}
_WHOLE = [{"role": "system", "content": "Be kind.\n"}, _TRIMMED, {"role": "assistant", "content": " Four."}]
_DIALOGS = [([_USER], True), (_WHOLE, False), ([*_WHOLE, _USER], True)]


def settled(content: dict[str, Any], **controls: Any) -> Tokenizer | CarriedTokenizer:
    """The tokenizer of a tokenizer.json and its controls, as CarriedTokenizer takes them.

    Where ids, merges, split and specials are Llama 3's, but for names of reserved specials, and the controls
    `serves`: `Tokenizer`.
    """
    tokenizer = llama3(content, chat.format_of(controls.get("chat_template") or ""))
    return tokenizer if tokenizer and serves(tokenizer, **controls) else CarriedTokenizer(content, **controls)


def serves(
    tokenizer: Tokenizer,
    *,
    eos_id: int | None,
    bos_id: int | None,
    stop_ids: Iterable[int],
    adds_bos: bool,
    chat_template: str | None = None,
    **_: Any,
) -> bool:
    """Whether `tokenizer` does all that a model's controls ask: it begins a text and stops as they say, and writes
    plain dialogs as their template does, if there is one, to the id.

    It may stop at more: a base model names <|end_of_text|> alone. Padding, which no model sees, may be another.
    Llama 3.2's template does not pass, for it dates dialogs by the clock.
    """
    stops = {i for i in (eos_id, *stop_ids) if i is not None}
    if not (adds_bos and bos_id in (None, tokenizer.bos_id) and stops <= tokenizer.stop_ids):
        return False
    if chat_template is None:
        return True
    names = {"bos_token": "<|begin_of_text|>"}
    if eos_id is not None:
        names["eos_token"] = tokenizer.decode([eos_id])
    try:
        program = template.compiled(chat_template)
        for messages, reply in _DIALOGS:
            ids = tokenizer.encode(template.filled(program, messages, reply, names), specials="allow")
            begun = ids if ids[:1] == [tokenizer.bos_id] else [tokenizer.bos_id, *ids]
            if begun != chat.render(tokenizer, messages, reply=reply)[0]:
                return False
    except ValueError:  # it cannot be read, or refuses a dialog
        return False
    return True


def llama3(content: dict[str, Any], chat_format: str = "llama3") -> Tokenizer | None:
    """The vocabulary of a tokenizer.json that is Llama 3's, whatever its chat; None for any other."""
    ids = ids_of(content)
    names = sorted(ids, key=ids.__getitem__)
    first = len(names) - len(SPECIALS)
    added = {token["id"] for token in content.get("added_tokens") or () if token.get("special")}
    of_llama3 = (
        split_name(content) == "llama-bpe"
        and sorted(ids.values()) == list(range(len(names)))
        and added == set(range(first, len(names)))
        and all(map(_same_special, SPECIALS, names[first:]))
    )
    tokens = [byte_level_bytes(name) for name in names[:first]] if of_llama3 else []
    if not tokens or [*map(emit.spell, tokens)] != names[:first]:
        return None
    try:
        tokenizer = Tokenizer(tokens, chat_format)
    except ValueError:  # a byte without a token: the other class says what it is about
        return None
    return tokenizer if merges_of(content) == emit.merges(tokenizer) else None


def _same_special(ours: str, name: str) -> bool:
    return ours == name or (ours not in _FIRM and _RESERVED.fullmatch(name) is not None)

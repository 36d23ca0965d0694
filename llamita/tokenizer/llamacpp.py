"""The tokenizer's fields of a GGUF file, read and written for the vocabularies that llama.cpp runs as they are."""

from collections.abc import Mapping
from typing import Any

from llamita.tokenizer import pieces
from llamita.tokenizer.carried import ENDS, CarriedTokenizer
from llamita.tokenizer.emit import byte_level
from llamita.tokenizer.known import SPLITS, settled, split_name
from llamita.tokenizer.llama2 import BYTE_PIECE
from llamita.tokenizer.llama3 import Tokenizer
from llamita.tokenizer.pieces import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED

_IDS = {"bos": "bos", "eos": "eos", "eot": "eot", "eom": "eom", "pad": "padding", "unk": "unknown"}


def from_gguf(fields: Mapping[str, Any]) -> Tokenizer | CarriedTokenizer:
    """The tokenizer in a GGUF file's metadata; what is not there is as llama.cpp has it.

    ValueError for another model than gpt2 (byte-level BPE) and llama (SentencePiece), for a split that is not in
    SPLITS, for tables that do not fit together, and as CarriedTokenizer.
    """

    def get(key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        value = fields.get(f"tokenizer.ggml.{key}", default)
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"tokenizer.ggml.{key} is {type(value).__name__}; the file is damaged")
        return value

    def table(key: str, kind: type | tuple[type, ...], default: Any = ()) -> list[Any]:
        values = get(key, (list, tuple), default)
        if not all(isinstance(value, kind) for value in values):
            raise ValueError(f"tokenizer.ggml.{key} holds other values than it should; the file is damaged")
        return list(values)

    model, pre = get("model", str), get("pre", str, "default")
    if model not in ("gpt2", "llama"):
        raise ValueError(f"tokenizer.ggml.model is {model!r}; llamita reads gpt2 and llama")
    if model == "gpt2" and pre not in SPLITS:
        raise ValueError(f"tokenizer.ggml.pre is {pre!r}; the splits known are {', '.join(SPLITS)}")
    spm = model == "llama"
    names = table("tokens", str)
    types = table("token_type", int, [NORMAL] * len(names))
    defaults = {"bos": 1, "eos": 2, "unk": 0} if spm else {}
    ids = {kind: get(f"{key}_token_id", int, defaults.get(kind)) for kind, key in _IDS.items()}
    if spm:
        unk = next((name for name, kind in zip(names, types, strict=False) if kind == UNKNOWN), "<unk>")
        scores = table("scores", (int, float))
        content = pieces.tokenizer_json(names, scores, types, get("add_space_prefix", bool, True), unk)
    else:
        content = _byte_level_json(names, types, [tuple(pair.split(" ", 1)) for pair in table("merges", str)], pre)
    template = fields.get("tokenizer.chat_template")
    stops = [ids[kind] for kind in ("eot", "eom") if ids[kind] is not None]
    return settled(
        content,
        **{f"{kind}_id": ids[kind] for kind in ("bos", "eos", "pad", "unk")},
        stop_ids=stops,
        adds_bos=get("add_bos_token", bool, spm or pre == "llama-bpe"),
        chat_template=template if isinstance(template, str) else None,
    )


def _byte_level_json(names: list[str], types: list[int], merges: list[tuple[str, ...]], pre: str) -> dict[str, Any]:
    tables = pieces.token_tables(names, types)
    return {
        "version": "1.0",
        "added_tokens": tables["added_tokens"],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": SPLITS[pre]},
        "decoder": byte_level(use_regex=True),
        "model": {"type": "BPE", "ignore_merges": pre == "llama-bpe", "vocab": tables["vocab"], "merges": merges},
    }


def carried_fields(tokenizer: CarriedTokenizer) -> dict[str, Any]:
    """`emit.gguf_fields` of a carried tokenizer. ValueError where llama.cpp would give other ids."""
    content, size = tokenizer.content, tokenizer.vocab_size
    model = content["model"]
    spm, pre = bool(model.get("byte_fallback")), split_name(content)
    adds_space = next((adds for adds in (True, False) if content.get("normalizer") == pieces.normalizer(adds)), None)
    flags = ["lstrip", "rstrip", "single_word", *["normalized"] * spm]
    odd = any(token.get(flag) for token in content["added_tokens"] if not token["special"] for flag in flags)
    if odd or ((adds_space is None or content.get("pre_tokenizer")) if spm else pre is None):
        raise ValueError("llama.cpp knows no split like this tokenizer's, so the model cannot go into a GGUF file")
    names, types = [f"[PAD{i}]" for i in range(size)], [UNUSED] * size
    for name, i in model["vocab"].items():
        names[i], types[i] = name, BYTE if spm and BYTE_PIECE.fullmatch(name) else NORMAL
    for token in content["added_tokens"]:
        names[token["id"]], types[token["id"]] = token["content"], CONTROL if token["special"] else USER_DEFINED
    if spm and "unk" in tokenizer.controls:
        types[tokenizer.controls["unk"]] = UNKNOWN
    tables: dict[str, Any] = {"tokenizer.ggml.merges": [f"{a} {b}" for a, b in model["merges"]]}
    if spm:
        normal = [name for name, kind in zip(names, types, strict=True) if kind == NORMAL]
        score = _scores([(left, right) for left, right in model["merges"]], normal)
        tables = {"tokenizer.ggml.scores": [score.get(name, 0.0) for name in names]}
    named = {i for i, name in enumerate(names) if name in ENDS}
    others = sorted(tokenizer.stop_ids - named - {tokenizer.eos_id})
    if len(others) > 2:
        raise ValueError(f"there are {len(others)} stop tokens more than EOS; a GGUF file has room for two")
    ids = tokenizer.controls | dict(zip(("eot", "eom"), others, strict=False))
    return {
        "tokenizer.ggml.model": "llama" if spm else "gpt2",
        "tokenizer.ggml.pre": "default" if spm else pre,
        "tokenizer.ggml.tokens": names,
        "tokenizer.ggml.token_type": types,
        **tables,
        **{f"tokenizer.ggml.{_IDS[kind]}_token_id": i for kind, i in ids.items()},
        "tokenizer.ggml.add_bos_token": tokenizer.adds_bos,
        "tokenizer.ggml.add_space_prefix": bool(adds_space),
        **({} if tokenizer.chat_template is None else {"tokenizer.chat_template": tokenizer.chat_template}),
    }


def _scores(merges: list[tuple[str, str]], normal: list[str]) -> dict[str, float]:
    """Scores by which llama.cpp, which merges the highest first, does what the merges say.

    Each piece scores by the first merge that makes it; pieces whose merges mingle come from one score. ValueError
    if llama.cpp would do otherwise: it joins any two pieces that make a third.
    """
    last = {left + right: at for at, (left, right) in enumerate(merges)}
    score, start, end = dict.fromkeys(normal, 0.0), 0, -1
    for at, (left, right) in enumerate(merges):
        if at > end:
            start = at
        end = max(end, last[left + right])
        score[left + right] = -float(start)
    possible, apart = pieces.merges(score), len(set(score.values()))  # pieces that nothing makes share the 0
    if possible != merges and not (set(possible) == set(merges) and apart == max(1, len(last))):
        raise ValueError("the tokenizer's merges follow no scores of pieces, so the model cannot go into a GGUF file")
    return score

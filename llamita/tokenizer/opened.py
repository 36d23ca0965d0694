"""Open the tokenizer of a model, Llama 3's own or a carried one, in whatever files it comes."""

import json
from pathlib import Path
from typing import Any

from llamita.tokenizer.carried import CarriedTokenizer, ids_of
from llamita.tokenizer.chat import format_of
from llamita.tokenizer.emit import spell, tokenizer_json
from llamita.tokenizer.known import serves, settled
from llamita.tokenizer.llama3 import FILE_NAME, Tokenizer
from llamita.tokenizer.pieces import from_sentencepiece
from llamita.tokenizer.vocabulary import JSON_NAME, kind_of, read_file


def open_tokenizer(path: str | Path) -> Tokenizer | CarriedTokenizer:
    """The tokenizer in a model's folder, or in one of its files, told by content.

    tokenizer.model with tiktoken ranks comes before tokenizer.json, and that before SentencePiece's
    tokenizer.model. Ranks and tokenizer.json go with what lies beside: tokenizer_config.json, special_tokens_map.json,
    generation_config.json or else config.json (stop ids), and chat_template.jinja. Ranks beside which another chat
    or other stops are asked for give way to a tokenizer.json. ValueError, with the file, for anything else.
    """
    path = Path(path)
    model, whole = (path / FILE_NAME, path / JSON_NAME) if path.is_dir() else (path, path)
    if kind_of(model) == "ranks":
        return _from_ranks(model, whole)
    if kind_of(whole) == "json":
        return _from_json(whole)
    if kind_of(model) == "sentencepiece":
        return from_sentencepiece(model)
    raise ValueError(
        f"{path}: no tokenizer; give a folder or a file of {JSON_NAME}, or {FILE_NAME} with tiktoken ranks or of "
        "SentencePiece"
    )


def _from_ranks(file: Path, other: Path) -> Tokenizer | CarriedTokenizer:
    tokenizer = Tokenizer.load(file)
    ids = {spell(token): rank for rank, token in enumerate(tokenizer.tokens)} | tokenizer.specials
    controls: dict[str, Any] = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    try:
        asked = _controls(file.parent, ids, begins_with_bos=True)
        controls |= {name: value for name, value in asked.items() if value is not None}
        tokenizer.chat_format = format_of(asked["chat_template"] or "")
        if serves(tokenizer, **controls):
            return tokenizer
        if kind_of(other) != "json":
            return CarriedTokenizer(tokenizer_json(tokenizer), **controls)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return _from_json(other)


def _from_json(file: Path) -> Tokenizer | CarriedTokenizer:
    try:
        content = _object(file)
        return settled(content, **_controls(file.parent, ids_of(content), _begins_with_bos(content)))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    except (TypeError, AttributeError, LookupError):  # a list where there should be a name, and the like
        raise ValueError(f"{file}: no whole tokenizer.json of Hugging Face; give the model's own") from None


def _controls(folder: Path, ids: dict[str, int], begins_with_bos: bool) -> dict[str, Any]:
    """What the files beside a vocabulary say of control tokens and chat: CarriedTokenizer's arguments."""
    config, older, model, generation = (
        _object(folder / name) if (folder / name).is_file() else {}
        for name in ("tokenizer_config.json", "special_tokens_map.json", "config.json", "generation_config.json")
    )
    generation = model | {key: value for key, value in generation.items() if value is not None}
    known = set(ids.values())  # what a config says of other ids, such as -1 for none, is about no token
    stops = generation.get("eos_token_id")
    stops = [i for i in (stops if isinstance(stops, list) else [stops]) if isinstance(i, int) and i in known]
    found: dict[str, int | None] = {"bos_id": None, "eos_id": stops[0] if stops else None}
    for kind in ("bos", "eos", "pad", "unk"):
        token = config.get(f"{kind}_token") or older.get(f"{kind}_token")
        name = token.get("content") if isinstance(token, dict) else token
        number = generation.get(f"{kind}_token_id")
        if isinstance(name, str) and name in ids:
            found[f"{kind}_id"] = ids[name]
        elif isinstance(number, int) and number in known:
            found[f"{kind}_id"] = number
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name, as transformers 4 wrote them
        template = {named.get("name"): named.get("template") for named in template if isinstance(named, dict)}.get(
            "default"
        )
    if (folder / "chat_template.jinja").is_file():
        template = read_file(folder, "chat_template.jinja")[1].decode("utf-8", "replace")
    adds_bos = config.get("add_bos_token")
    return {
        **found,
        "stop_ids": stops,
        "adds_bos": adds_bos if isinstance(adds_bos, bool) else begins_with_bos,
        "chat_template": template if isinstance(template, str) else None,
    }


def _begins_with_bos(content: dict[str, Any]) -> bool:
    """Whether the post-processor puts a token before a text, which for a Llama is BOS."""
    step = content.get("post_processor") or {}
    steps = step.get("processors", [step])
    return any((part.get("single") or [{}])[0].get("SpecialToken") is not None for part in steps)


def _object(file: Path) -> dict[str, Any]:
    _, data = read_file(file, file.name)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file.name} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file.name} is no JSON object")
    return value

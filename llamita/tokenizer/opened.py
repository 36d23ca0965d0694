"""Open the tokenizer of a model, Llama 3's own or a carried one, in whatever files it comes."""

import json
from pathlib import Path
from typing import Any

from llamita.tokenizer.carried import CarriedTokenizer, ids_of
from llamita.tokenizer.known import settled
from llamita.tokenizer.llama3 import FILE_NAME, Tokenizer
from llamita.tokenizer.pieces import from_sentencepiece
from llamita.tokenizer.vocabulary import JSON_NAME, kind_of, read_file


def open_tokenizer(path: str | Path) -> Tokenizer | CarriedTokenizer:
    """The tokenizer in a model's folder, or in one of its files, told by content.

    tokenizer.model with tiktoken ranks comes before tokenizer.json, and that before SentencePiece's
    tokenizer.model. A tokenizer.json goes with what lies beside it: tokenizer_config.json, special_tokens_map.json,
    generation_config.json (stop ids) and chat_template.jinja. ValueError, with the file, for anything else.
    """
    path = Path(path)
    model, whole = (path / FILE_NAME, path / JSON_NAME) if path.is_dir() else (path, path)
    if kind_of(model) == "ranks":
        return Tokenizer.load(model)
    if kind_of(whole) == "json":
        return _from_json(whole)
    if kind_of(model) == "sentencepiece":
        return from_sentencepiece(model)
    raise ValueError(
        f"{path}: no tokenizer; give a folder or a file of {JSON_NAME}, or {FILE_NAME} with tiktoken ranks or of "
        "SentencePiece"
    )


def _from_json(file: Path) -> Tokenizer | CarriedTokenizer:
    try:
        content = _object(file)
        return settled(content, **_controls(file.parent, content))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    except (TypeError, AttributeError, LookupError):  # a list where there should be a name, and the like
        raise ValueError(f"{file}: no whole tokenizer.json of Hugging Face; give the model's own") from None


def _controls(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    """What the files beside a tokenizer.json say of control tokens and chat: CarriedTokenizer's arguments."""
    config, older, generation = (
        _object(folder / name) if (folder / name).is_file() else {}
        for name in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
    )
    ids = ids_of(content)
    known = set(ids.values())  # what a config says of other ids, such as -1 for none, is about no token
    stops = generation.get("eos_token_id")
    stops = [i for i in (stops if isinstance(stops, list) else [stops]) if isinstance(i, int) and i in known]
    found: dict[str, int | None] = {"eos_id": stops[0] if stops else None}
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
    if not isinstance(adds_bos, bool):
        adds_bos = "bos_id" in found and _begins_with_bos(content)
    return {
        **found,
        "stop_ids": stops,
        "adds_bos": adds_bos,
        "chat_template": template if isinstance(template, str) else None,
    }


def _begins_with_bos(content: dict[str, Any]) -> bool:
    """Whether the post-processor puts a token before a text, which for a Llama is BOS."""
    step = content.get("post_processor") or {}
    steps = step.get("processors", [step])
    return any(part.get("single", [{}])[0].get("SpecialToken") is not None for part in steps)


def _object(file: Path) -> dict[str, Any]:
    _, data = read_file(file, file.name)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file.name} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file.name} is no JSON object")
    return value

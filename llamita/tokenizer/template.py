"""A stranger's chat template, run as the untrusted program it is, on messages that cannot speak for the model."""

import json
import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llamita.tokenizer.vocabulary import well_formed

MAX_TEMPLATE = 1 << 17  # characters; Llama 3.1's own has 5,000

# A character that Unicode keeps for a program's own use. With a 1 behind it, it breaks up the name of a special
# token; with a 0 it is itself. The normaliser undoes both, after the library has looked for special tokens.
_MARK = "\ufdd0"
_UNDO = [
    {"type": "Replace", "pattern": {"String": _MARK + "1"}, "content": ""},
    {"type": "Replace", "pattern": {"String": _MARK + "0"}, "content": _MARK},
]


class _Generation(Extension):
    """`generation` marks, for some trainers, what the assistant says; the text is what stands in it."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> None:
    raise TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def compiled(source: str) -> Template:
    """The template with the functions that transformers gives to one. ValueError if it is no Jinja."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except (TemplateError, RecursionError) as error:
        raise ValueError(f"the chat template is no Jinja that can be read: {_line(error)}") from None


def filled(template: Template, messages: list[Any], reply: bool, tokens: Mapping[str, str]) -> str:
    """What the template writes; ValueError with its own reason where it refuses the messages."""
    try:
        return template.render(messages=messages, tools=None, documents=None, add_generation_prompt=reply, **tokens)
    except Exception as error:  # a stranger's program may raise anything
        raise ValueError(f"the model's chat template refuses the messages: {_line(error)}") from None


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).partition("\n")[0][:200]


def any_of(names: Iterable[str]) -> re.Pattern[str]:
    """What finds the first of the names in a text, the longest where several begin at one place."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))


def broken_up(value: Any, names: re.Pattern[str]) -> Any:
    """`value` with every name in its texts, however deep, broken up: it is no special token to `undoing`."""
    if isinstance(value, str):
        text = well_formed(value).replace(_MARK, _MARK + "0")
        return re.sub(f"(?s)(?={names.pattern})(.)", rf"\1{_MARK}1", text)
    if isinstance(value, Mapping):
        return {key: broken_up(part, names) for key, part in value.items()}
    return [broken_up(part, names) for part in value] if isinstance(value, list | tuple) else value


def kept(text: str) -> str:
    """`text` for `undoing`, with its special tokens."""
    return well_formed(text).replace(_MARK, _MARK + "0")


def undoing(content: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer.json that makes whole again what `broken_up` and `kept` give."""
    steps = [*_UNDO, *filter(None, [content.get("normalizer")])]
    return content | {"normalizer": {"type": "Sequence", "normalizers": steps}}

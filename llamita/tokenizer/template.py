"""A stranger's chat template, run as the untrusted program it is, on messages that cannot speak for the model.

It may neither reach Python (Jinja's sandbox) nor work without end: what it loops over, calls, joins, slices and
writes is counted, up to MAX_WORK for one rendering, which so takes seconds and at most about a gigabyte. What remains:
comparisons, `in`, tests and methods of lists are not counted, so many of them on long values take minutes or more.
"""

import json
import math
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from functools import wraps
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from llamita.tokenizer.vocabulary import well_formed

MAX_TEMPLATE = 1 << 17  # characters; Llama 3.1's own has 5,000
MAX_WORK = 1 << 26  # characters and entries; the longest dialog that Llama 3.1 reads has about 500,000 characters

# Filters, methods and operators whose result may be as long as their operands' lengths multiplied
_GROWING = {"*", "batch", "center", "expandtabs", "format", "format_map", "indent", "join", "ljust", "replace", "rjust"}
_GROWING |= {"slice", "to_bytes", "tojson", "translate", "urlize", "wordwrap", "zfill"}
# Filters that only look at a value, or give its parts one by one
_LOOKING = {"count", "d", "default", "first", "items", "last", "length", "map", "reject", "rejectattr", "select"}
_LOOKING |= {"selectattr"}
_LEAST_STEP, _PLACE = 256, 8  # what a step of a loop counts for, and a place in a list

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


class _Counted(NodeTransformer):
    """Sends through filters, which the sandbox counts, what loops go over, what is sliced and what ~ joins."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filter("steps", node.iter)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _filter("sliced", node.node)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter("join", nodes.List(node.nodes, lineno=node.lineno))


def _filter(name: str, node: nodes.Node) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


_budget = threading.local()  # `left`, of the rendering that this thread is at


def _spend(work: int) -> None:
    _budget.left -= work
    if _budget.left < 0:
        raise TemplateError("it takes more work or memory than a dialog needs")


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes | list | tuple | dict | range) else 1


def _weight(value: Any) -> int:
    """Characters and entries, however deep; the walk is work too, for lists may share parts without end."""
    if not isinstance(value, list | tuple | dict):
        return _length(value)
    parts = [part for pair in value.items() for part in pair] if isinstance(value, dict) else value
    _spend(_LEAST_STEP * len(parts))
    return len(parts) + sum(map(_weight, parts))


def _spend_on(name: str, operands: Iterable[Any]) -> None:
    """Pay for a filter, a method or an operator before it runs."""
    operands = list(operands)
    if name.startswith("format"):  # "%900d" is as wide as it says
        operands.append(max([0, *map(int, re.findall("[0-9]+", str(operands[0])))]))
    if name in _GROWING:
        _spend(math.prod(max(1, _PLACE * abs(o) if type(o) is int else _weight(o)) for o in operands))
    else:
        _spend(sum(map(_weight, operands)))


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja with what transformers gives to a template, where all that takes time or memory is paid for.

    A step of a loop or a call pays by the length of the template too, whose text may be written in it.
    """

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, length: int):
        extensions: list[Any] = [_Generation, "jinja2.ext.loopcontrols"]
        super().__init__(trim_blocks=True, lstrip_blocks=True, finalize=self._written, extensions=extensions)
        self._step = max(_LEAST_STEP, length // 8)
        del self.globals["lipsum"]
        self.globals |= {"raise_exception": _raise, "strftime_now": lambda form: datetime.now().strftime(form)}
        filters = self.filters | {"tojson": _tojson}
        self.filters = {name: self._paid(name, function) for name, function in filters.items()}
        self.filters |= {"steps": self._steps, "sliced": self._sliced}

    def _paid(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def run(*args: Any, **options: Any) -> Any:
            if name not in _LOOKING:
                _spend_on(name, [*args, *options.values()])
            result = function(*args, **options)
            return self._steps(result) if isinstance(result, Iterator) else result

        return run

    def _steps(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            _spend(self._step)
            yield value

    def _sliced(self, value: Any) -> Any:
        _spend(_length(value))
        return value

    def _written(self, value: Any) -> Any:
        _spend(_weight(value))
        return value

    def call(self, context: Context, function: Any, /, *args: Any, **options: Any) -> Any:
        own = getattr(getattr(function, "__wrapped__", function), "__self__", None)
        if isinstance(own, str | bytes | int):
            _spend_on(function.__name__, [own, *args, *options.values()])
            _spend(_LEAST_STEP)
        else:
            again = self._step if isinstance(function, LoopContext) else 1  # a recursive loop
            _spend(self._step + again * sum(map(_length, args)))
        return super().call(context, function, *args, **options)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            _spend(left.bit_length() * (abs(right) if operator == "**" else right.bit_length()))
        elif operator == "+":
            _spend(_length(left) + _length(right))
        elif operator == "%":
            _spend_on("format", [left, *(right if isinstance(right, tuple) else [right])])
        else:
            _spend_on(operator, [left, right])
        return super().call_binop(context, operator, left, right)


def _raise(message: str) -> None:
    raise TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def compiled(source: str) -> Template:
    """The template with the functions that transformers gives to one. ValueError if it is no Jinja, or too long."""
    if len(source) > MAX_TEMPLATE:
        raise ValueError(f"the chat template has more than {MAX_TEMPLATE} characters")
    environment = _Sandbox(len(source))
    _budget.left = MAX_WORK  # Jinja runs filters of constants at once
    try:
        return environment.from_string(_Counted().visit(environment.parse(source)))
    except Exception as error:  # Python's own compiler has limits as well
        raise ValueError(f"the chat template is no Jinja that can be read: {_line(error)}") from None


def filled(template: Template, messages: list[Any], reply: bool, tokens: Mapping[str, str]) -> str:
    """What the template writes; ValueError with its own reason where it refuses the messages or MAX_WORK."""
    _budget.left = MAX_WORK
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

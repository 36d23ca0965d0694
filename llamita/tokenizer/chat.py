"""Meta's two dialog formats: Llama 3, and Llama 3.1 with its dated system block and its tools.

A message is a header, a blank line, the trimmed content and <|eot_id|> (Meta's llama-models, `chat_format.py`).
Words and trimming are those of Hugging Face's templates for Meta-Llama-3-Instruct and Meta-Llama-3.1-Instruct.
No body begins with a blank, so a header's two newlines are always the same ids, in training and at a reply.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llamita.tokenizer.llama3 import Tokenizer

if TYPE_CHECKING:
    from llamita.tokenizer.carried import CarriedTokenizer

HEADERS = {"system": "system", "user": "user", "assistant": "assistant", "tool": "ipython"}
HEADERS_3_1 = {**HEADERS, "ipython": "ipython"}

# What Hugging Face and llama.cpp run where llamita runs `render`; `generation` spans what the mask spans.
TEMPLATES = {
    name: Path(__file__).with_name(file).read_text(encoding="utf-8")
    for name, file in (("llama3", "llama3.jinja"), ("llama3.1", "llama3_1.jinja"))
}
_DATE = "26 Jul 2024"
_IN_SYSTEM = (
    "You have access to the following functions. To call a function, please respond with JSON for a function call."
)
_IN_USER = (
    "Given the following functions, please respond with a JSON for a function call "
    "with its proper arguments that best answers the given prompt.\n\n"
)
_ANSWER = (
    'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.'
    "Do not use variables.\n\n"
)


class _Turn(NamedTuple):
    header: str
    text: str
    end: str = "<|eot_id|>"
    tag: str | None = None  # a special token before the text


def format_of(template: str) -> str:
    """Which of the two formats a chat template writes: "llama3.1" if it dates the model's knowledge, else "llama3"."""
    return "llama3.1" if "Cutting Knowledge Date" in template else "llama3"


def render(
    tokenizer: "Tokenizer | CarriedTokenizer",
    messages: Sequence[Mapping[str, Any]],
    *,
    reply: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    date: str | None = None,
    builtin_tools: Sequence[str] | None = None,
    tools_in_user_message: bool = True,
) -> tuple[list[int], list[bool]]:
    """Ids of a dialog and, for each, whether the assistant speaks it: its words or tool call, and their end token.

    `messages` are {"role", "content"} with role system, user, assistant or tool, in the tokenizer's `chat_format`;
    `reply` ends with an open assistant header. The rest is for "llama3.1" ("llama3" has no date):
    `tools` are JSON schemas, written into the first user message or else into the system's; `date` is today's,
    as in 26 Jul 2024; `builtin_tools` names those that are called in Python's syntax; ipython is another name of
    the role tool, whose content may be any JSON; an assistant's message may have, in place of its content,
    "tool_calls": [{"function": {"name", "arguments"}}], one call with its arguments as a mapping.
    Nothing in messages or tools is ever read for special tokens. ValueError on anything else.
    A carried tokenizer writes the dialog with its own template (`CarriedTokenizer.render`) and takes none of the rest.
    """
    if not isinstance(tokenizer, Tokenizer):
        if tools is not None or date is not None or builtin_tools is not None:
            raise ValueError("tools and a date are for the llama3.1 format; this tokenizer has a template of its own")
        return tokenizer.render(messages, reply=reply)
    if not messages:
        raise ValueError("a dialog needs at least one message")
    if tokenizer.chat_format == "llama3.1":
        turns = _llama3_1(messages, tools, _DATE if date is None else date, builtin_tools, tools_in_user_message)
    elif tools is not None or builtin_tools is not None:
        raise ValueError("the llama3 format has no tools; they need a tokenizer with chat_format llama3.1")
    else:
        turns = _llama3(messages)
    special, encode = tokenizer.specials, tokenizer.encode
    ids, mask = [tokenizer.bos_id], [False]

    def add(new: list[int], spoken: bool) -> None:
        ids.extend(new)
        mask.extend([spoken] * len(new))

    def header(name: str) -> list[int]:
        return [special["<|start_header_id|>"], *encode(name), special["<|end_header_id|>"], *encode("\n\n")]

    for turn in turns:
        add(header(turn.header), False)
        tag = [] if turn.tag is None else [special[turn.tag]]
        add([*tag, *encode(turn.text), special[turn.end]], turn.header == "assistant")
    if reply:
        add(header("assistant"), False)
    return ids, mask


def _llama3(messages: Sequence[Mapping[str, Any]]) -> Iterator[_Turn]:
    for i, message in enumerate(messages):
        header = _header(i, message, HEADERS)
        if message.get("tool_calls") is not None:
            raise ValueError(f"message {i} has tool_calls; they need a tokenizer with chat_format llama3.1")
        yield _Turn(header, _text(i, message))


def _llama3_1(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    date: str,
    builtins: Sequence[str] | None,
    in_user: bool,
) -> Iterator[_Turn]:
    system = "" if tools is None and builtins is None else "Environment: ipython\n"
    if builtins is not None:
        system += "Tools: " + ", ".join(name for name in builtins if name != "code_interpreter") + "\n\n"
    system += f"Cutting Knowledge Date: December 2023\nToday Date: {date}\n\n"
    listing = "" if tools is None else _listing(tools, _IN_USER if in_user else _IN_SYSTEM)
    if not in_user:
        system, listing = system + listing, ""
    headers = [_header(i, message, HEADERS_3_1) for i, message in enumerate(messages)]
    first = int(headers[0] == "system")
    yield _Turn("system", system + _text(0, messages[0]) if first else system)
    if listing and headers[first : first + 1] != ["user"]:
        raise ValueError(f"message {first} must be from the user, because it lists the tools")
    for i, message in enumerate(messages[first:], first):
        if message.get("tool_calls") is not None:
            yield _call(i, message, builtins)
        elif headers[i] == "ipython":
            yield _Turn("ipython", _result(i, message))
        else:
            yield _Turn(headers[i], (listing if i == first else "") + _text(i, message))


def _listing(tools: Sequence[Mapping[str, Any]], introduction: str) -> str:
    for i, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise ValueError(f"tool {i} is {type(tool).__name__}; give the JSON schema of a function as a dict")
    return introduction + _ANSWER + "".join(_json(f"tool {i}", tool, 4) + "\n\n" for i, tool in enumerate(tools))


def _header(i: int, message: Mapping[str, Any], headers: Mapping[str, str]) -> str:
    role = message.get("role")
    if not isinstance(role, str) or role not in headers:
        raise ValueError(f"message {i} has the role {role!r}; use one of {', '.join(headers)}")
    if role != "assistant" and message.get("tool_calls") is not None:
        raise ValueError(f"message {i} ({role}) has tool_calls; only the assistant calls tools")
    return headers[role]


def _text(i: int, message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if not isinstance(content, str):
        raise ValueError(f"message {i} ({message['role']}) has no text: its content must be a string")
    return content.strip()


def _result(i: int, message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if content is None:
        raise ValueError(f"message {i} ({message['role']}) has no content: give what the tool returned")
    return str(content) if isinstance(content, int | float) else _json(f"message {i}", content)


def _call(i: int, message: Mapping[str, Any], builtins: Sequence[str] | None) -> _Turn:
    try:
        [call] = message["tool_calls"]
        name, arguments = call["function"]["name"], call["function"]["arguments"]
    except (TypeError, ValueError, KeyError):
        raise ValueError(
            f'message {i}: tool_calls must be one call, [{{"function": {{"name": ..., "arguments": ...}}}}]'
        ) from None
    if not isinstance(name, str) or not isinstance(arguments, Mapping):
        raise ValueError(f"message {i}: a tool call's name must be text and its arguments a mapping, not JSON text")
    end = "<|eot_id|>" if builtins is None else "<|eom_id|>"
    if builtins is None or name not in builtins:
        return _Turn("assistant", f'{{"name": "{name}", "parameters": {_json(f"message {i}", arguments)}}}', end)
    if not all(isinstance(part, str) for pair in arguments.items() for part in pair):
        raise ValueError(f"message {i}: the arguments of the built-in tool {name} must be text")
    given = ", ".join(f'{key}="{value}"' for key, value in arguments.items())
    return _Turn("assistant", f"{name}.call({given})", end, tag="<|python_tag|>")


def _json(what: str, value: Any, indent: int | None = None) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, indent=indent)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} cannot be written as JSON: {error}") from None

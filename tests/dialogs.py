"""Dialogs of both formats, by hand and at random, and the tokenizers that the tests of chat templates share."""

from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st

from llamita.tokenizer import Tokenizer
from llamita.tokenizer.chat import HEADERS_3_1, TEMPLATES
from llamita.tokenizer.train import train

PROPERTY = settings(deadline=None, database=None)
EDGES = [
    "",
    " ",
    "\n\n",
    "\x1c",
    "\u0301a",
    "'s",
    "\u3000\u00a0x\u2028",
    "\ufeffx",
    "\r\nx\r",
    "!\n",
    "\n1 \n",
]

ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
ADD_JSON = """{
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {}
        }
    }
}"""
ANSWER = (
    'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.'
    "Do not use variables.\n\n"
)
DATED = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"


def call(name, arguments):
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": dict(name=name, arguments=arguments)}]}


USED = [
    {"role": "system", "content": " Be exact.\n"},
    {"role": "user", "content": "\tWhat is 2+\u00e9? "},
    call("add", {"a": 2, "b": ["\u00e9", None]}),
    {"role": "tool", "content": "4 <b>"},
    {"role": "assistant", "content": " Four. \n"},
    {"role": "user", "content": "Truly?"},
    {"role": "ipython", "content": {"sum": 4.0}},
    {"role": "tool", "content": 4.0},
    {"role": "tool", "content": True},
    {"role": "system", "content": " Stop. "},
]
SEARCH = call("brave_search", {"query": "llama", "page": "2"})


def block(header, text, end="<|eot_id|>"):
    return f"<|start_header_id|>{header}<|end_header_id|>\n\n{text}{end}"


# What `render` gives: messages, options, the blocks of the text, what the assistant says.
GOLDEN = {
    "plain": (
        [{"role": "user", "content": " Hi\n"}],
        {},
        [("system", DATED), ("user", "Hi")],
        "",
    ),
    "system": (
        [{"role": "system", "content": "\n Be kind. "}, {"role": "assistant", "content": " Hi "}],
        {"date": "1 Jan 2030"},
        [("system", DATED.replace("26 Jul 2024", "1 Jan 2030") + "Be kind."), ("assistant", "Hi")],
        "Hi<|eot_id|>",
    ),
    "tools": (
        [{"role": "user", "content": "Add. "}],
        {"tools": [ADD, {}]},
        [
            ("system", "Environment: ipython\n" + DATED),
            (
                "user",
                "Given the following functions, please respond with a JSON for a function call "
                "with its proper arguments that best answers the given prompt.\n\n"
                f"{ANSWER}{ADD_JSON}\n\n{{}}\n\nAdd.",
            ),
        ],
        "",
    ),
    "tools in the system block": (
        [{"role": "system", "content": "Be kind."}, call("add", {})],
        {"tools": [ADD], "tools_in_user_message": False},
        [
            (
                "system",
                f"Environment: ipython\n{DATED}You have access to the following functions. To call a function, "
                f"please respond with JSON for a function call.{ANSWER}{ADD_JSON}\n\nBe kind.",
            ),
            ("assistant", '{"name": "add", "parameters": {}}'),
        ],
        '{"name": "add", "parameters": {}}<|eot_id|>',
    ),
    "call and result": (
        USED,
        {},
        [
            ("system", DATED + "Be exact."),
            ("user", "What is 2+\u00e9?"),
            ("assistant", '{"name": "add", "parameters": {"a": 2, "b": ["\u00e9", null]}}'),
            ("ipython", '"4 <b>"'),
            ("assistant", "Four."),
            ("user", "Truly?"),
            ("ipython", '{"sum": 4.0}'),
            ("ipython", "4.0"),
            ("ipython", "True"),
            ("system", "Stop."),
        ],
        '{"name": "add", "parameters": {"a": 2, "b": ["\u00e9", null]}}<|eot_id|>Four.<|eot_id|>',
    ),
    "builtin tools": (
        [SEARCH, {"role": "assistant", "content": "Hm."}, call("add", {})],
        {"builtin_tools": ["brave_search", "code_interpreter", "wolfram_alpha"]},
        [
            ("system", "Environment: ipython\nTools: brave_search, wolfram_alpha\n\n" + DATED),
            ("assistant", '<|python_tag|>brave_search.call(query="llama", page="2")', "<|eom_id|>"),
            ("assistant", "Hm."),
            ("assistant", '{"name": "add", "parameters": {}}', "<|eom_id|>"),
        ],
        '<|python_tag|>brave_search.call(query="llama", page="2")<|eom_id|>Hm.<|eot_id|>'
        '{"name": "add", "parameters": {}}<|eom_id|>',
    ),
}


@cache
def tokenizers() -> dict[str, Tokenizer]:
    """One small vocabulary with either format."""
    tokens = train([Path(__file__).read_text(encoding="utf-8") * 2, *TEMPLATES.values()], 700).tokens
    return {chat_format: Tokenizer(tokens, chat_format) for chat_format in TEMPLATES}


def of_transformers(folder: Path):
    tokenizers()["llama3"].save(folder)
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    return transformers.AutoTokenizer.from_pretrained(folder)


def for_template(options: dict) -> dict:
    """The options of `render` by the names that templates know."""
    return {"date_string" if name == "date" else name: value for name, value in options.items()}


# By hand, then at random: with no bar, because transformers reads the names of special tokens in text.
BUILTINS = ["brave_search", "wolfram_alpha", "code_interpreter"]
CASES = [
    (USED, {}),
    (USED, {"tools": [ADD, {}], "date": "1 Jan 2030"}),
    (USED, {"tools": [ADD], "tools_in_user_message": False}),
    (USED[1:], {"tools": []}),
    ([*USED, SEARCH, call("code_interpreter", {"code": "1"})], {"tools": [ADD], "builtin_tools": BUILTINS}),
    (USED, {"builtin_tools": []}),
    *(
        ([{"role": role, "content": content}] * 2, {})
        for role in HEADERS_3_1
        for content in EDGES
    ),
]  # fmt: skip
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="|"), max_size=9) | st.sampled_from(EDGES)
JSON = st.recursive(
    st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner | st.none(), max_size=2) | st.dictionaries(TEXT, inner | st.none(), max_size=2),
    max_leaves=4,
)
OBJECT = st.dictionaries(TEXT, JSON, max_size=2)
TURN = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": TEXT}),
    st.fixed_dictionaries({"role": st.sampled_from(["tool", "ipython"]), "content": JSON}),
    st.builds(call, TEXT, OBJECT),
    st.builds(call, st.sampled_from(BUILTINS), st.dictionaries(TEXT, TEXT, max_size=2)),
)
USER = st.fixed_dictionaries({"role": st.just("user"), "content": TEXT})
SYSTEM = st.fixed_dictionaries({"role": st.just("system"), "content": TEXT})
SOME_BUILTINS = st.lists(st.sampled_from(BUILTINS), unique=True)
CASE = st.builds(
    lambda system, user, turns, options: ([*system, user, *turns], options),
    st.lists(SYSTEM, max_size=1),
    USER,
    st.lists(TURN, max_size=4),
    st.fixed_dictionaries(
        {},
        optional={
            "tools": st.lists(OBJECT, max_size=2),
            "date": TEXT,
            "builtin_tools": SOME_BUILTINS,
            "tools_in_user_message": st.booleans(),
        },
    ),
) | st.tuples(st.lists(TURN, min_size=1, max_size=4), st.fixed_dictionaries({}, optional={"date": TEXT}))

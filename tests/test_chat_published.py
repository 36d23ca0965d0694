"""Layer: parity with the chat templates that Meta's models are published with, from the wheel of TRL."""

from importlib import metadata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamita.tokenizer.chat import TEMPLATES, render
from tests.dialogs import (
    ADD,
    ADD_JSON,
    ANSWER,
    CASE,
    CASES,
    DATED,
    PROPERTY,
    TEXT,
    USED,
    block,
    call,
    for_template,
    of_transformers,
    tokenizers,
)

pytestmark = pytest.mark.peer
FILES = {"llama3": "llama3.jinja", "llama3.1": "llama3_1.jinja"}


@pytest.fixture(scope="module")
def published() -> dict[str, str]:
    """By the names of our formats; TRL itself, and with it torch, stays out."""
    try:
        files = {file.name: file for file in metadata.files("trl") or []}
    except metadata.PackageNotFoundError:
        pytest.skip("trl is not installed: its wheel holds the published templates")
    return {chat_format: files[name].read_text() for chat_format, name in FILES.items()}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    return of_transformers(tmp_path_factory.mktemp("published"))


def text_of(template, messages, **options):
    """The rendered text as servers get it, with null in messages left in; apply_chat_template drops it."""
    from transformers.utils.chat_template_utils import render_jinja_template

    [text], _ = render_jinja_template(
        [messages], chat_template=template, bos_token="<|begin_of_text|>", **for_template(options)
    )
    return text


def equal(chat_format, theirs, published, messages, options):
    """Equal text by either template, and equal ids by `render`, with and without a reply header."""
    for reply in (False, True):
        text = text_of(published[chat_format], messages, add_generation_prompt=reply, **options)
        assert text_of(TEMPLATES[chat_format], messages, add_generation_prompt=reply, **options) == text
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert render(tokenizers()[chat_format], messages, reply=reply, **options)[0] == ids
        assert theirs.apply_chat_template(
            messages, chat_template=published[chat_format], add_generation_prompt=reply, **for_template(options)
        )["input_ids"] == ids  # fmt: skip


@pytest.mark.parametrize(("messages", "options"), CASES)
def test_llama_3_1_gives_equal_ids(theirs, published, messages, options):
    equal("llama3.1", theirs, published, messages, options)


@settings(PROPERTY, max_examples=1000)
@given(CASE)
def test_llama_3_1_gives_equal_ids_for_any_dialog(theirs, published, case):
    equal("llama3.1", theirs, published, *case)


@PROPERTY
@given(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), TEXT), min_size=1, max_size=4))
def test_llama_3_gives_equal_ids_for_any_dialog(theirs, published, turns):
    equal("llama3", theirs, published, [{"role": role, "content": text} for role, text in turns], {})


def test_custom_tools_go_before_tools(published):
    texts = [
        text_of(template, USED, tools=tools, custom_tools=[ADD])
        for template in (TEMPLATES["llama3.1"], published["llama3.1"])
        for tools in (None, [{"other": 1}])
    ]
    assert len(set(texts)) == 1 and ADD_JSON in texts[0]


# ---- the known differences, all of them ----

USER = {"role": "user", "content": "Hi"}
CALL = call("add", {})

# What the published templates end with where ours refuse.
REFUSED = {
    "a role that is none": ("llama3.1", [{"role": "robot", "content": "Hi"}], {}, block("robot", "Hi")),
    "a role that is none, Llama 3": ("llama3", [{"role": "robot", "content": "Hi"}], {}, block("robot", "Hi")),
    "the role ipython, Llama 3": ("llama3", [{"role": "ipython", "content": "Hi"}], {}, block("ipython", "Hi")),
    "content that is no text": ("llama3.1", [{"role": "user", "content": 4}], {}, block("user", "4")),
    "content that is no text, Llama 3": ("llama3", [{"role": "user", "content": ["a"]}], {}, block("user", "['a']")),
    "content of null": ("llama3.1", [{"role": "user", "content": None}], {}, block("user", "None")),
    "no content": ("llama3.1", [{"role": "user"}], {}, block("user", "")),
    "no content, Llama 3": ("llama3", [{"role": "user"}], {}, block("user", "")),
    "a tool's result of null": ("llama3.1", [{"role": "tool", "content": None}], {}, block("ipython", "None")),
    "a call by another role": (
        "llama3.1", [{**CALL, "role": "user"}], {}, block("assistant", '{"name": "add", "parameters": {}}')
    ),
    "a call by the system": (
        "llama3.1", [{**CALL, "role": "system", "content": "Hi"}], {}, block("system", DATED + "Hi")
    ),
    "arguments as JSON text": (
        "llama3.1", [call("add", '{"a": 1}')], {}, block("assistant", r'{"name": "add", "parameters": "{\"a\": 1}"}')
    ),
    "arguments of null": (
        "llama3.1", [call("add", None)], {}, block("assistant", '{"name": "add", "parameters": null}')
    ),
    "tools where another begins": (
        "llama3.1", [{"role": "assistant", "content": "Hi"}], {"tools": []},
        block("user", "Given the following functions, please respond with a JSON for a function call "
        f"with its proper arguments that best answers the given prompt.\n\n{ANSWER}Hi"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("difference", REFUSED)
def test_what_only_the_published_templates_write(published, difference):
    chat_format, messages, options, written = REFUSED[difference]
    assert text_of(published[chat_format], messages, **options).endswith(written)
    with pytest.raises(Exception, match="must be"):
        text_of(TEMPLATES[chat_format], messages, **options)
    with pytest.raises(ValueError, match="message 0"):
        render(tokenizers()[chat_format], messages, **options)


def test_null_is_as_good_as_absent_in_our_llama_3_1(published):
    """Hugging Face's data sets fill rows up with tool_calls of null; llama.cpp gives null for no built-in tools."""
    template, theirs = TEMPLATES["llama3.1"], published["llama3.1"]
    plain = text_of(template, [USER])
    assert text_of(template, [{**USER, "tool_calls": None}]) == text_of(template, [USER], builtin_tools=None) == plain
    with pytest.raises(TypeError):
        text_of(theirs, [{**USER, "tool_calls": None}])
    assert "Tools: \n\n" in text_of(theirs, [USER], builtin_tools=None)
    newer = tokenizers()["llama3.1"]
    assert render(newer, [{**USER, "tool_calls": None}]) == render(newer, [USER])


def test_the_header_of_a_tool_is_ipython_in_our_llama_3(published):
    messages = [{"role": "tool", "content": "4"}]
    assert text_of(TEMPLATES["llama3"], messages).endswith(block("ipython", "4"))
    assert text_of(published["llama3"], messages).endswith(block("tool", "4"))


def test_llama_3_has_no_tools_and_render_says_so(published):
    plain = text_of(TEMPLATES["llama3"], [USER])
    for template in (TEMPLATES["llama3"], published["llama3"]):
        assert text_of(template, [USER], tools=[ADD]) == text_of(template, [{**USER, "tool_calls": []}]) == plain
    with pytest.raises(ValueError, match="tools"):
        render(tokenizers()["llama3"], [USER], tools=[ADD])

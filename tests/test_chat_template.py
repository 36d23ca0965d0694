"""Layer: pure arithmetic, then parity with transformers' rendering of our template."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamita.tokenizer import Tokenizer
from llamita.tokenizer.chat import HEADERS, TEMPLATE, render
from llamita.tokenizer.llama3 import SPECIALS
from llamita.tokenizer.train import train

PROPERTY = settings(deadline=None, database=None)
DIALOG = [
    {"role": "system", "content": "  Be kind.\n"},
    {"role": "user", "content": "\n\tWhat is 2+2?\n\nThink. "},
    {"role": "assistant", "content": " <|python_tag|> 2+2 \u3000"},
    {"role": "tool", "content": "4"},
    {"role": "assistant", "content": "It's four.\n"},
]
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


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train([Path(__file__).read_text(encoding="utf-8") * 2, TEMPLATE], 700)


@pytest.fixture(scope="module")
def theirs(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    tokenizer.save(folder)
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_the_format_to_the_letter(tokenizer):
    ids, mask = render(tokenizer, DIALOG, reply=True)
    assert tokenizer.decode(ids) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhat is 2+2?\n\nThink.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n<|python_tag|> 2+2<|eot_id|>"
        "<|start_header_id|>ipython<|end_header_id|>\n\n4<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nIt's four.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert len(ids) == len(mask)
    spoken = [i for i, own in zip(ids, mask, strict=True) if own]
    assert tokenizer.decode(spoken) == "<|python_tag|> 2+2<|eot_id|>It's four.<|eot_id|>"
    assert spoken.count(tokenizer.eot_id) == 2


def test_a_reply_continues_the_ids_of_training(tokenizer):
    whole, mask = render(tokenizer, DIALOG)
    prompt, _ = render(tokenizer, DIALOG[:-1], reply=True)
    assert whole[: len(prompt)] == prompt
    assert all(mask[len(prompt) :]) and not mask[len(prompt) - 1]


@PROPERTY
@given(st.lists(st.sampled_from(SPECIALS[:12]) | st.text(max_size=3), min_size=1).map("".join))
def test_content_never_makes_a_control_token(tokenizer, content):
    ids, _ = render(tokenizer, [{"role": "user", "content": content}])
    control = [i for i in ids if i >= len(tokenizer.tokens)]
    names = ("begin_of_text", "start_header_id", "end_header_id", "eot_id")
    assert control == [tokenizer.specials[f"<|{name}|>"] for name in names]
    assert tokenizer.decode(ids[ids.index(control[2]) + 1 : -1]) == "\n\n" + content.strip()


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "at least one message"),
        (
            [{"role": "user", "content": "a"}, {"role": "robot", "content": "b"}],
            "message 1 has the role 'robot'; use",
        ),
        ([{"role": "ipython", "content": "a"}], "message 0 has the role 'ipython'"),
        ([{"content": "a"}], "message 0 has the role None"),
        ([{"role": "user"}], r"message 0 \(user\) has no text"),
        ([{"role": "assistant", "content": None}], r"message 0 \(assistant\) has no text"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], r"message 0 \(user\) has no text"),
    ],
)
def test_bad_messages(tokenizer, theirs, messages, says):
    with pytest.raises(ValueError, match=says):
        render(tokenizer, messages)
    if messages:
        with pytest.raises(Exception, match=r"must be|role"):
            theirs.apply_chat_template(messages)


def _agree(tokenizer: Tokenizer, theirs, messages: list[dict[str, str]], template: str | None = None) -> bool:
    """Equal ids and assistant mask, with and without a reply header."""
    ids, mask = render(tokenizer, messages)
    out = theirs.apply_chat_template(
        messages, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    open_ids = theirs.apply_chat_template(messages, chat_template=template, add_generation_prompt=True)["input_ids"]
    return (out["input_ids"], [own == 1 for own in out["assistant_masks"]], open_ids) == (
        ids, mask, render(tokenizer, messages, reply=True)[0]
    )  # fmt: skip


def _plain(dialog: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{**message, "content": message["content"].replace("<|", "< |")} for message in dialog]


def test_transformers_renders_the_same(tokenizer, theirs):
    assert _agree(tokenizer, theirs, _plain(DIALOG))
    for role in HEADERS:
        for content in EDGES:
            assert _agree(tokenizer, theirs, [{"role": role, "content": content}] * 2), (role, content)


@PROPERTY
@given(st.lists(st.tuples(st.sampled_from(list(HEADERS)), st.text()), min_size=1, max_size=4))
def test_transformers_renders_any_dialog_the_same(tokenizer, theirs, turns):
    messages = _plain([{"role": role, "content": content} for role, content in turns])
    assert _agree(tokenizer, theirs, messages)


@pytest.mark.parametrize(
    ("part", "mutant"),
    [
        (" | trim", ""),
        ("bos_token", "bos_token + bos_token"),
        (r"\n\n", r"\n"),
        (json.dumps("ipython"), '"tool"'),
    ],
)
def test_the_check_can_fail(tokenizer, theirs, part, mutant):
    assert part in TEMPLATE
    assert not _agree(tokenizer, theirs, _plain(DIALOG), TEMPLATE.replace(part, mutant))


def test_transformers_reads_specials_in_content_and_render_does_not(tokenizer, theirs):
    """The one known difference: stock transformers cannot be told to leave content alone."""
    messages = [{"role": "user", "content": "a<|eot_id|>b"}]
    assert theirs.apply_chat_template(messages)["input_ids"].count(tokenizer.eot_id) == 2
    assert render(tokenizer, messages)[0].count(tokenizer.eot_id) == 1

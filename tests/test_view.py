"""Layer: pure arithmetic, parity with others (tiktoken, sentencepiece's scores) and hostile text."""

import base64
import hashlib
import io
import re
from itertools import groupby

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from llamita.tokenizer import Tokenizer
from llamita.tokenizer.chat import render
from llamita.tokenizer.foreign import JsonTokenizer
from llamita.tokenizer.llama2 import SPACE, SentencePieceTokenizer
from llamita.tokenizer.train import train
from llamita.tokenizer.view import MAX_BYTES, Merges, page, show, spans, visible
from llamita.tokenizer.vocabulary import well_formed
from tests.test_report import Page
from tests.test_tokenizer import SOURCE, TORTURE

BYTES = [bytes([byte]) for byte in range(256)]
HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)>'\"&amp;{{ 7 * 7 }}]]>\x00\x07\r\n\ud800"
    "\x1b[31mred\x1b]0;title\x07\x9b31m\x85[bold]markup[/bold]:smile: \u202eevil\u202c\u2066x\u2069\u200b\U000e0041\t"
)
# Controls, what turns the direction, and what is not seen: nothing of it may get out
UNSAFE = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufe00-\ufe0f\U000e0000-\U000e0fff]"
)
DIALOG = [{"role": "user", "content": "Hello <|eot_id|> \u9f98"}, {"role": "assistant", "content": "Good day!"}]


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return train(SOURCE, 1024)


@pytest.fixture(scope="module")
def llama3(shared_data) -> Tokenizer:
    return Tokenizer.load(shared_data / "tokenizers" / "llama3_tokenizer.model")


@pytest.fixture(scope="module")
def llama2(shared_data) -> SentencePieceTokenizer:
    pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    return SentencePieceTokenizer.load(shared_data / "tokenizers" / "llama2_tokenizer.model")


@pytest.fixture(params=["ours", "llama3", "llama2"])
def vocabulary(request):
    return request.getfixturevalue(request.param)


def _check(vocabulary, text: str) -> None:
    tokens = spans(vocabulary, text)
    wanted = well_formed(text).encode()
    if isinstance(vocabulary, SentencePieceTokenizer) and text:
        wanted = b" " + wanted
    assert b"".join(token.data for token in tokens) == wanted
    assert [token.id for token in tokens] == vocabulary.encode(text)
    assert not UNSAFE.search("".join(token.shown + token.whole + token.note for token in tokens))
    for group, members in groupby(tokens, key=lambda token: token.group):
        members = list(members)
        if group is None:
            assert all(token.data.decode() and not token.note + token.whole for token in members)
        else:
            characters = b"".join(token.data for token in members).decode()
            assert len(members) > 1 and all(token.kind == "fallback" and token.note for token in members)
            assert {token.whole for token in members} == {members[0].whole}
            assert members[0].whole in characters or not characters.isalnum()


def test_tokens_cover_the_text(vocabulary):
    for text in [*TORTURE, HOSTILE, "\ud83d\ude00 \ud83d"]:
        _check(vocabulary, text)


@settings(deadline=None, database=None)
@given(st.text(max_size=40).filter(lambda text: SPACE not in text))
def test_tokens_cover_any_text(ours, text):
    _check(ours, text)


def test_what_cannot_be_seen_has_a_sign():
    assert visible(b"a b\n\tc") == (("a", False), ("\u00b7", True), ("b", False), ("\u21b5", True), ("\n", False),
                                    ("\u2192", True), ("c", False))  # fmt: skip
    signs = {
        "\x00\x1b\r\x7f": "\u2400\u241b\u240d\u2421", "\x85\x9b": r"\x85\x9b", "\u202e\u2066\u200f": "<RLO><LRI><RLM>",
        "\u200d\ufe0f\ufeff": "<ZWJ><VS16><BOM>", "\u00a0\u3000\u2028": "<NBSP><U+3000><LS>",
        "\u3164\ufffe\U000e0041\u206a": "<U+3164><U+FFFE><U+E0041><U+206A>", "\u0301e\u0301": "\u25cc\u0301e\u0301",
    }  # fmt: skip
    for text, shown in signs.items():
        assert "".join(part for part, _ in visible(text.encode())) == shown
    assert visible(b"\xe4\xb8\xff") == (("<E4><B8><FF>", True),)
    assert visible("<E4>\u00b7".encode()) == (("<E4>\u00b7", False),)  # the same, but as text


def test_tokens_that_make_a_character_name_it(llama3):
    tokens = spans(llama3, " \u9f98x\U0001f999")
    assert [token.shown for token in tokens] == ["\u00b7<E9><BE>", "<98>", "x", "<F0><9F>", "<A6>", "<99>"]
    assert [token.group for token in tokens] == [0, 0, None, 1, 1, 1]
    assert [token.note for token in tokens[:2]] == ["2 of 3 bytes of \u9f98", "1 of 3 bytes of \u9f98"]
    assert [token.note[:12] for token in tokens[3:]] == ["2 of 4 bytes", "1 of 4 bytes", "1 of 4 bytes"]
    assert {token.whole for token in tokens[:2]} == {"\u9f98"}
    assert {token.whole for token in tokens[3:]} == {"\U0001f999"}
    assert {token.whole for token in spans(llama3, "\u202e")} == {"<RLO>"}


def test_a_token_may_have_parts_of_two_characters():
    tokens = spans(Tokenizer([*BYTES, b"\xad\xe4", b"\xb8\xad\xe4"]), "\u4e2d\u4e2d")
    assert [token.data for token in tokens] == [b"\xe4", b"\xb8\xad\xe4", b"\xb8", b"\xad"]
    assert tokens[1].note == "2 of 3 bytes of \u4e2d and 1 of 3 bytes of \u4e2d"
    assert {(token.group, token.whole) for token in tokens} == {(0, "\u4e2d\u4e2d")}


def test_ids_that_end_within_a_character(ours):
    start, end = 0xE4, ours.specials["<|eot_id|>"]
    for ids in ([start], [start, end, 0xB8, 0xAD], [start, ord("a")], [end, start, 0xB8]):
        tokens = spans(ours, ids)
        assert [token.id for token in tokens] == ids
        assert {(token.group, token.whole, token.note) for token in tokens} == {(None, "", "")}
    assert spans(ours, [start, start, 0xB8, 0xAD])[1].note == "1 of 3 bytes of \u4e2d"


def test_names_of_specials_are_text_unless_allowed(ours, llama2):
    text = "Hi<|eot_id|></s>"
    assert {token.kind for token in spans(ours, text)} == {"text"}
    allowed = [token for token in spans(ours, text, specials="allow") if token.kind == "special"]
    assert [(token.id, token.shown) for token in allowed] == [(ours.eot_id, "<|eot_id|>")]
    assert {token.kind for token in spans(llama2, text, specials="allow")} == {"text"}
    assert spans(llama2, [llama2.bos_id])[0].kind == "special"


def test_a_history_checked_by_hand():
    """Pairs by count: ug 20, ' p' 17, un 16, then ' h' (the smaller ids of two pairs with 15), ' hug' 15."""
    words = " hug" * 10 + " pug" * 5 + " pun" * 12 + " bun" * 4 + " hugs" * 5
    merges = Merges(train([words], 512 + 5))
    assert list(merges.ranks)[256:] == [b"ug", b" p", b"un", b" h", b" hug"]
    assert merges.steps(b" hug") == [
        ((b" ", b"h", b"u", b"g"), -1, -1),
        ((b" ", b"h", b"ug"), 256, 2),
        ((b" h", b"ug"), 259, 0),
        ((b" hug",), 260, 0),
    ]
    assert merges.steps(b"no such token") == [] and merges.steps(b"u") == [((b"u",), -1, -1)]


def test_histories_of_metas_vocabulary(llama3):
    merges = Merges(llama3)
    assert [step.parts for step in merges.steps(b" the")] == [
        (b" ", b"t", b"h", b"e"), (b" t", b"h", b"e"), (b" th", b"e"), (b" the",),
    ]  # fmt: skip
    assert merges.steps(b" jeho")[-1].parts == (b" j", b"eh", b"o")
    told = {word: merges.origin(spans(llama3, word)[0]) for word in (" the", " jeho", "!")}
    assert told[" the"] == "rank 279 of 128,000: merged before 99.8 % of the others"
    assert told[" jeho"].endswith("; merging stops short of it, so it is used only where it is a whole word")
    assert told["!"] == "a single byte, there before any merge"


def test_the_last_merge_is_tiktokens(ours):
    """What a token is made of is how a vocabulary that ends just before it cuts its bytes."""
    merges, wrong = Merges(ours), 0
    for rank in range(256, len(ours.tokens), 7):
        token = ours.tokens[rank]
        ranks = {other: i for i, other in enumerate(ours.tokens[:rank])}
        before = tiktoken.Encoding("before", pat_str=r"(?s).+", mergeable_ranks=ranks, special_tokens={})
        parts = tuple(before.decode_single_token_bytes(i) for i in before._encode_single_piece(token))
        assert merges.steps(token)[-2].parts == parts and len(parts) == 2
        wrong += (token[:-1], token[-1:]) != parts
    assert wrong > 5


def test_llama2s_order_is_that_of_its_scores(llama2):
    merges, by_score = Merges(llama2), Merges(llama2)
    scores = {llama2.token_bytes(i): llama2._processor.get_score(i) for i in range(259, llama2.vocab_size)}
    by_score.ranks = {token: rank for rank, token in enumerate(sorted(scores, key=scores.get, reverse=True))}
    for token in list(merges.ranks)[::20]:
        steps = merges.steps(token)
        assert [step.parts for step in steps] == [step.parts for step in by_score.steps(token)]
        assert steps[-1].parts == (token,)
    assert merges.steps(b"    ") == []
    origins = [merges.origin(token) for token in spans(llama2, "    \n\u9f98 the\u4e16")]
    assert [told.split(",")[0].split(":")[0] for told in origins[:2]] == ["a run of spaces", "one of the 256 bytes"]
    assert origins[-1] == "a single character, there before any merge" and " of 29,597: " in origins[-2]


def test_a_vocabulary_without_ranks(ours, tmp_path):
    pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    ours.save(tmp_path)
    foreign = JsonTokenizer.load(tmp_path)
    assert Merges(foreign).steps(b"a") == [] and "merging is not known" in page({"json": foreign}, "Hello")


def _shown(vocabulary, text, width=60, **options) -> str:
    how = {"color_system": options.pop("colours", None), "no_color": options.pop("no_color", False)}
    console = Console(file=io.StringIO(), force_terminal=True, width=width, **how)
    show(vocabulary, text, console, **options)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def tiny() -> Tokenizer:
    return Tokenizer([*BYTES, b"lo", b" lo", b"hi"])


def test_plain_lines(tiny):
    assert _shown(tiny, "hi lo \u00e9\n\nx") == (
        "\u258fhi\u258f\u00b7lo\u258f\u00b7\u258f<C3>\u258f<A9>(=\u00e9)\u258f\u21b5\n\u258f\u21b5\n\u258fx\n"
        "8 tokens \u00b7 10 characters \u00b7 11 bytes \u00b7 1.38 bytes per token \u00b7 2.00 tokens per word\n"
    )
    assert _shown(tiny, "hi lo x", ids=True).splitlines()[:2] == [
        "\u258fhi  \u258f\u00b7lo \u258f\u00b7  \u258fx   ",
        " 258  257  32  120 ",
    ]
    assert _shown(tiny, "hi", colours="truecolor", no_color=True) == _shown(tiny, "hi", colours="standard")
    assert _shown(tiny, "").startswith("0 tokens \u00b7 0 characters \u00b7 0 bytes \u00b7 \u2013 bytes per token")
    special = _shown(tiny, "hi<|eot_id|>", specials="allow").splitlines()
    assert special[0] == "\u258fhi\u258f<|eot_id|>" and special[1].startswith("2 tokens \u00b7 1 special \u00b7 2 char")


def test_neighbours_differ_in_colour(tiny):
    shown = _shown(tiny, "hilohi", colours="256").splitlines()[0]
    (first, one), (second, two), (third, three) = re.findall(r"48;5;(\d+)m(\w+)", shown)
    assert (one, two, three) == ("hi", "lo", "hi") and first == third != second and "\u258f" not in shown


@pytest.mark.parametrize("colours", [None, "standard", "256", "truecolor"])
@pytest.mark.parametrize("ids", [False, True])
def test_nothing_but_our_colours_reaches_the_terminal(vocabulary, colours, ids):
    for text in (HOSTILE, "".join(TORTURE)):
        raw = _shown(vocabulary, text, colours=colours, ids=ids)
        assert (colours in ("256", "truecolor")) == ("\x1b" in raw)
        plain = re.sub(r"\x1b\[[0-9;]+m", "", raw)
        assert not UNSAFE.search(plain)
        if not ids:
            joined = "".join(token.shown for token in spans(vocabulary, text)).replace("\n", "")
            lines = re.sub(r"\(=[^)]+\)", "", "".join(plain.splitlines()[:-1])).replace("\u258f", "")
            assert lines == re.sub(r"\(=[^)]+\)", "", joined)
    assert "[bold]" in re.sub(r"\x1b\[[0-9;]+m|\u258f", "", _shown(vocabulary, "[bold]x[/bold]", colours=colours))


def test_lines_break_between_tokens(ours):
    lines = _shown(ours, "the cat sat on the mat. " * 9, width=40).splitlines()[:-1]
    assert len(lines) > 3 and all(cell_len(line) <= 40 and line.startswith("\u258f") for line in lines)


class Parsed(Page):
    """A page, parsed strictly, with its tokens as [attributes, text]."""

    def __init__(self, html: str):
        self.tokens: list[list] = []
        self.script = ""
        super().__init__(html)

    def handle_starttag(self, tag, attrs):
        if tag == "a":
            self.tokens.append([dict(attrs), ""])
        if tag != "wbr":
            super().handle_starttag(tag, attrs)

    def handle_data(self, data):
        if "a" in self.open:
            self.tokens[-1][1] += data
        self.script += data if self.open[-1:] == ["script"] else ""


def _checked(html: str) -> Parsed:
    assert not UNSAFE.search(html)
    html.encode()
    parsed = Parsed(html)
    ids = [attrs["id"] for _, attrs in parsed.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {attrs["href"] for _, attrs in parsed.tags if "href" in attrs} <= {f"#{name}" for name in ids}
    assert {tag for tag, _ in parsed.tags} & {"img", "link", "iframe", "base", "object", "form", "input"} == set()
    assert not [name for _, attrs in parsed.tags for name in attrs if re.match(r"on|src|action|xlink", name)]
    assert "url(" not in html and "@import" not in html and "://" not in html
    digest = base64.b64encode(hashlib.sha256(parsed.script.encode()).digest()).decode()
    policy = next(attrs["content"] for _, attrs in parsed.tags if "http-equiv" in attrs)
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert [tag for tag, _ in parsed.tags].count("script") == 1
    return parsed


def test_a_page_shows_each_token_of_each_vocabulary(ours, llama3, llama2):
    text = "Hello, world!\n\n\tdef f(x): # \u9f98 \u0627\u0644\u0639 \U0001f999\n"
    vocabularies = {"small": ours, "Llama 3": llama3, "Llama 2": llama2}
    html = page(vocabularies, text)
    parsed = _checked(html)
    wanted = [token for vocabulary in vocabularies.values() for token in spans(vocabulary, text)]
    assert [shown for _, shown in parsed.tokens] == [token.shown for token in wanted]
    assert [attrs.get("title", "") for attrs, _ in parsed.tokens] == [token.note for token in wanted]
    assert [attrs["href"].split("-")[1] for attrs, _ in parsed.tokens] == [str(token.id) for token in wanted]
    assert html.count('<span class="whole">\u9f98</span>') == 3
    assert html.count("puts a space of its own") == 1
    assert '<h2 id="v2">Llama 3</h2>' in html and "came to be" in html


def test_hostile_text_stays_text(vocabulary):
    harmless = _checked(page({"name": vocabulary}, "Hello"))
    html = page({f"<b>{HOSTILE}": vocabulary}, HOSTILE)
    parsed = _checked(html)
    assert set(dict(parsed.tags)) - set(dict(harmless.tags)) <= {"ol", "li", "small", "figure", "figcaption"}
    assert "".join(shown for _, shown in parsed.tokens) == "".join(token.shown for token in spans(vocabulary, HOSTILE))
    assert "alert(1)" not in parsed.script and "{{ 7 * 7 }}" not in parsed.script
    assert "&lt;RLO&gt;" in html and "&lt;ZWSP&gt;" in html
    with pytest.raises(AssertionError):  # negative control
        _checked(html.replace("&lt;img src", "<img src"))


@settings(deadline=None, database=None, max_examples=30)
@given(st.text(max_size=30))
def test_any_text_makes_a_page(ours, text):
    parsed = _checked(page({text: ours}, text))
    assert "".join(shown for _, shown in parsed.tokens) == "".join(token.shown for token in spans(ours, text))


def test_a_dialog_marks_specials_and_what_the_assistant_says(ours, llama2):
    ids, mask = render(ours, DIALOG)
    parsed = _checked(page({"ours": ours}, DIALOG))
    classes = [attrs["class"].split() for attrs, _ in parsed.tokens]
    assert [attrs["href"].split("-")[1] for attrs, _ in parsed.tokens] == [str(i) for i in ids]
    assert ["special" in names for names in classes] == [ours.is_special(i) for i in ids]
    assert ["spoken" in names for names in classes] == mask and any(mask)
    allowed = _checked(page({"ours": ours}, "Hi<|eot_id|>", specials="allow"))
    assert "special" in allowed.tokens[-1][0]["class"]
    with pytest.raises(ValueError, match="no dialog format"):
        page({"ours": ours, "Llama 2": llama2}, DIALOG)


def test_the_empty_text_and_what_is_refused(ours):
    assert "The text is empty" in page({"ours": ours}, "") and _checked(page({"a": ours, "b": ours}, ""))
    page({"ours": ours}, "x" * MAX_BYTES)
    for text in ("x" * (MAX_BYTES + 1), "\u9f98" * MAX_BYTES):
        console = Console(file=io.StringIO())
        for ask in (lambda: page({"ours": ours}, text), lambda: show(ours, text, console)):  # noqa: B023
            with pytest.raises(ValueError, match=r"^the text has [\d,]+ bytes; 100,000 is the most") as caught:
                ask()
            assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="at least one"):
        page({}, "text")

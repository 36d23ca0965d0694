"""Layer: arithmetic on a table of texts. A rule keeps what lies within its bounds, and is called by its name."""

import bz2
import json
from dataclasses import replace

import numpy as np
import pytest

from llamita.data import presets
from llamita.data.c4 import c4_lines
from llamita.data.measure import measure
from llamita.data.presets import PRESETS, Rule, failing, mask, names
from llamita.data.strings import Strings

GOOD = (
    "The ship left the harbour at dawn, and the crew that had slept below came up to look at the sea. "
    "Nobody spoke for a while. The captain, an old man with a grey beard, held the wheel and hummed. "
    "Far away there was a line of hills that they would not see again before the spring. "
    "It would be cold soon. The cook brought bread and hot tea to everybody who had to stay on deck."
)
WEB = ("gopher-repetition@1", "gopher-quality@1", "c4@1", "fineweb@1")


def first_failed(text: str, asked=WEB, lang: str = "en") -> str:
    found = failing(measure(Strings.of([text])), asked, [lang])
    assert found.dtype == np.int16
    return [*names(asked), ""][found[0]]


@pytest.mark.parametrize(
    ("asked", "text", "failed"),
    [
        (WEB, GOOD, ""),
        (WEB, GOOD * 9, "gopher-repetition@1:dup_5_gram"),
        (WEB, (GOOD[:98] + "\n\n") * 4, "gopher-repetition@1:dup_paragraphs"),
        (WEB, GOOD[:98] + GOOD[98:130], "gopher-quality@1:words"),
        (("gopher-quality@1",), GOOD + "# " * 20, "gopher-quality@1:hash_ratio"),
        (WEB, GOOD + "{ is a brace.", "c4@1:curly_bracket"),
        (WEB[1:], "\n".join("a b" for _ in range(99)), "gopher-quality@1:mean_word_length"),
        (("gopher-quality@1",), "1234 " * 20 + "words " * 40, "gopher-quality@1:alpha_words"),
        (("gopher-quality@1",), "houses " * 60, "gopher-quality@1:stop_words"),
        (("code@1",), "x = 1\n" * 3, ""),
        (("code@1",), "x" * 1001, "code@1:max_line_length"),
        (("code@1",), "{}();\n" * 30, "code@1:alnum_share"),
        (("words>=200",), GOOD, "words>=200"),
        (("words<=200", "alnum_share >= 0.9"), GOOD, "alnum_share >= 0.9"),
    ],
)
def test_a_text_fails_the_first_rule_it_should(asked, text, failed):
    assert first_failed(text, asked) == failed


def test_bounds_belong_to_what_is_kept():
    columns = {"words": np.array([49, 50, 100_000, 100_001], np.float32), "share": np.array([0.2, 0.20001], np.float32)}
    assert mask(columns, Rule("r", "words", 50, 100_000), [""] * 4).tolist() == [False, True, True, False]
    assert mask(columns, Rule("r", "share", high=0.2), [""] * 2).tolist() == [True, False]


def test_stop_words_are_asked_of_languages_that_have_a_list():
    german = "Haus " * 30 + "Baum " * 30
    assert first_failed(german, ("gopher-quality@1",), "de") == "gopher-quality@1:stop_words"
    assert first_failed("der die und " + german, ("gopher-quality@1",), "de") == ""
    assert first_failed(german, ("gopher-quality@1",), "xx") == ""


def test_the_paper_and_the_code_of_fineweb_part_on_repeated_lines():
    text = "A line that stands here two times and is long enough to see.\n" * 2 + GOOD * 2
    share = measure(Strings.of([text]))["dup_full_line_chars"][0]
    assert 0.01 < share < 0.1
    assert first_failed(text, ("fineweb@1",)) == ""
    assert first_failed(text, ("fineweb-code@1",)) == "fineweb-code@1:dup_full_line_chars"


@pytest.mark.parametrize(
    ("asked", "said"),
    [("fineweb", "did you mean 'fineweb@1'"), ("wrds>=3", "did you mean 'words'"), ("words>3", "no rules are called")],
)
def test_what_is_no_rule_is_refused_by_name(asked, said):
    with pytest.raises(ValueError, match=said):
        names([asked])
    with pytest.raises(ValueError, match="no rules are called"):
        names(["words>=__import__('os').getpid()"])


def test_every_preset_asks_for_a_column_that_is_measured():
    columns = measure(Strings.of([GOOD]))
    for rule in (rule for rules in PRESETS.values() for rule in rules):
        assert rule.column in columns or rule.column == presets.STOP_WORD_RULE
        impossible = replace(rule, low=1e9)  # every rule can fail
        assert not mask(columns, impossible, ["en"])[0]


def test_c4_drops_lines_and_citations():
    lines = ["Home", "We use cookies on this site.", "  This line [12] stays here. ", "Please enable JavaScript now."]
    text = "\n".join([*lines, "y" * 1001 + " and two more", "Last[edit] line of it."])
    assert c4_lines(Strings.of([text, "", "menu"])).texts() == ["This line  stays here.\nLast line of it.", "", ""]


def test_bounds_of_published_rules_are_those_of_a_language():
    columns = {"mean_word_length": np.array([0.9, 1, 2.9, 3, 10, 10.1], np.float32)}
    rule = next(rule for rule in PRESETS["gopher-quality@1"] if rule.column == "mean_word_length")
    assert mask(columns, rule, ["ko"] * 6).tolist() == [False, True, True, True, True, False]
    assert mask(columns, rule, ["en", "en", "ko", "en", "", "en"]).tolist() == [False, False, True, True, True, False]
    own = Rule("mean_word_length>=3", "mean_word_length", 3)  # what the user asks is asked of all
    assert mask(columns, own, ["ko"] * 6).tolist() == [False, False, False, True, True, True]


@pytest.mark.parametrize("preset", ["c4@1", "fineweb@1", "fineweb-code@1"])
def test_thai_and_lao_are_not_asked_for_stops(preset):
    text = "เรือออกจากท่าก่อนที่ใครจะสังเกตว่ากัปตันหายไป แล้วทุกคนก็ขึ้นมาดูทะเลด้วยกัน " * 2
    assert first_failed(text, (preset,), "th") == first_failed(text, (preset,), "lo") == ""
    assert first_failed(text, (preset,), "km") in ("c4@1:sentences", f"{preset}:punctuated_lines")


DECLARATIONS = {
    "deu_1996": "de", "fra": "fr", "eng": "en", "vie": "vi", "hin": "hi", "rus": "ru", "arb": "ar", "cmn_hans": "zh",
    "jpn": "ja", "lao": "lo", "khm": "km", "mya": "my", "tha": "th", "tha2": "th", "kor": "ko",
}  # fmt: skip


@pytest.mark.parametrize("declaration", DECLARATIONS)
def test_the_rules_for_web_pages_keep_the_declaration_of_human_rights(declaration, shared_data):
    with bz2.open(shared_data / "multilingual/udhr.jsonl.bz2", "rt", encoding="utf-8") as lines:
        text = next(row["text"] for row in map(json.loads, lines) if row["id"] == declaration)
    assert first_failed(c4_lines(Strings.of([text])).texts()[0], lang=DECLARATIONS[declaration]) == ""


@pytest.mark.parametrize("lang", ["th", "ko"])
def test_the_rules_for_web_pages_keep_prose_in_thai_and_korean(lang, shared_data):
    with bz2.open(shared_data / "multilingual/langid_sentences.jsonl.bz2", "rt", encoding="utf-8") as lines:
        texts = [row["text"] for row in map(json.loads, lines) if row["lang"] == lang]
    documents = ["\n".join(texts[i : i + 12]) for i in range(0, len(texts) - 12, 12)]
    kept = failing(measure(Strings.of(documents)), WEB, [lang] * len(documents)) < 0
    assert len(documents) > 50 and kept.mean() >= 0.9

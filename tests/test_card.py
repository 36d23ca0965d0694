"""Layer: pure, then a corpus folder. The data card tells the build's own numbers, stands alone and is no way in."""

import json
import re

import pytest

from llamita.cli import data as verbs
from llamita.data import ledger
from llamita.report import card
from tests.test_ledger import hand_made, some_rows
from tests.test_report import HOSTILE, Page

IN_MARKDOWN = f"{HOSTILE} | cell\n# head\n[x](javascript:alert(1)) `code` **bold** $x$ @someone https://x.example"


def a_build() -> dict:
    """`build.json` as a web recipe leaves it."""
    return {
        "read": {"docs_in": 1000, "bytes_in": 4_000_000, "docs": 700, "bytes": 2_500_000},
        "removed": {
            "gopher-quality@1:words": {"docs": 300, "bytes": 1_500_000,
                                       "samples": [{"name": "a", "text": "too short"}] * 20},
            "duplicate:near": {"docs": 200, "bytes": 900_000, "samples": [{"name": IN_MARKDOWN, "text": IN_MARKDOWN}]},
        },
        "skipped": {"not UTF-8": {"count": 3, "examples": ["b.txt"]}},
        "kept": {"docs": 500, "tokens": 400_000},
        "cut_bytes": 1234,
        "shares": {
            "source": {"web": {"docs": 400, "bytes": 1_200_000, "tokens": 300_000},
                       IN_MARKDOWN: {"docs": 100, "bytes": 400_000, "tokens": 100_000}},
            "lang": {"en": {"docs": 300, "bytes": 1_000_000, "tokens": 250_000},
                     "": {"docs": 200, "bytes": 600_000, "tokens": 150_000}},
            "kind": {"prose": {"docs": 500, "bytes": 1_600_000, "tokens": 400_000}},
            "license": {"": {"docs": 500, "bytes": 1_600_000, "tokens": 400_000}},
        },
        "duplicates": {"exact": 0, "url": 0, "near": 200},
        "pairs": [{"first": "a", "other": HOSTILE, "similarity": 0.913}],
        "contamination": {
            "sets": {"mmlu.csv": {"items": 14_042, "found": 12, "too short": ["1", "2"], "too common": ["3"]}},
            "items": [{"set": "mmlu.csv", "id": "516", "documents": 3, "coverage": 0.83, "names": ["a"],
                       "excerpt": HOSTILE}],
        },
    }  # fmt: skip


@pytest.fixture
def facts(tmp_path):
    corpus = hand_made(tmp_path / "c", some_rows())
    (corpus.folder / "build.json").write_text(json.dumps(a_build()))
    (corpus.folder / "recipe.toml").write_text('name = "web"\n[rules]\nprose = ["gopher-quality@1"]\n')
    return ledger.papers(corpus)


def test_the_papers_count_what_the_corpus_holds(facts):
    rows = some_rows()
    assert sum(facts["lengths"].values()) == sum(facts["clusters"].values()) == len(rows)
    assert facts["clusters"] == {0: 8, 1: 16, 2: 16}, "cluster sizes 1 to 5, eight of each"
    lengths = [len(row["text"].encode()) + 2 for row in rows]
    assert facts["lengths"] == {
        b: n for b in range(20) if (n := sum(2**b <= length < 2 ** (b + 1) for length in lengths))
    }
    splits = facts["manifest"]["splits"]
    assert (splits["train"]["docs"], splits["heldout"]["docs"]) == (36, 4)
    assert splits["train"]["tokens"] + splits["heldout"]["tokens"] == sum(lengths)
    json.dumps(facts)


def test_the_page_tells_the_numbers_and_stands_alone(facts):
    markdown, html = card.render(facts)
    page = Page(html)
    assert page.foreign() == [] and "script" not in [tag for tag, _ in page.tags]
    for told in ("of 1,000 read", "300", "30.0%", "75.0%", "14,042", "too short", "gopher-quality@1:words", "0.91",
                 "1,234", "b.txt", "mmlu.csv 516, 83% of it"):  # fmt: skip
        assert told in page.text, told
    assert page.text.count("too short") == 1 + card.SHOWN_SAMPLES, "a few samples of a reason, not all"
    assert facts["fingerprint"] in page.text and facts["fingerprint"] in markdown
    widths = [float(attrs["width"].rstrip("%")) for tag, attrs in page.tags if tag == "rect"]
    assert max(widths) == 100 and min(widths) >= 0 and "33.33%" in html


def test_the_markdown_has_the_same_tables_and_a_head_for_hubs(facts):
    markdown, _ = card.render(facts)
    head = markdown.split("---\n")[1]
    assert 'language: ["en"]' in head and 'size_categories: ["n<1K"]' in head and "license: other" in head
    assert "| web | 400 | 1.20M | 300k | 4.00 | 75.0% |" in markdown
    assert r"| gopher\-quality\@1\:words | 300 | 30.0% | 1.50M |" in markdown
    assert '    prose = ["gopher-quality@1"]\n' in markdown
    tables = re.findall(r"((?:^\|.*\n)+)", markdown, re.M)
    assert len(tables) > 8
    for table in tables:
        columns = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(columns) == 1, table


def test_nothing_that_a_document_says_is_markup(facts):
    markdown, html = card.render(facts)
    assert "<script" not in html and "<img" not in html and "\x00" not in html + markdown
    body = markdown.split("---\n", 2)[2]
    assert not re.search(r"(?<!\\)[<`*@$]", body.replace(r"\\", "").split("## Rebuild")[0])
    assert "\n# head" not in body and "](" not in body.replace(r"\]\(", "")


def test_an_empty_build_has_a_card(facts):
    nothing = {"removed": {}, "skipped": {}, "shares": {}, "pairs": [], "contamination": {}, "cut_bytes": 0}
    zero = {"read": dict.fromkeys(("docs_in", "bytes_in", "docs", "bytes"), 0), "kept": {"docs": 0, "tokens": 0}}
    empty = facts | {"build": facts["build"] | nothing | zero, "lengths": {}, "clusters": {}}
    markdown, html = card.render(empty)
    assert "The recipe removed nothing." in Page(html).text and "No evaluation set was looked for." in markdown
    assert "language:" not in markdown


def test_many_sources_are_cut_short_and_none_is_lost(facts):
    shares = {f"s{i:03d}": {"docs": 1, "bytes": 8, "tokens": 2} for i in range(100)}
    bars = card.composition(shares)
    assert len(bars) == card.SHOWN_VALUES + 1 and bars[-1].name == "70 others"
    assert bars[-1].cells == ["70", "560", "140", "4.00", "70.0%"] and bars[-1].width == 100


def test_powers_of_two_leave_no_gap():
    assert [(bar.name, bar.cells[0]) for bar in card.powers({0: 3, 2: 1})] == [
        ("1", "3"),
        ("2 to 3", "0"),
        ("4 to 7", "1"),
    ]


@pytest.mark.parametrize(
    ("docs", "size"), [(0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (10**6, "1M<n<10M"), (10**12, "n>1T")]
)
def test_sizes_are_a_hubs_own(facts, docs, size):
    facts["build"]["kept"]["docs"] = docs
    assert card.view(facts)["size"] == size


def test_the_verb_writes_both_and_needs_the_builds_papers(tmp_path, capsys):
    corpus = hand_made(tmp_path / "c", some_rows())
    with pytest.raises(ValueError, match=r"has no build\.json; build the corpus again"):
        verbs.card(corpus.folder)
    (corpus.folder / "build.json").write_text(json.dumps(a_build()))
    (corpus.folder / "recipe.toml").write_text('name = "web"\n')
    verbs.card(corpus.folder)
    assert capsys.readouterr().out.split() == [str(corpus.folder / "card.md"), str(corpus.folder / "card.html")]
    assert not list(corpus.folder.glob("*.part"))
    before = [(corpus.folder / name).read_bytes() for name in ("card.md", "card.html")]
    verbs.card(corpus.folder)
    assert [(corpus.folder / name).read_bytes() for name in ("card.md", "card.html")] == before

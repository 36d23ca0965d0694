"""Layer: numbers counted by hand, sums and batches that must agree, published figures, tables and plots."""

import bz2
import json
import lzma
import sys
from collections.abc import Iterator
from dataclasses import replace
from io import StringIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from llamita.tokenizer import compare as module
from llamita.tokenizer.compare import Comparison, compare
from llamita.tokenizer.llama3 import is_partial
from llamita.tokenizer.plot import plot
from llamita.tokenizer.tally import Text
from llamita.tokenizer.train import train
from llamita.tokenizer.vocabulary import open_vocabulary
from tests.test_tokenizer import SOURCE, TORTURE

TEXTS = [
    Text("ab cd", "book", "en"),
    Text("n\u00e9", "web", "fr"),
    Text("\u4e2d\u6587\u5b57", "web", "zh"),
    Text("", "web", "en"),
]


class Chunks:
    """UTF-8 in chunks of one or two bytes; one id behind them is special, the next is no id. `drop` is lost."""

    def __init__(self, width: int, drop: str = ""):
        self.width, self.drop = width, drop
        self.vocab_size = 256 + 2 + 65_536 * (width == 2)
        self.batches: list[list[str]] = []

    def encode(self, text: str) -> list[int]:
        data = text.encode()
        return [self._id(data[i : i + self.width]) for i in range(0, len(data), self.width)]

    def encode_batch(self, texts) -> list[list[int]]:
        self.batches.append(list(texts))
        return [self.encode(text) for text in self.batches[-1]]

    def decode(self, ids) -> str:
        text = b"".join(map(self.token_bytes, ids)).decode()
        return text.replace(self.drop, "") if self.drop else text

    def _id(self, chunk: bytes) -> int:
        return chunk[0] if len(chunk) == 1 else 258 + int.from_bytes(chunk)

    def token_bytes(self, token_id: int) -> bytes:
        if token_id == 257:
            raise ValueError("no such id")
        return (token_id - 258).to_bytes(2) if token_id > 257 else b"s" if token_id == 256 else bytes([token_id])

    def is_fallback(self, token_id: int) -> bool:
        return token_id not in (256, 257) and is_partial(self.token_bytes(token_id))

    def is_special(self, token_id: int) -> bool:
        return token_id == 256


class Nothing(Chunks):
    """A vocabulary that has no token for anything."""

    def encode(self, text: str) -> list[int]:
        return []


def small() -> Comparison:
    return compare({"one": Chunks(1), "two": Chunks(2)}, iter(TEXTS))


def timeless(comparison: Comparison) -> Comparison:
    uses = {name: replace(use, megabytes_per_second=0.0) for name, use in comparison.vocabularies.items()}
    return replace(comparison, vocabularies=uses)


def rendered(comparison: Comparison) -> str:
    console = Console(width=100, file=StringIO())
    for table in comparison.tables():
        console.print(table)
    return console.file.getvalue()


# ---- numbers ----


def test_a_small_example_counted_by_hand():
    found = small()
    overall, one, two = found.overall, found.overall.vocabularies["one"], found.overall.vocabularies["two"]
    assert (overall.documents, overall.bytes, overall.characters, overall.words) == (4, 17, 10, 4)
    assert (one.tokens, two.tokens) == (17, 3 + 2 + 5) and (one.lossy, two.lossy) == (0, 0)
    assert (one.bytes_per_token, two.bytes_per_token) == (1, 1.7)
    assert (one.tokens_per_document, two.tokens_per_document) == (17 / 4, 10 / 4)
    assert one.relative == 0 and two.relative == pytest.approx(10 / 17 - 1)
    assert (one.fallback_share, two.fallback_share) == (11 / 17, 7 / 10)
    assert (one.tokens_per_word, two.tokens_per_word) == (8 / 3, 5 / 3)  # Chinese left out

    assert list(found.languages) == ["zh", "en", "fr"] and list(found.sources) == ["web", "book"]
    chinese, english = found.languages["zh"], found.languages["en"]
    assert (chinese.documents, chinese.bytes, chinese.characters, chinese.words) == (1, 9, 3, 1)
    assert chinese.vocabularies["two"].tokens_per_word is None
    assert english.documents == 2 and english.vocabularies["one"].tokens_per_word == 5 / 2
    assert found.sources["web"].bytes == 12 and found.sources["web"].vocabularies["one"].tokens_per_word == 3
    assert found.languages["fr"].vocabularies["two"].relative == pytest.approx(-1 / 3)

    use = found.vocabularies["one"]
    assert (use.entries, use.never_used) == (256, 256 - 16) and use.never_used_share == 240 / 256
    assert found.vocabularies["two"].entries == 256 + 65_536
    assert all(use.megabytes_per_second > 0 for use in found.vocabularies.values()) and found.threads >= 1


@settings(deadline=None, database=None, max_examples=30)
@given(st.lists(st.builds(Text, st.text(max_size=30), st.sampled_from("st"), st.sampled_from(["", "a", "b"]))))
def test_languages_and_sources_add_up(texts):
    found = compare({"one": Chunks(1), "two": Chunks(2)}, [*texts, Text("some", "s", "a")])
    for groups in (found.languages.values(), found.sources.values()):
        for field in ("documents", "bytes", "characters", "words"):
            assert sum(getattr(group, field) for group in groups) == getattr(found.overall, field)
        for name, cost in found.overall.vocabularies.items():
            assert sum(group.vocabularies[name].tokens for group in groups) == cost.tokens
            assert sum(group.vocabularies[name].lossy for group in groups) == cost.lossy


def test_batches_change_nothing_and_stay_small(monkeypatch):
    texts = [Text(text, "torture", f"l{i % 5}") for i, text in enumerate(TORTURE * 3)] + TEXTS
    ours = train(SOURCE, 1024)
    whole = timeless(compare({"one": Chunks(1), "ours": ours}, texts))
    for size, most in ((1, 2**14), (2**22, 1), (500, 7)):
        monkeypatch.setattr(module, "BATCH_BYTES", size)
        monkeypatch.setattr(module, "BATCH_TEXTS", most)
        one = Chunks(1)
        assert timeless(compare({"one": one, "ours": ours}, iter(texts))) == whole
        assert len(one.batches) > 5
        assert all(len(batch) <= most and sum(map(len, batch[:-1])) < size for batch in one.batches)
        sizes = [len("".join(batch).encode()) for batch in one.batches]
        assert all(len(batch) == most or full >= size for batch, full in zip(one.batches[:-1], sizes, strict=False))


def test_texts_are_read_as_they_are_encoded(monkeypatch):
    monkeypatch.setattr(module, "BATCH_TEXTS", 2)
    one, seen = Chunks(1), []

    def texts() -> Iterator[Text]:
        for i in range(6):
            seen.append(len(one.batches))
            yield Text(f"text {i}")

    compare({"one": one}, texts())
    assert seen == [0, 0, 1, 1, 2, 2]


def test_a_long_text_is_cut_where_a_line_begins(monkeypatch):
    text = "one two\n  three\nfour five six\n" * 40
    ours = train(SOURCE, 1024)
    whole = timeless(compare({"ours": ours}, [Text(text)]))
    monkeypatch.setattr(module, "PART_CHARS", 50)
    assert timeless(compare({"ours": ours}, [Text(text)])) == whole
    assert list(module._cut(text))[1].startswith("four") and "".join(module._cut(text)) == text

    words, run = "ab " * 40, "x" * 120
    assert [len(part) for part in module._cut(words)] == [48, 48, 24]
    assert [len(part) for part in module._cut(run)] == [50, 50, 20]
    lossy = compare({"one": Chunks(1, drop="x")}, [Text(run), Text("fine"), Text(run)]).overall
    assert lossy.documents == 3 and lossy.vocabularies["one"].lossy == 2


def test_what_does_not_come_back_is_counted():
    found = compare({"one": Chunks(1), "less": Chunks(1, drop="d")}, [*TEXTS, Text("\ud83d\ude00 \ud83d", "", "en")])
    assert found.overall.vocabularies["one"].lossy == 0  # surrogates count as what every vocabulary reads
    assert [found.languages[lang].vocabularies["less"].lossy for lang in ("en", "fr", "zh")] == [1, 0, 0]


def test_as_json():
    found = compare({"one": Chunks(1), "none": Nothing(1)}, [*TEXTS, Text("", "empty", "xx")])
    read = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert read == found.to_dict()
    assert list(read) == ["threads", "vocabularies", "overall", "languages", "sources"]
    assert read["overall"]["vocabularies"]["none"]["bytes_per_token"] is None
    assert read["languages"]["xx"]["vocabularies"]["one"]["relative"] is None
    assert read["languages"]["xx"]["documents"] == 1
    assert "-100.0%" in rendered(found)


# ---- real vocabularies ----


@pytest.fixture(scope="module")
def llamas(shared_data):
    pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    folder = shared_data / "tokenizers"
    return {f"llama{i}": open_vocabulary(folder / f"llama{i}_tokenizer.model") for i in (2, 3)}


def _fewer(llamas, texts: list[str]) -> tuple[int, int, float]:
    costs = compare(llamas, map(Text, texts)).overall.vocabularies
    assert costs["llama2"].lossy == costs["llama3"].lossy == 0
    return costs["llama2"].tokens, costs["llama3"].tokens, -100 * costs["llama3"].relative


def test_llama_3_takes_the_published_share_of_tokens_less(llamas, shared_data):
    """15.8% on wiki_demo and 15.6% on c4_demo, within 0.2 points.

    No BOS on either side; Llama 2's ids have the space that SentencePiece puts before each text.
    """
    wiki = lzma.decompress((shared_data / "pretrain" / "wiki_demo.txt.xz").read_bytes()).decode()
    c4 = lzma.decompress((shared_data / "pretrain" / "c4_demo.jsonl.xz").read_bytes())
    pages = [json.loads(line)["text"] for line in c4.splitlines()]
    lines = [line for line in wiki.split("\n") if line]
    assert (len(lines), len(pages)) == (30, 300)
    for texts, tokens, published in (
        (lines, (260_259, 219_518), 15.8),
        ([wiki], (260_304, 219_545), 15.8),
        (pages, (185_673, 156_926), 15.6),
        (["\n".join(pages)], (186_020, 156_928), 15.6),
    ):
        *found, percent = _fewer(llamas, texts)
        assert tuple(found) == tokens and percent == pytest.approx(published, abs=0.2)


def test_languages_that_do_not_space_their_words(shared_data):
    lines = bz2.decompress((shared_data / "multilingual" / "udhr.jsonl.bz2").read_bytes()).splitlines()
    unspaced = {"zh", "ja", "th", "lo", "km", "bo", "my", "yue", "dz"}
    kept = unspaced | {"en", "de-1996", "fi", "ko", "vi", "ru", "ar", "hi", "ml", "ta", "kl"}
    rows = map(json.loads, lines)
    texts = (Text(row["text"], row["source"], row["lang"]) for row in rows if row["lang"] in kept)
    found = compare({"one": Chunks(1)}, texts).languages
    without = {lang for lang, group in found.items() if group.vocabularies["one"].tokens_per_word is None}
    assert set(found) == kept and without == unspaced


# ---- tables and plots ----


def many(num: int, names: tuple[str, ...] = ("one", "two")) -> Comparison:
    texts = [Text("word " * (200 - i), f"source[{i % 50}]", f"l{i}" if i else "") for i in range(num)]
    return compare([(name, Chunks(1 + i % 2)) for i, name in enumerate(names)], texts)


def test_tables_fit_100_columns():
    names = ("meta-llama_Llama-3.1-8B-Instruct", "runs/2024/tokenizer[red]", *"abcdef")
    text = rendered(many(60, names))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert text.count("[red]") == 3 and "source[0]" in text and text.count("20 more are in the JSON.") == 2
    rows = [line.split() for line in lines]
    assert [row[:5] for row in rows if row[:1] == ["?"]] == [["?", "2.0%", "1.00", "2.00", "-50.0%"]] * 2
    assert ["l39"] in [row[:1] for row in rows] and ["l40"] not in [row[:1] for row in rows]


def test_the_summary_has_all_that_matters():
    text = rendered(small())
    one, two = (line.split() for line in text.splitlines() if line.startswith((" one", " two")))
    assert one[:-1] == ["one", "256", "17", "+0.0%", "1.00", "2.67", "4.25", "64.7%", "93.8%", "0"]
    assert two[:-1] == ["two", "65,792", "10", "-41.2%", "1.70", "1.67", "2.5", "70.0%", "100.0%", "0"]
    assert "Bytes per token by language" in text and "Bytes per token by source" in text

    alone = compare({"one": Chunks(1)}, [Text("one text, so nothing to break down")])
    assert len(alone.tables()) == 1 and "documents: 1;" in rendered(alone)
    assert [module._count(value) for value in (999, 1000, 12_345, 7.1e6, 2.5e12)] == [
        "999", "1.000k", "12.35k", "7.100M", "2500G",
    ]  # fmt: skip


@pytest.mark.parametrize(("kind", "head"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("PDF", b"%PDF")])
def test_plot_writes_each_kind(tmp_path, kind, head):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    path = tmp_path / f"plot.{kind}"
    plot(many(120, ("$x^2", "_hidden")), path)
    assert path.read_bytes().startswith(head)
    plot(compare({"one": Chunks(1)}, [Text("alone")]), str(path))
    assert path.read_bytes().startswith(head)


def test_plot_shows_every_name_and_language(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    path = tmp_path / "plot.svg"
    plot(many(120, (r"$\x$", "_hidden")), path)
    text = path.read_text()  # with every label as a comment
    for label in ("overall", "?", "l1", "l99", r" $\x$  1.00", " _hidden  2.00"):
        assert f"<!-- {label} -->" in text
    assert "<!-- l100 -->" not in text and "100 largest languages" in text

    plot(compare({"two": Chunks(2), "one": Chunks(1)}, TEXTS), path)
    text = path.read_text()
    places = [text.index(f"<!-- {label} -->") for label in ("overall", "zh", "en", "fr")]  # 1.8, 5/3, 1.5 bytes
    assert places == sorted(places)


def test_plot_refuses_other_kinds_and_says_what_is_missing(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"plot\.gif: no kind of plot; give a name that ends in \.png, \.svg or \.pdf"):
        plot(small(), tmp_path / "plot.gif")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"^matplotlib is not installed; run: pip install 'llamita\[plot\]'$"):
        plot(small(), tmp_path / "plot.png")


# ---- bad input ----


class Sparse(Chunks):
    """A tokenizer.json of a hundred bytes may give a token such an id."""

    def __init__(self):
        super().__init__(1)
        self.vocab_size = 4_000_000_001


@pytest.mark.parametrize(
    ("vocabularies", "texts", "message"),
    [
        ({}, TEXTS, "no vocabulary"),
        ([("a", Chunks(1)), ("b", Chunks(2)), ("a", Chunks(2))], TEXTS, "two vocabularies have the name 'a'"),
        ({"a": Chunks(1)}, [], "no text"),
        ({"a": Chunks(1)}, [Text(""), Text("")], "no text"),
        ({"a": Sparse()}, TEXTS, "a: its ids go up to 4,000,000,000"),
        ({"a": Chunks(1)}, [Text("x", str(i)) for i in range(2**16 + 1)], "more than 65,536 pairs"),
    ],
)
def test_bad_input_is_one_clear_line(vocabularies, texts, message):
    with pytest.raises(ValueError) as error:
        compare(vocabularies, texts)
    assert message in str(error.value) and "\n" not in str(error.value)

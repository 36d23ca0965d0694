"""Layer: arithmetic, hostile input, and planted items. What stands in a document is found; what does not is not."""

import bz2
import io
import json
import lzma
import random
import tarfile

import numpy as np
import pytest

from llamita.data import contamination, evals, overlap
from llamita.data.contamination import Hits, Index, Item, cut, read_items
from llamita.data.strings import Strings

WORDS = ["the", "cat", "Sat", "on", "a", "mat", "über", "ж", "10", "and"]
HOSTILE = [
    "",
    " ",
    "\n" * 50,
    "a" * 3000,
    "x," * 500,
    "猫が好き。ABC",
    "don\u2019t",
    "don't",
    "ab\u00a0cd",
    "😀 ok",
    "สวัสดี 12 z",
]
QUESTION = "Which planet of the solar system is known to have the largest number of small rocky moons"
ANSWER = "Answering this one takes a telescope, patience and a very dark night far away from town"


def plain_words(text: str) -> list[str]:
    """The twin of the kernel: character by character."""
    words, open_word = [], ""
    for char in text + " ":
        code = ord(char)
        if code < 0x80:
            kind = overlap.LETTER if char.isalnum() else overlap.PUNCTUATION
        else:
            kind = overlap._class_of.py_func(code)
        if kind == overlap.LETTER:
            open_word += char.lower() if code < 0x80 else char
            continue
        words += [open_word] if open_word else []
        words += [char] if kind == overlap.ALONE else []
        open_word = ""
    return words


def some_text(rng: random.Random, size: int) -> str:
    return "".join(rng.choice(WORDS) + rng.choice([" ", " ", ", ", "\n", "—", "。"]) for _ in range(size))


def found_in(index: Index, *texts: str) -> list[tuple[int, int]]:
    hits = index.find(Strings.of(texts))
    return list(zip(hits.document.tolist(), hits.item.tolist(), strict=True))


def test_words_are_those_of_the_plain_twin():
    rng = random.Random(0)
    texts = (
        HOSTILE
        + [some_text(rng, 30) for _ in range(50)]
        + ["".join(rng.choices("aB1 é\u2019猫ก\n,", k=40)) for _ in range(200)]
    )
    strings = Strings.of(texts)
    words, places, counts = overlap.words_of(strings.data, strings.offsets)
    expected = [word for text in texts for word in plain_words(text)]
    spelt = [strings.data[start:end].tobytes().decode() for start, end in places.tolist()]
    assert ["".join(c.lower() if c < "\x80" else c for c in word) for word in spelt] == expected
    assert counts.tolist() == [len(plain_words(text)) for text in texts]
    by_word = dict(zip(expected, words.tolist(), strict=True))
    assert [by_word[word] for word in expected] == words.tolist() and len(set(by_word.values())) == len(by_word)


def test_quotes_and_spaces_of_any_kind_do_not_matter():
    assert plain_words("don\u2019t\u00a0STOP\uff08now\uff09") == ["don", "t", "stop", "now"]
    assert plain_words("我们 ok") == ["我", "们", "ok"]


def plain_runs(doc: list[str], places: list[tuple[int, int]], item_words: list[str], table) -> set[tuple[int, ...]]:
    """All longest common runs that hold an indexed seed, by comparing every place with every other."""
    runs = set()
    for passage in range(len(table.ends) - 1):
        low, high = int(table.ends[passage]), int(table.ends[passage + 1])
        for first in range(len(doc)):
            for here in range(low, high):
                if first and here > low and doc[first - 1] == item_words[here - 1]:
                    continue
                n = 0
                while first + n < len(doc) and here + n < high and doc[first + n] == item_words[here + n]:
                    n += 1
                if any(table.marks[here + k] & overlap.SEEDS for k in range(n - overlap.SEED + 1)):
                    runs.add((passage, places[first][0], places[first + n - 1][1], here, n))
    return runs


@pytest.mark.parametrize("seed", range(4))
def test_runs_are_those_of_the_plain_twin(seed):
    rng = random.Random(seed)
    parts = [some_text(rng, 25) for _ in range(6)]
    index = Index.of([Item("s", str(i), (part,)) for i, part in enumerate(parts)])
    doc = some_text(rng, 200) + parts[2] + some_text(rng, 5) + parts[4][:70]
    strings = Strings.of(["", doc])
    runs = overlap.found_runs(strings.data, contamination._pieces(strings.offsets), index.table)
    _, places, _ = overlap.words_of(strings.data, strings.offsets)
    item_words = [word for part in parts for word in plain_words(part)]
    expected = plain_runs(plain_words(doc), places.tolist(), item_words, index.table)
    assert {tuple(run[1:]) for run in runs.tolist()} == expected and len(expected) >= 2
    assert set(runs[:, 0].tolist()) == {1}


def test_coverage_is_the_share_of_words_in_common_runs():
    words = [f"word{chr(97 + i)}" for i in range(20)]
    index = Index.of([Item("s", "1", (" ".join(words),))], coverage=0.5)
    changed = [*words[:5], "other", *words[6:10], "another", *words[11:]]  # a run of 4 between: too short
    hits = index.find(Strings.of(["before it. " + " ".join(changed) + " and after"]))
    assert hits.coverage.tolist() == [np.float32(14 / 20)] and hits.start.tolist() == [11]
    assert hits.end.tolist() == [11 + len(" ".join(changed))]
    assert found_in(Index.of([Item("s", "1", (" ".join(words),))], coverage=0.71), " ".join(changed)) == []


def test_pieces_that_lie_far_apart_are_not_put_together():
    words = [f"word{chr(97 + i)}" for i in range(20)]
    index = Index.of([Item("s", "1", (" ".join(words),))])
    halves = " ".join(words[:10]), " ".join(words[10:])
    assert found_in(index, " and so ".join(halves)) == [(0, 0)]
    assert found_in(index, " and so on for long ".join([halves[1], halves[0]])) == [(0, 0)]
    assert found_in(index, ("and so on for long " * 30).join(halves)) == []


def test_the_place_is_that_of_the_item_and_not_of_a_few_of_its_words_before():
    index = Index.of([Item("s", "1", (QUESTION,))])
    doc = f"Which planet of the solar system?\n{QUESTION}\nWhich planet of the solar system?"
    hits = index.find(Strings.of([doc]))
    assert doc[hits.start[0] : hits.end[0]] == QUESTION


def test_every_place_is_found_also_across_pieces_of_a_long_document(monkeypatch):
    monkeypatch.setattr(contamination, "PIECE_BYTES", 1000)
    monkeypatch.setattr(contamination, "OVERLAP", 300)
    index = Index.of([Item("s", "1", (QUESTION, ANSWER))])
    filler = "nothing of interest happens in this sentence. "
    for shift in (0, 9, 17, 20):
        doc = filler * shift + QUESTION + "\n" + filler * 40 + QUESTION.upper() + "?\n" + filler * shift
        hits = index.find(Strings.of(["", doc, filler]))
        texts = [doc[start:end] for start, end in zip(hits.start.tolist(), hits.end.tolist(), strict=True)]
        assert texts == [QUESTION, QUESTION.upper()] and hits.document.tolist() == [1, 1]


def test_templates_and_rows_of_numbers_are_no_evidence():
    template = "Choose the best of the following answers and explain your choice in a few words"
    items = [
        Item("s", str(i), (template, f"{QUESTION} number {i} {chr(97 + i) * 5} {chr(98 + i) * 4}")) for i in range(3)
    ]
    assert found_in(Index.of(items[:3]), template) != []
    many = [Item("s", str(i), (template,)) for i in range(11)]
    index = Index.of([*many, Item("s", "n", ("1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, True, True, True",))])
    assert found_in(index, template, "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, True, True, True") == []
    assert set(index.untestable.values()) == {"too common"} and len(index.untestable) == 12


def test_the_report_names_what_was_found_and_what_could_not_be_looked_for():
    items = [
        Item("sums", "1", ("3+5=", "8")),
        Item("quiz", "1", (QUESTION, ANSWER)),
        Item("quiz", "2", (ANSWER[::-1],)),
    ]
    index = Index.of(items)
    strings = Strings.of(["no", f"see\n{QUESTION}\n{ANSWER}", QUESTION.replace("small", "tiny")])
    rows = index.rows(strings, index.find(strings), ["d0", "d1", "d2"])
    report = json.loads(json.dumps(index.report(rows[::-1])))
    assert report["sets"]["sums"] == {"items": 1, "found": 0, "too short": ["1"], "too common": []}
    assert (report["sets"]["quiz"]["items"], report["sets"]["quiz"]["found"]) == (2, 1)
    assert report["items"] == [
        {"set": "quiz", "id": "1", "documents": 2, "coverage": 1.0, "names": ["d1", "d2"], "excerpt": QUESTION}
    ]
    assert report == json.loads(json.dumps(index.report(rows)))


def test_short_parts_are_joined_until_they_can_be_told_from_chance():
    index = Index.of([Item("s", "1", ("What is the capital of", "Old Burgundy", "Dijon of course", "Beaune"))])
    assert index.untestable == {} and len(index.owners) == 1
    assert found_in(index, "What is the capital of old Burgundy? Dijon, of course! Beaune") == [(0, 0)]
    assert found_in(index, "What is the capital of") == []


def test_cut_takes_whole_lines_and_nothing_else():
    def hits(*spans):
        document, start, end = np.array(spans).T
        return Hits(document, document, np.ones(len(spans), np.float32), start, end)

    strings = Strings.of(["one\ntwo three\nfour\nfive", "alone", "keep"])
    assert cut(strings, hits((0, 5, 7), (1, 1, 3))).texts() == ["one\nfour\nfive", "", "keep"]
    assert cut(strings, hits((0, 5, 15), (0, 4, 7), (0, 14, 18))).texts()[0] == "one\nfive"
    assert cut(strings, hits((0, 4, 18), (0, 5, 7))).texts()[0] == "one\nfive"
    assert cut(strings, hits((0, 19, 23))).texts()[0] == "one\ntwo three\nfour\n"


def test_an_index_is_saved_and_loaded_without_pickles(tmp_path):
    index = Index.of([Item("s/ä", "1", (QUESTION,)), Item("s/ä", "2", ("short",))])
    index.save(tmp_path / "index.npz")
    again = Index.load(tmp_path / "index.npz")
    assert (
        (again.items, again.untestable)
        == (index.items, index.untestable)
        == ((("s/ä", "1"), ("s/ä", "2")), {1: "too short"})
    )
    assert found_in(again, "x " + QUESTION) == found_in(index, "x " + QUESTION) == [(0, 0)]
    np.savez(tmp_path / "bad.npz", names=np.array([object()]), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        Index.load(tmp_path / "bad.npz")


def test_hostile_documents_and_empty_batches():
    index = Index.of([Item("s", "1", (" ".join(WORDS * 4), "a " * 600)), Item("s", "2", ()), Item("s", "3", ("",))])
    assert found_in(index) == [] and found_in(index, *HOSTILE, "a " * 100_000) == []
    assert found_in(Index.of([]), QUESTION) == [] and found_in(Index.of([Item("s", "1", ("few",))]), QUESTION) == []
    assert len(index.table.places) == len(WORDS)  # a seed is looked up once a passage, however often it stands there
    repeated = " ".join(WORDS * 4) + "\n"
    assert set(found_in(index, repeated * 500)) == {(0, 0)}


def test_items_come_from_every_kind_of_file(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"q": "one", "n": 3, "c": ["two", {"deep": "three"}], "url": "http://x.y/z"}\n\n"x"\n'
    )
    (tmp_path / "b.json").write_text(json.dumps({"k1": {"q": "b"}, "k2": "c\ud800"}))
    (tmp_path / "c.csv.xz").write_bytes(lzma.compress(b'"multi\nline",2\n'))
    (tmp_path / "d.tsv.bz2").write_bytes(bz2.compress(b"x\ty\n"))
    (tmp_path / "e.txt").write_text("first\nsecond\n")
    (tmp_path / "f.txt").write_text("first\nstill\n\nsecond\n")
    (tmp_path / "README.md").write_text("no item")
    (tmp_path / ".hidden.txt").write_text("no item")
    with tarfile.open(tmp_path / "g.tar.bz2", "w:bz2") as archive:
        for name, data in (("../../out.csv", b"in,tar\n"), ("x/README", b"no"), ("x/.h.csv", b"no")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    found = [(item.set.removeprefix(tmp_path.name + "/"), item.id, item.parts) for item in read_items([tmp_path])]
    assert found == [
        ("a.jsonl", "1", ("one", "two", "three")), ("a.jsonl", "2", ("x",)),
        ("b.json", "1", ("b",)), ("b.json", "2", ("c\ud800",)),
        ("c.csv", "1", ("multi\nline", "2")), ("d.tsv", "1", ("x", "y")),
        ("e.txt", "1", ("first",)), ("e.txt", "2", ("second",)), ("e.txt", "3", ("",)),
        ("f.txt", "1", ("first\nstill",)), ("f.txt", "2", ("second\n",)),
        ("g.tar.bz2/../../out.csv", "1", ("in", "tar")),
    ]  # fmt: skip
    assert len(Index.of(read_items([tmp_path])).untestable) == len(found)


@pytest.mark.parametrize(
    "name, data",
    [
        ("a.jsonl", b"{broken"),
        ("b.json", b"[" * 100_000),
        ("c.csv", b'"' + b"x" * 200_000),
        ("d.txt", b"\xff\xfe"),
        ("e.parquet", b"PAR1"),
        ("f.txt.xz", b"no xz"),
        ("g.tar", b"no tar" * 200),
        ("h.txt.gz", b"\x1f\x8b\x08"),
        ("large.txt", b"x" * 5000),
    ],
)
def test_an_evaluation_file_that_cannot_be_read_is_named(tmp_path, monkeypatch, name, data):
    monkeypatch.setattr(evals, "FILE_BYTES", 250_000 if name != "large.txt" else 4000)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=name):
        read_items([tmp_path])


def test_an_item_is_bounded_and_no_items_at_all_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(evals, "ITEM_CHARS", 10)
    (tmp_path / "a.jsonl").write_text(json.dumps(["abcdef", "abcdef", "abcdef"]))
    assert read_items([tmp_path])[0].parts == ("abcdef", "abcd")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no evaluation items"):
        read_items([tmp_path / "empty"])


def lightly_edited(text: str, kind: int, rng: random.Random) -> str:
    words = text.split(" ")
    if kind == 0:
        return text.upper()
    if kind == 1:
        return "\n".join(words).replace(",", "").replace(".", " ... ").replace("'", "\u2019")
    for i in rng.sample(range(len(words)), max(len(words) // 20, 1)):
        words[i] = words[i][1:] + words[i][:1] if kind == 2 else rng.choice(["river", "seven", ""])
    return " ".join(words)


def test_fifty_items_hidden_in_novels_are_all_found_and_nothing_else_is(shared_data):
    rng, names = random.Random(3), ["gsm8k_test.jsonl.xz", "HumanEval.jsonl.xz", "lambada_openai.jsonl.xz",
                                    "arc_challenge.jsonl.xz", "mmlu.tar.bz2"]  # fmt: skip
    items = read_items([shared_data / "eval" / name for name in names])
    index = Index.of(items)
    long = [i for i, item in enumerate(items) if i not in index.untestable and len(" ".join(item.parts).split()) >= 20]
    chosen = rng.sample(long, 50)
    with lzma.open(shared_data / "pretrain" / "fairytales_en.jsonl.xz", "rt") as file:
        tales = [json.loads(line)["text"] for line in file]
    assert found_in(index, *tales) == []
    docs = []
    for n, number in enumerate(chosen):
        text = "\n".join(items[number].parts)
        docs.append(
            tales[n][:700] + "\n" + (lightly_edited(text, n // 2 % 4, rng) if n % 2 else text) + "\n" + tales[n][700:]
        )
    strings = Strings.of(docs)
    hits = index.find(strings)
    found = set(zip(hits.document.tolist(), hits.item.tolist(), strict=True))
    assert [number for n, number in enumerate(chosen) if (n, number) not in found] == []
    # Other items may share a passage with the one hidden, but nothing of the tale around it is flagged.
    planted = [(len(tales[n][:700].encode()), len(tales[n][700:].encode())) for n in range(50)]
    before, after = np.array(planted)[hits.document].T
    assert (hits.start > before).all() and (hits.end < strings.sizes[hits.document] - after).all()
    assert found_in(index, *cut(strings, hits).texts()) == []

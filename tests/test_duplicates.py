"""Layer: arithmetic beside slow twins. Hashes, signatures, pairs, clusters, lines and spans."""

import random

import numpy as np
import pytest

from llamita.data import duplicates, lines, minhash, substrings
from llamita.data.strings import Strings

WORDS = ("the quick brown fox jumps over a lazy dog While It Sings of Ärger und 日本 Привет 42 don't stop").split()


def some_texts(count=60, seed=0):
    rng = random.Random(seed)
    joins = (" ", "\n", ", ", "  ", "-", "\n\n")
    return ["".join(rng.choice(WORDS) + rng.choice(joins) for _ in range(rng.randrange(0, 80))) for _ in range(count)]


HOSTILE = ["", " ", "\n\n\n", "x", "a" * 10_000, "日本語" * 50, "Ω é ü", "a b c d", "a b c d e", "\u00a0\u3000"]
HOSTILE += ["\U0001f600 smile", "\u201e\u2026\u2014", "e\u0301\u0301", "क्ष त्र"]


def jaccard(a, b):
    a, b = minhash.shingles(a), minhash.shingles(b)
    return len(a & b) / len(a | b) if a | b else 0.0


def test_sketches_are_exact_for_short_documents():
    texts = some_texts() + HOSTILE
    _, sketches = minhash.signed(Strings.of(texts))
    numbers = np.random.default_rng(0).integers(0, len(texts), (500, 2))
    found = minhash.similarity(sketches[numbers[:, 0]], sketches[numbers[:, 1]])
    assert found == pytest.approx([jaccard(texts[a], texts[b]) for a, b in numbers.tolist()])
    assert len({len(minhash.shingles(text)) for text in texts}) > 30 and np.mean((found > 0) & (found < 1)) > 0


def test_what_a_document_repeats_counts_once():
    text = " ".join(map(str, range(400))) + " "
    (a, b), (once, often) = minhash.signed(Strings.of([text * 2, text * 60]))
    assert (a == b).all() and (once == often).all() and (often != minhash.EMPTY).all()


def test_signatures_and_sketches_of_long_documents_estimate_jaccard():
    rng = random.Random(1)
    base = [str(rng.randrange(10_000)) for _ in range(3000)]
    texts = [" ".join(str(rng.randrange(10_000)) if rng.random() < rate else word for word in base)
             for rate in (0.0, 0.005, 0.02, 0.05, 0.1, 0.3)]  # fmt: skip
    signatures, sketches = zip(*(minhash.signed(Strings.of(texts), seed) for seed in range(20)), strict=True)
    truth = np.array([jaccard(texts[0], text) for text in texts])
    by_hash = np.mean([(one[0] == one).mean(axis=1) for one in signatures], axis=0)
    assert np.abs(by_hash - truth).max() < 0.03 and len(np.unique(np.round(truth, 1))) >= 4
    by_sketch = minhash.similarity(sketches[0][[0] * 6], sketches[0])
    assert np.abs(by_sketch - truth).max() < 0.1


def test_numbers_are_sorted_by_their_bytes():
    draw = np.random.default_rng(0)
    for size, most in ((0, 1), (1, 2**32), (7, 3), (700, 2**32), (5000, 2**20)):
        numbers = draw.integers(0, most, size, np.uint32)
        assert np.array_equal(minhash._sorted(np.stack([numbers, numbers])), np.sort(numbers))


def test_words_are_folded_in_ascii_and_characters_without_blanks_stand_alone():
    assert minhash.shingles("A b, C Ä") == {("a", "b", "c", "Ä")}
    assert minhash.shingles("a b c d e f") == {tuple("abcde"), tuple("bcdef")}
    assert minhash.shingles("日本") == {("日", "本")} and minhash.shingles("नमस्ते दुनिया") == {("नमस्ते", "दुनिया")}
    a, b, c = minhash.signed(Strings.of(["One TWO three four five six", "one two, three four-five SIX!", "one two"]))[0]
    assert (a == b).all() and (a != c).any()


def test_editions_that_set_quotes_and_dashes_otherwise_are_alike():
    plain, typeset = '"Well," he said - "no!" 漢字, 仮名', "\u201cWell\u201d, he said\u2014«no»! 漢字\u3001仮名"
    signatures, _ = minhash.signed(Strings.of([plain, typeset, plain.replace("said", "saith")]))
    assert (signatures[0] == signatures[1]).all() and (signatures[0] != signatures[2]).any()


def test_words_of_any_characters_are_those_of_the_slow_twin():
    rng = random.Random(3)
    codes = [*range(1, 0x250), *range(0x900, 0x980), *range(0x2000, 0x2070), *range(0x3000, 0x3100), 0xAC00, 0xFF0C]
    codes += [0x10400, 0x1D400, 0x1F600, 0x20000, 0x300, 0xE01, 0x1000, 0x10D0, 0xE000, 0xFFFD]
    texts = ["".join(chr(rng.choice(codes)) for _ in range(rng.randrange(1, 30))) for _ in range(2000)]
    _, sketches = minhash.signed(Strings.of(texts))
    assert (sketches != minhash.EMPTY).sum(axis=1).tolist() == [len(minhash.shingles(text)) for text in texts]
    cut = ["".join(minhash._Apart()[ord(char)] for char in text) for text in texts]
    assert (minhash.signed(Strings.of(cut))[1] == sketches).all()


def test_texts_without_words_are_like_nothing():
    signatures, sketches = minhash.signed(Strings.of(["", " \n", "?!", "word"]))
    assert (minhash.bands(signatures)[:3] == 0).all() and (minhash.bands(signatures)[3] != 0).all()
    assert minhash.similarity(sketches[:3], sketches[:3]).tolist() == [0, 0, 0]


def test_recall_of_the_bands_is_that_of_theory():
    rng, hits, theory = np.random.default_rng(0), [], []
    for number in range(400):
        share = rng.uniform(0.6, 0.95)
        common = [f"c{number}w{i}" for i in range(200)]
        own = [[f"{side}{number}w{i}" for i in range(int(200 * (1 / share - 1) / 2))] for side in "ab"]
        texts = [" . ".join(" ".join([word] * 5) for word in common + mine) for mine in own]
        similarity = jaccard(*texts)
        banded = minhash.bands(minhash.signed(Strings.of(texts), seed=number)[0])
        hits.append(bool((banded[0] == banded[1]).any()))
        theory.append(float(minhash.recall(similarity)))
    assert np.mean(hits) == pytest.approx(np.mean(theory), abs=0.04) and 0.2 < np.mean(theory) < 0.95


def test_pairs_are_those_of_equal_hashes():
    hashes = np.random.default_rng(0).integers(0, 40, 100, dtype=np.uint64)
    found = duplicates.same(hashes)
    first = {}
    slow = [(first[value], i) for i, value in enumerate(hashes.tolist()) if first.setdefault(value, i) != i]
    assert sorted(map(tuple, found.tolist())) == sorted(slow) and len(slow) > 20
    assert duplicates.same(np.empty(0, np.uint64)).shape == (0, 2)


def test_a_star_whose_centre_is_a_stranger_still_finds_its_members():
    alike = "one two three four five six seven eight nine ten eleven twelve"
    texts = ["something else altogether that shares no words with them", alike, alike + " x", alike + " x y"]
    _, sketches = minhash.signed(Strings.of(texts))
    edges = duplicates.same(np.full(4, 7, np.uint64))
    assert edges.tolist() == [[0, 1], [0, 2], [0, 3]]
    found, similarity = duplicates.verified(edges, sketches, 0.75)
    assert sorted(map(tuple, found.tolist())) == [(1, 2), (1, 3)] and (similarity >= 0.75).all()
    assert len(duplicates.verified(edges, sketches, 1.0)[0]) == 0


def test_clusters_are_those_of_a_slow_union():
    edges = np.random.default_rng(1).integers(0, 200, (120, 2))
    root = list(range(200))
    for a, b in edges.tolist():
        old, new = sorted((root[a], root[b]))[::-1]
        root = [new if value == old else value for value in root]
    assert duplicates.clusters(200, edges).tolist() == root and len(set(root)) < 120


def test_which_of_a_cluster_stays():
    root = np.array([0, 0, 0, 3, 3, 5])
    sizes, dates = np.array([1, 5, 5, 2, 2, 9]), np.array([20200101, 20190101, 20230101, 0, 0, 0])
    alive = np.array([True, True, True, False, True, True])
    stays = {policy: np.flatnonzero(duplicates.keep(root, policy, sizes, dates, alive)).tolist()
             for policy in ("first", "longest", "newest")}  # fmt: skip
    assert stays == {"first": [0, 4, 5], "longest": [1, 4, 5], "newest": [2, 4, 5]}


@pytest.mark.parametrize(
    ("url", "same_as"),
    [
        ("https://www.Example.com/a/?utm_source=x&b=2&a=1#top", "http://example.com/a?a=1&b=2"),
        ("http://example.com:80/a/", "https://example.com/a"),
        ("example.com/a?fbclid=7&PHPSESSID=1", "http://example.com/a"),
        ("https://example.com/#!/page1", "http://www.example.com#!/page1"),
    ],
)
def test_addresses_of_one_page(url, same_as):
    others = ["http://example.com/b", "http://example.com:8080/a", "http://example.com/a?ref=7", "http://example.com/A"]
    others += ["http://example.com/#!/page2", "http://example.com/"]
    found = duplicates.url_hashes([url, same_as, *others, ""])
    assert found[0] == found[1] and len(set(found.tolist())) == 8 and found[-1] == 0
    assert duplicates.normalized("http://[broken") == "http://[broken"


def test_scopes_keep_equal_hashes_apart():
    hashes, scopes = np.array([5, 5, 5, 9], np.uint64), duplicates.name_hashes(["a", "b", "a", "a"])
    assert duplicates.same(duplicates.scoped(hashes, scopes)).tolist() == [[0, 2]]
    assert (duplicates.scoped(hashes, duplicates.name_hashes([""] * 4)) == hashes).all()


def slow_lines(text):
    found = []
    for line in text.split("\n"):
        line = line.encode().strip(bytes(range(33)))
        folded = bytes(byte + 32 if 65 <= byte <= 90 else 48 if 48 <= byte <= 57 else byte for byte in line)
        if folded:
            found.append(folded)
    return found


def test_lines_are_counted_and_cut_as_the_slow_twin_does():
    texts = (
        [f"Menu {i % 3}\n  own line {'x' * i}\n\nshare THIS\nend" for i in range(20)]
        + HOSTILE
        + ["six"] * 6
        + ["share this"]
    )
    strings = Strings.of(texts)
    hashed = lines.hashes(strings)
    plain = [line for text in texts for line in slow_lines(text)]
    assert len(hashed) == len(plain) and len(set(hashed.tolist())) == len(set(plain))
    halves = np.array_split(hashed, 2)
    often = lines.frequent(halves, 6)
    wanted = {line for line in plain if plain.count(line) > 6}
    assert set(often.tolist()) == {h for h, line in zip(hashed.tolist(), plain, strict=True) if line in wanted}
    assert wanted == {b"menu 0", b"share this", b"end"} and (np.diff(often.astype(object)) > 0).all()
    cut = lines.without(strings, often).texts()
    assert cut[4] == "  own line xxxx\n\n" and cut[20:-1] == [*HOSTILE, *["six"] * 6] and cut[-1] == ""
    assert lines.without(strings, lines.frequent([hashed], 10**6)).texts() == texts


def slow_spans(texts, least):
    seen, gone = set(), []
    for text in map(str.encode, texts):
        marks = [False] * len(text)
        for i in range(len(text) - least + 1):
            span = text[i : i + least]
            if span in seen:
                marks[i : i + least] = [True] * least
            seen.add(span)
        kept = bytearray()
        for i in range(len(text)):
            start = i
            while text[start] & 0xC0 == 0x80:
                start -= 1
            end = i + 1
            while end < len(text) and text[end] & 0xC0 == 0x80:
                end += 1
            if not all(marks[start:end]):
                kept.append(text[i])
        gone.append(bytes(kept).decode())
    return gone


def test_spans_are_cut_as_the_slow_twin_does():
    rng = random.Random(0)
    for _ in range(150):
        sizes = [rng.randrange(0, 40) for _ in range(rng.randrange(0, 5))]
        texts = ["".join(rng.choice("abéêĩ日") for _ in range(size)) for size in sizes]
        least = rng.randrange(2, 8)
        assert substrings.without_repeated(Strings.of(texts), least).texts() == slow_spans(texts, least)


def test_large_buckets_are_cut_in_halves(monkeypatch):
    texts = [f"{i} the same long sentence everywhere {i}" for i in range(8)]
    whole = substrings.without_repeated(Strings.of(texts), 20).texts()
    monkeypatch.setattr(substrings, "MAX_BYTES", 200)
    halves = substrings.without_repeated(Strings.of(texts), 20).texts()
    assert whole[0] == halves[0] == texts[0] and halves[4] == texts[4] != whole[4] and halves[1] == whole[1]

"""Layer: parity with tiktoken, of what encodes corpora; mutants of its engine must be noticed."""

import bz2
import itertools
import json
import random
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamita.tokenizer import Tokenizer, bulk, emit
from llamita.tokenizer.llama3 import LONGEST_BLANK, PATTERN, SPECIALS

PROPERTY = settings(deadline=None, database=None)
SOURCE = Path(__file__).read_text(encoding="utf-8")
TORTURE = [
    "",
    *bulk._TRIAL,
    "https://example.org/a?b=c&d=%20#e C:\\dir\\file \u20ac5 @user #tag",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u05e2\u05d1\u05e8\u05d9\u05ea \u200f\u200e\u1797\u17b6\u179f\u17b6",
    "\ud83d\ude00 a pair, \ud83d one alone, \udc00\ud83d the wrong way round",
    "a's\u088f'S \u0c5c's \U00011de0123 \U000323b0'S",  # letters and a digit of Unicode 17
    "\U0010ffff\U000f0000\ue000",
    "<|eot_id", "|>", "< |eot_id| >", "".join(SPECIALS[:12]),
    "-" * 100_000 + "z" * 100_000,
    "",
]  # fmt: skip


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    """Bytes in disorder among tokens that merges reach and others that none reaches."""
    rng, data = random.Random(0), SOURCE.encode()
    cuts = ((rng.randrange(len(data)), rng.choice((2, 2, 2, 3, 3, 4, 5, 9, 20))) for _ in range(1500))
    made = {data[start : start + size] for start, size in cuts} | {b"'S", b"12", b"123", b"1234", b" qwertz"}
    tokens = sorted({bytes([byte]) for byte in range(256)} | made)
    rng.shuffle(tokens)
    return Tokenizer(tokens)


@pytest.fixture(scope="module")
def fast(small) -> bulk.Bulk:
    pytest.importorskip("gigatoken")
    return bulk.Bulk(small)


@pytest.fixture(scope="module")
def llama3(shared_data) -> Tokenizer:
    return Tokenizer.load(shared_data / "tokenizers" / "llama3_tokenizer.model")


def differing(encoder, texts) -> list[str]:
    """The texts whose ids are not `Tokenizer.encode`'s; shapes, types and sums are checked by the way."""
    ids, lengths = encoder.encode(texts)
    assert (ids.dtype, lengths.dtype, lengths.shape) == (np.uint32, np.int64, (len(texts),))
    assert lengths.sum() == len(ids)
    rows = np.split(ids, np.cumsum(lengths)[:-1]) if texts else []
    return [t for t, row in zip(texts, rows, strict=True) if row.tolist() != encoder.tokenizer.encode(t)]


# ---- the same ids ----


def test_torture(fast):
    assert (fast.engine, fast.why) == ("gigatoken", "")
    assert differing(fast, TORTURE) == []
    assert differing(fast, []) == differing(fast, [""]) == []


ATOMS = st.one_of(
    st.text(st.characters(), max_size=6),
    st.text(st.characters(categories=["Zs", "Zl", "Zp", "Cc", "Nd", "Nl", "No", "Mn"]), max_size=6),
    st.sampled_from(["'s", "'S", "'\u017f", "'ll", "'Re", "\r\n", "  ", " 1234", " the", "\U0001f1e9", *SPECIALS[:3]]),
)  # fmt: skip


@PROPERTY
@given(st.lists(st.lists(ATOMS, max_size=8).map("".join), max_size=5))
def test_any_text(fast, texts):
    assert differing(fast, texts) == []


def test_every_code_point_between_letters_digits_and_blanks(fast):
    chars = [*map(chr, range(0xD800)), *map(chr, range(0xE000, 0x40000)), *map(chr, range(0xE0000, 0xE0200))]
    words = [f"a{c}b {c}'S1{c}2  {c}{c}\n" for c in chars]
    texts = ["".join(words[i : i + 64]) for i in range(0, len(words), 64)]
    assert differing(fast, texts) == []


def test_what_gigatoken_splits_otherwise_goes_to_tiktoken(fast):
    """Negative control: gigatoken 0.10.0 itself has Unicode 17's letters, tiktoken 0.14.0 has Unicode 16's."""
    newer = "a's\u088f'S"
    assert bulk._by_gigatoken(fast._fast, [newer])[0].tolist() != fast.tokenizer.encode(newer)
    assert fast._is_strange(newer) and fast._is_strange("\ud83d") and not fast._is_strange("caf\u00e9")


def test_another_split_shows_in_the_characters_it_concerns():
    """Mutant: a split that counts marks among the letters."""
    gigatoken = pytest.importorskip("gigatoken")
    marks_are_letters = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
        r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )

    def from_json(data):
        document = json.loads(data)
        document["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = marks_are_letters
        return gigatoken.Tokenizer.from_json(json.dumps(document))

    strange = bulk._strangers(from_json)
    assert [bool(strange[ord(char)]) for char in "\u0301\u093e\u20e3\u00e9\u0663\u3000'~"] == [True] * 3 + [False] * 5


def test_strangers_that_are_known_are_those_of_a_fresh_trial():
    gigatoken = pytest.importorskip("gigatoken")
    spans = bulk._FOUND[version("gigatoken"), version("tiktoken")]
    found = bulk._strangers(gigatoken.Tokenizer.from_json)
    assert np.array_equal(bulk._known_strangers(spans), found)
    assert not np.array_equal(bulk._known_strangers(spans.removeprefix("88f ")), found), "negative control"


def test_a_saved_file_makes_the_same_engine(small):
    whole = emit.tokenizer_json(small)
    saved = json.dumps(whole, ensure_ascii=False).encode()
    assert bulk._saved_engine_json(saved) == bulk._engine_json(whole)
    pytest.importorskip("gigatoken")
    assert differing(bulk.Bulk(small, saved), TORTURE) == []


def test_one_core(small):
    pytest.importorskip("gigatoken")
    encoder = bulk.Bulk(small, all_cores=False)
    assert (encoder.engine, encoder.why) == ("gigatoken", "")
    assert differing(encoder, TORTURE) == differing(encoder, []) == differing(encoder, [""]) == []


def test_more_blanks_than_tiktoken_bears(fast):
    beyond = "word" + " " * (LONGEST_BLANK + 5) + "word"
    assert differing(fast, ["before", beyond, "after"]) == []
    assert bulk._by_gigatoken(fast._fast, [beyond])[0].tolist() != fast.tokenizer.encode(beyond)


def test_real_text(llama3, shared_data):
    pytest.importorskip("gigatoken")
    lines = bz2.decompress((shared_data / "multilingual" / "langid_sentences.jsonl.bz2").read_bytes()).splitlines()
    texts = [*(json.loads(line)["text"] for line in lines[::8]), SOURCE, *TORTURE]
    encoder = bulk.Bulk(llama3)
    assert (len(texts) > 6000, encoder.engine, encoder.why) == (True, "gigatoken", "")
    assert differing(encoder, texts) == []


# ---- bounded memory ----


@pytest.mark.parametrize("bound", [None, "bytes", "tokens"])
def test_renewal(fast, monkeypatch, bound):
    """By the memory that calls leave behind, or by tokens where the system tells no memory."""
    grows = itertools.count(1, 2**20)
    monkeypatch.setattr(bulk, "_resident", lambda: 0 if bound == "tokens" else next(grows))
    if bound:
        monkeypatch.setattr(bulk, f"KEPT_{bound.upper()}", {"bytes": 2**19, "tokens": 100}[bound])
    fast._renew()
    before, from_json = [], fast._from_json
    monkeypatch.setattr(fast, "_from_json", lambda data: before.append(fast._fast) or from_json(data))
    for _ in range(3):
        assert differing(fast, [SOURCE[:400], "", SOURCE[400:480], "\ud83d", SOURCE[480:510]]) == []
    assert (len(before) > 1) == bool(bound)
    assert set(before) <= {None}, "two engines at a time"


def test_slices():
    texts = ["", "a" * 60, "b" * 30, "c" * 20, "d" * 500, "", "e"]
    assert list(bulk._slices(texts, 100)) == [texts[:3], texts[3:4], texts[4:5], texts[5:]]
    assert list(bulk._slices([], 100)) == [[]]


# ---- without gigatoken, and with one that errs ----


def test_without_gigatoken(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    encoder = bulk.Bulk(small)
    assert encoder.engine == "tiktoken" and "llamita[fast]" in encoder.why
    assert differing(encoder, TORTURE) == [] and differing(encoder, []) == []


class Panic(BaseException):
    """What a panic in Rust looks like from Python."""


def _with_specials(document):
    return document


def _single_digits(document):
    document["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = PATTERN.replace("{1,3}", "")
    return {**document, "added_tokens": []}


def _whole_words_unknown(document):
    document["model"]["ignore_merges"] = False
    return {**document, "added_tokens": []}


def _two_ids_swapped(document):
    vocab = document["model"]["vocab"]
    vocab["\u0120qwertz"], vocab["123"] = vocab["123"], vocab["\u0120qwertz"]
    return {**document, "added_tokens": []}


@pytest.mark.parametrize("mutant", [_with_specials, _single_digits, _whole_words_unknown, _two_ids_swapped])
def test_a_wrong_engine_is_noticed(small, monkeypatch, mutant):
    pytest.importorskip("gigatoken")
    right, of_small = bulk._engine_json, emit.tokenizer_json(small)

    def wrong(whole):
        return json.dumps(mutant(whole)).encode() if whole == of_small else right(whole)

    monkeypatch.setattr(bulk, "_engine_json", wrong)
    encoder = bulk.Bulk(small)
    assert encoder.engine == "tiktoken" and "gives other ids" in encoder.why
    assert differing(encoder, TORTURE[:12]) == []


def test_an_engine_that_panics_is_noticed(small, monkeypatch):
    gigatoken = pytest.importorskip("gigatoken")

    def panic(data):
        raise Panic("index out of bounds")

    monkeypatch.setattr(gigatoken.Tokenizer, "from_json", panic)
    encoder = bulk.Bulk(small)
    assert encoder.engine == "tiktoken" and "Panic('index out of bounds')" in encoder.why
    assert differing(encoder, TORTURE[:12]) == []


def test_an_engine_that_splits_ascii_otherwise_is_noticed(small, monkeypatch):
    pytest.importorskip("gigatoken")
    monkeypatch.setattr(bulk, "_FOUND", {})  # as for versions that were not tried: the trial is made
    monkeypatch.setattr(bulk, "_strangers", lambda from_json: np.arange(0x110000) == ord("~"))
    assert "ASCII" in bulk.Bulk(small).why


def test_ids_alone_tell_every_text_with_a_stranger(fast):
    """The tokens under suspicion miss no stranger, whatever stands around it; and few texts are suspected in vain."""
    strangers = [code for code in np.flatnonzero(fast._strange) if not 0xD800 <= code < 0xE000]
    sample = [*strangers[:5000:3], *strangers[5000::997]]
    texts = [
        f"{before}{chr(code)}{after}" for code in sample for before, after in (("", ""), (" a", "b"), ("\u4e2d", "1"))
    ]
    ids, lengths = bulk._by_gigatoken(fast._fast, texts)
    assert len(fast._for_tiktoken(texts, ids, lengths)) == len(texts) > 1000
    none = np.zeros_like(fast._suspect)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast, "_suspect", none)
        assert differing(fast, ["a's\u088f'S"]) != [], "negative control: without suspicion the wrong ids come through"


def test_resident_memory_is_this_processes():
    before = bulk._resident()
    block = np.ones(2**27, np.uint8)  # more than malloc ever takes from what was freed
    assert before > 0 and 2**26 < bulk._resident() - before < 2**28 and block.all()


@pytest.mark.slow
def test_memory_stays_bounded(fast):
    """Twelve million random words, each new: 470 MB would be kept without renewal."""
    draw = np.random.default_rng(0)
    before, renewed, renew = bulk._resident(), [], fast._renew
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast, "_renew", lambda: renewed.append(1) or renew())
        for _ in range(12):
            letters = draw.integers(97, 123, (10**6, 6), np.uint8)
            letters[:, 5] = 32
            fast.encode([letters.tobytes().decode()])
    assert renewed and bulk._resident() - before < 2**29

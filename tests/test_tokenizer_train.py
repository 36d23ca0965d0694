"""Training a vocabulary: each compiled part against its plain twin, then bounds, kills and weights."""

import bz2
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import regex
import rustbpe
from hypothesis import given, settings
from hypothesis import strategies as st

from llamita.tokenizer import tally as tally_module
from llamita.tokenizer.count import MAX_WORD_BYTES, Run, Table, Words, padded
from llamita.tokenizer.llama3 import PATTERN
from llamita.tokenizer.merge import Learner, memory
from llamita.tokenizer.split import LETTER, NUMBER, classes, split, split_by_pattern
from llamita.tokenizer.tally import Tally, Text, pieces
from llamita.tokenizer.train import (
    LEAST_MEMORY,
    Weights,
    at_least,
    enough,
    gather,
    in_ranges,
    joined,
    tokens_of,
    train,
    train_within,
    weighted,
)
from llamita.tokenizer.vocabulary import well_formed
from tests.test_tokenizer import SOURCE, TORTURE

PROPERTY = settings(deadline=None, database=None)
TRICKY = (
    " \t\n\r\x0b\x85\u2028\u3000'sStTrReEvVlLmMdD\u017fa\xe9\u4e2d1\u0663\u2167\xbd.,!-(\U0001f600\u0301\u200dK\u212a"
)
MIB = 2**20


def words_of(texts) -> Counter[bytes]:
    """The plain twin of counting: PATTERN, and slices of words that are too long."""
    found: Counter[bytes] = Counter()
    for text in texts:
        for word in split_by_pattern(well_formed(text)):
            data = word.encode()
            found.update(data[i : i + MAX_WORD_BYTES] for i in range(0, len(data), MAX_WORD_BYTES))
    return found


def as_words(counts: dict[bytes, int]) -> Words:
    data = np.frombuffer(b"".join(counts), np.uint8)
    lengths = np.array([len(word) for word in counts], np.uint16)
    return Words(data, lengths, np.zeros(len(counts), np.uint16), np.array(list(counts.values()), np.int64))


def as_counts(words: Words) -> Counter[bytes]:
    ends = np.cumsum(words.lengths, dtype=np.int64)
    spelt = [words.data[end - length : end].tobytes() for end, length in zip(ends, words.lengths, strict=True)]
    assert len(set(spelt)) == len(spelt)
    return Counter(dict(zip(spelt, words.counts.tolist(), strict=True)))


def counted(texts, folder: Path, *, max_bytes: int = 64 * MIB, workers: int = 2) -> Tally:
    with Tally(folder) as tally:
        tally.add([Text(*text) if isinstance(text, tuple) else Text(text) for text in texts],
                  max_bytes=max_bytes, workers=workers)  # fmt: skip
    return tally


def gathered(tally: Tally) -> Words:
    ones = np.ones(len(tally.groups), np.int64)
    buckets = [bucket for part in in_ranges(tally, 2**31) for bucket in part]
    assert buckets == list(range(1024))
    parts = [Table.holding([weighted(run.read(bucket), ones) for run in tally.runs]).words() for bucket in buckets]
    return joined(parts)


def random_texts(seed: int, num: int, alphabet: str = "abcdefgh  \n.,12'\u00e9\u4e2d") -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices(alphabet, k=draw.randrange(400))) for _ in range(num)]


def different_words(num: int) -> list[str]:
    """Words of letters, all different, some of them longer than a row of a table holds."""
    return [
        "".join(letters) + "q" * (i % 40)
        for i, letters in enumerate(itertools.islice(itertools.product("abcdefghij", repeat=5), num))
    ]


# ---- split ----


@PROPERTY
@given(st.text() | st.text(alphabet=TRICKY))
def test_split_is_the_pattern(text):
    assert list(split(text)) == split_by_pattern(text)


def test_split_on_torture_and_on_every_short_string_of_tricky_characters():
    for text in TORTURE:
        assert list(split(text)) == split_by_pattern(text)
    for text in map("".join, itertools.product(" \n\t'sla1.\u00e9\u017f", repeat=4)):
        assert list(split(text)) == split_by_pattern(text), repr(text)


def test_split_of_every_code_point_and_of_another_pattern():
    everything = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    assert list(split(everything)) == split_by_pattern(everything)
    assert list(split("12345")) != regex.findall(PATTERN.replace("{1,3}", "+"), "12345"), "the check can fail"


def test_classes_are_those_of_the_encoder_but_for_newer_characters(llama3_pieces):
    """tiktoken's own split, asked for a sample of characters through the ids it gives."""
    kinds = classes()
    for kind, wanted in ((LETTER, llama3_pieces["a"]), (NUMBER, llama3_pieces["1"])):
        ours = {code for code in llama3_pieces["asked"] if kinds[code] == kind}
        assert wanted <= ours and all(regex.match(r"\p{L}|\p{N}", chr(code)) for code in ours - wanted)
        assert len(wanted) > 100


@pytest.fixture(scope="module")
def llama3_pieces() -> dict[str, set[int]]:
    """Which of the asked code points tiktoken joins to a letter, and to a digit, before it."""
    import tiktoken

    asked = [code for code in range(0x80, 0x30000) if not 0xD800 <= code < 0xE000 and code % 7 < 2]
    found: dict[str, set[int]] = {"asked": set(asked)}
    for first in "a1":
        ranks = {bytes([byte]): byte for byte in range(256)}
        ranks |= {(first + chr(code)).encode(): 256 + i for i, code in enumerate(asked)}
        encoding = tiktoken.Encoding("probe", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
        found[first] = {
            code for i, code in enumerate(asked) if encoding.encode_ordinary(first + chr(code)) == [256 + i]
        }
    return found


# ---- counts ----


@PROPERTY
@given(st.lists(st.text() | st.text(alphabet="ab 'x\n", min_size=30)))
def test_counts_are_those_of_a_plain_counter(tmp_path_factory, texts):
    assert as_counts(gathered(counted(texts, tmp_path_factory.mktemp("words")))) == words_of(texts)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_spilling_changes_no_count(tmp_path, monkeypatch, workers):
    """Tables of 64 KiB, batches of 4 KiB: many runs, and words longer than a row, a table's arena and the bound."""
    monkeypatch.setattr(tally_module, "FIRST_TABLE_BYTES", 2**16)
    monkeypatch.setattr(tally_module, "BATCH_BYTES", 2**12)
    texts = [*random_texts(0, 800), "x" * 5000, "\u4e2d" * 3000, "long" * 5, "\ud83d\ude00 \ud83d", *TORTURE]
    tally = counted(texts, tmp_path / "w", max_bytes=2**17, workers=workers)
    assert len(tally.runs) > workers + 2
    assert as_counts(gathered(tally)) == words_of(texts)
    assert tally.num_texts == len(texts) and tally.num_bytes == sum(len(well_formed(text).encode()) for text in texts)


def test_a_table_takes_no_word_it_has_no_room_for():
    table = Table.within(0)
    texts = " ".join(different_words(5000)).encode()
    batch = *padded(np.frombuffer(texts, np.uint8)), np.array([len(texts)]), np.zeros(1, np.int64)
    parts, at = [], (0, 0)
    while (at := table.count(*batch, at))[0] < 1:
        parts += list(table.buckets())
        assert len(table) == 0
    parts.append(table.words())
    assert len(parts) > 1024
    assert as_counts(Table.holding(parts).words()) == words_of([texts.decode()])


def test_a_damaged_run_is_refused(tmp_path):
    tally = counted(SOURCE, tmp_path / "w")
    path = tally.runs[0].path
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is damaged: remove its folder"):
        gathered(tally)
    path.unlink()
    with pytest.raises(ValueError, match="is damaged: remove its folder"):
        gathered(tally)


# ---- merges ----


def plain_merges(counts: Counter[bytes], num: int) -> list[tuple[int, int]]:
    """The slow twin: count all pairs, take the best, smaller ids first among equals, rewrite every word."""
    words = Counter({tuple(word): count for word, count in counts.items()})
    merges: list[tuple[int, int]] = []
    while len(merges) < num:
        pairs: Counter[tuple[int, int]] = Counter()
        for word, count in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        new = 256 + len(merges)
        merges.append(best)
        rewritten: Counter[tuple[int, ...]] = Counter()
        for word, count in words.items():
            rewritten[rewrite(word, best, new)] += count
        words = rewritten
    return merges


def rewrite(word: tuple[int, ...], pair: tuple[int, int], new: int) -> tuple[int, ...]:
    out, i = [], 0
    while i < len(word):
        if word[i : i + 2] == pair:
            out.append(new)
            i += 2
        else:
            out.append(word[i])
            i += 1
    return tuple(out)


@PROPERTY
@given(st.dictionaries(st.binary(min_size=1, max_size=12) | st.text("ab", min_size=1).map(str.encode),
                       st.integers(1, 50), max_size=20))  # fmt: skip
def test_merges_are_those_of_the_plain_twin(counts):
    merges = Learner(as_words(counts)).learn(60)
    assert [tuple(pair) for pair in merges.tolist()] == plain_merges(Counter(counts), 60)


def test_merges_survive_full_arrays(monkeypatch):
    """With the least room the arrays fill up again and again, also in the middle of a merge."""
    counts = words_of(random_texts(1, 300, "aaaabbc d"))
    wanted = plain_merges(counts, 500)
    learner, built = Learner(as_words(counts)), []
    plain = Learner._built

    def cramped(self, *begun):
        built.append(begun)
        self._least = 5000
        return plain(self, *begun)

    monkeypatch.setattr(Learner, "_built", cramped)
    assert [tuple(pair) for pair in learner.learn(500).tolist()] == wanted
    assert len(built) >= 3 and all(len(begun) == 2 for begun in built[1:])


def test_tokens_are_rustbpes():
    """rustbpe breaks ties alike, so the vocabularies are equal to the last token, on any text."""
    for texts in (SOURCE, random_texts(2, 500)):
        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(iter(texts), 256 + 500, pattern=PATTERN)
        theirs = [bytes(token) for token, _ in sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])]
        assert train(texts, 512 + 500).tokens == theirs


@pytest.mark.slow
def test_tokens_are_rustbpes_on_forty_megabytes(shared_data):
    with bz2.open(shared_data / "pretrain" / "novels_multi_eltec.jsonl.bz2", "rt") as lines:
        texts = [json.loads(line)["text"] for line in itertools.islice(lines, 80)]
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), 32_000, pattern=PATTERN)
    theirs = [bytes(token) for token, _ in sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])]
    assert train(texts, 32_256).tokens == theirs


# ---- the whole ----


def test_order_workers_and_memory_play_no_part(tmp_path, monkeypatch):
    monkeypatch.setattr(tally_module, "FIRST_TABLE_BYTES", 2**16)
    monkeypatch.setattr(tally_module, "BATCH_BYTES", 2**12)
    texts = [*SOURCE, *random_texts(3, 200)]
    wanted = train(texts, 900).fingerprint
    for number, (workers, memory_bytes, order) in enumerate(
        ((1, LEAST_MEMORY, texts), (3, LEAST_MEMORY, texts[::-1]), (2, 2**31, sorted(texts, key=len)))
    ):
        found = train_within(order, 900, folder=tmp_path / str(number), workers=workers, max_memory=memory_bytes)
        assert found.tokenizer.fingerprint == wanted
        assert (found.num_texts, found.least_count, found.left_out) == (len(texts), 0.0, 0.0)
    assert train(texts[:-1], 900).fingerprint != wanted


def test_rare_words_are_left_out_when_learning_would_not_fit():
    counts = words_of(random_texts(4, 500))
    words = as_words(counts)
    budget = memory(len(words.lengths), len(words.data)) // 3
    least = enough([words], budget)
    kept = as_counts(at_least(words, least))
    assert kept == Counter({word: count for word, count in counts.items() if count >= least}) and least > 1
    assert memory(len(kept), sum(map(len, kept))) <= budget
    assert memory(*map(sum, zip(*((1, len(w)) for w, c in counts.items() if c >= least - 1), strict=True))) > budget


def test_left_out_words_are_reported(tmp_path):
    texts = random_texts(5, 500)
    tally = counted(texts, tmp_path / "w")
    everything = as_counts(gathered(tally))
    budget = int(memory(len(everything), sum(map(len, everything))) // 2)
    learner, found = gather(tally, np.ones(1, np.int64), budget)
    kept = Counter({word: count for word, count in everything.items() if count >= found["least_count"]})
    assert found["num_words"] == len(everything) > len(kept) and found["least_count"] > 1
    assert memory(len(kept), sum(map(len, kept))) <= budget
    assert found["left_out"] == pytest.approx(1 - sum(kept.values()) / sum(everything.values()))
    assert learner.learn(300).tolist() == Learner(as_words(kept)).learn(300).tolist()
    assert gather(tally, np.full(1, 1000), budget)[1]["least_count"] == found["least_count"], "not in thousandths"
    assert gather(tally, np.ones(1, np.int64), 2**31)[1]["least_count"] == 0


def test_weights_count_texts_as_if_repeated(tmp_path):
    code, prose, german = random_texts(6, 60), random_texts(7, 60, "xyz  \n"), random_texts(8, 60, "uvw \u00fc ")
    texts = [*(Text(t, "code", "") for t in code), *(Text(t, "prose", "en") for t in prose),
             *(Text(t, "prose", "de") for t in german)]  # fmt: skip
    weights = Weights({"code": 3, "prose": 0.5}, {"de": 4})
    found = train_within(texts, 700, folder=tmp_path / "w", weights=weights)
    repeated = train(code * 6 + prose + german * 4, 700)
    assert found.tokenizer.fingerprint == repeated.fingerprint != train([t.text for t in texts], 700).fingerprint
    sizes = [size * sum(map(len, map(str.encode, part))) for size, part in ((3, code), (0.5, prose), (2, german))]
    shares = [found.shares[names] for names in (("code", ""), ("prose", "en"), ("prose", "de"))]
    assert shares == pytest.approx([size / sum(sizes) for size in sizes])
    found.tally.remove()
    without = train_within(texts, 600, folder=tmp_path / "w", weights=Weights({"code": 0}))
    assert without.tokenizer.fingerprint == train([t.text for t in texts if t.source != "code"], 600).fingerprint


def test_weights_that_name_nothing_keep_the_counts(tmp_path):
    texts = [Text(text, "code") for text in SOURCE]
    with pytest.raises(ValueError, match=r"no text has the source 'cod'; the counts are kept"):
        train_within(texts, 600, folder=tmp_path / "w", weights=Weights({"cod": 2}))
    assert (tmp_path / "w" / "journal.json").is_file()
    with pytest.raises(ValueError, match="was counted for weights of other names"):
        train_within(texts, 600, folder=tmp_path / "w", weights=Weights({"code": 2}))
    for factor in (-1, float("nan"), 1e9, 1e-6):
        with pytest.raises(ValueError, match=r"give 0, or one from 0\.01 to 1000"):
            Weights(langs={"de": factor})
    with pytest.raises(ValueError, match="too large for so much text"):
        Weights({"a": 1000}, {"b": 1000}).units({("a", "b"): 0}, 10**11)


def test_other_factors_need_no_other_count(tmp_path):
    texts = [Text(text, "code" if i % 2 else "prose") for i, text in enumerate(random_texts(13, 80))]
    for factor in (2, 5):
        found = train_within(iter(texts), 600, folder=tmp_path / "w", weights=Weights({"code": factor}))
        again = train([t.text for t in texts for _ in range(factor if t.source == "code" else 1)], 600)
        assert found.tokenizer.fingerprint == again.fingerprint
    assert set(found.tally.groups) == {("code", ""), ("", "")}


def test_too_little_memory_and_too_small_a_vocabulary_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="max_memory 100 MiB is too little: 512 MiB is the least"):
        train_within(SOURCE, 600, folder=tmp_path / "w", max_memory=100 * MIB)
    with pytest.raises(ValueError, match="vocab_size 500 is too small"):
        train_within(SOURCE, 500, folder=tmp_path / "w")
    with pytest.raises(ValueError, match=r"too large.*16,777,216 is the most"):
        train_within(SOURCE, 10**11, folder=tmp_path / "w")
    with pytest.raises(ValueError, match="workers is 0: at least one"):
        train_within(SOURCE, 600, folder=tmp_path / "w", workers=0)
    assert not (tmp_path / "w").exists()


def test_a_text_of_many_batches_is_cut_where_words_end(tmp_path, small_batches):
    texts = ["\n".join(random_texts(14, 60)) + "\n\n  \u3000\n\u2028x\n" * 40, "x" * 9000, "a\n" * 9000, *TORTURE]
    assert max(len(list(pieces(text.encode()))) for text in texts[:3]) > 3
    for text in texts:
        cut = [piece.decode() for piece in pieces(well_formed(text).encode())]
        assert "".join(cut) == well_formed(text)
        assert [word for piece in cut for word in split(piece)] == split_by_pattern(well_formed(text))
    assert as_counts(gathered(counted(texts, tmp_path / "w"))) == words_of(texts)


def test_sources_without_number_make_one_group(tmp_path):
    texts = [Text(f"page {i}", f"https://example.org/{i}") for i in range(11_000)]
    found = train_within(texts, 513, folder=tmp_path / "w")
    assert found.tally.groups == {("", ""): 0} and len(found.shares) == 10_001
    assert sum(found.shares.values()) == pytest.approx(1)


# ---- interrupted ----


def interrupted_after(texts, num: int, error: type[BaseException] = KeyboardInterrupt):
    yield from texts[:num]
    raise error


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(tally_module, "BATCH_BYTES", 2**11)
    monkeypatch.setattr(tally_module, "FIRST_TABLE_BYTES", 2**16)


def test_an_interrupted_count_goes_on(tmp_path, small_batches):
    texts = [Text(text, f"s{i % 3}") for i, text in enumerate(random_texts(9, 400))]
    for num in (130, 131, 300):
        with pytest.raises(KeyboardInterrupt):
            train_within(interrupted_after(texts, num), 700, folder=tmp_path / "w")
        covered = json.loads((tmp_path / "w" / "journal.json").read_text())["texts"]
        assert num - 40 < covered <= num
    found = train_within(texts, 700, folder=tmp_path / "w")
    assert found.tokenizer.fingerprint == train([text.text for text in texts], 700).fingerprint
    assert found.num_texts == 400 and len(found.shares) == 3


@pytest.mark.parametrize("change", ["another", "fewer"])
def test_counts_of_other_text_are_not_gone_on_with(tmp_path, small_batches, change):
    texts = random_texts(10, 200)
    with pytest.raises(KeyboardInterrupt):
        train_within(interrupted_after(texts, 150), 600, folder=tmp_path / "w")
    changed = ["!", *texts[1:]] if change == "another" else texts[:20]
    with pytest.raises(ValueError, match="holds counts of other text: remove it to count anew"):
        train_within(changed, 600, folder=tmp_path / "w")
    assert train_within(texts, 600, folder=tmp_path / "w").num_texts == 200


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")], ids=["ctrl-c", "full"])
@pytest.mark.parametrize("when", range(1, 12))
def test_a_failure_in_any_write_loses_and_doubles_nothing(tmp_path, small_batches, monkeypatch, error, when):
    """In a worker's run, in a commit between two runs of it, or before its journal: the next life counts all once."""
    monkeypatch.setattr(tally_module, "COMMIT_SECONDS", 0.0)
    texts = [*random_texts(11, 120), *different_words(6000)]
    writes, write, replace = itertools.count(1), Run.write, os.replace

    def failing(real):
        def then(*args):
            if next(writes) == when:
                raise error
            return real(*args)

        return then

    monkeypatch.setattr(Run, "write", failing(write))
    monkeypatch.setattr(tally_module.os, "replace", failing(replace))
    with pytest.raises(type(error)):
        counted(texts, tmp_path / "w")
    monkeypatch.setattr(Run, "write", write)
    monkeypatch.setattr(tally_module.os, "replace", replace)
    assert as_counts(gathered(counted(texts, tmp_path / "w"))) == words_of(texts)


def test_a_second_interrupt_while_workers_end_commits_nothing_wrong(tmp_path, small_batches, monkeypatch):
    texts = random_texts(15, 200)
    count = Tally._count

    def slowly(self, batch, free):
        time.sleep(0.05)
        count(self, batch, free)

    class Impatient(tally_module.ThreadPoolExecutor):
        def __exit__(self, *_):
            self.shutdown(wait=False, cancel_futures=True)
            raise KeyboardInterrupt

    monkeypatch.setattr(Tally, "_count", slowly)
    monkeypatch.setattr(tally_module, "ThreadPoolExecutor", Impatient)
    with pytest.raises(KeyboardInterrupt):
        counted(interrupted_after(texts, 150), tmp_path / "w")
    monkeypatch.undo()
    time.sleep(0.5)
    assert as_counts(gathered(counted(texts, tmp_path / "w"))) == words_of(texts)


def test_a_full_disk_is_noticed(tmp_path):
    """/dev/full takes nothing, and numpy's tofile would not say so."""
    table = Table.within(2**16)
    batch = *padded(np.frombuffer(b"some words", np.uint8)), np.array([10]), np.zeros(1, np.int64)
    table.count(*batch, (0, 0))
    with pytest.raises(OSError, match="No space left"):
        Run.write(Path("/dev/full"), table)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "run-notes.txt").write_text("precious")
    with pytest.raises(ValueError, match="holds no counts of llamita's"):
        train_within(SOURCE, 600, folder=tmp_path)
    assert (tmp_path / "run-notes.txt").read_text() == "precious"


@pytest.mark.parametrize(
    "journal", ["", "{}", "[]", '{"version": 1, "names": [[], []], "texts": 0, "digest": "", "runs": [7]}']
)
def test_a_damaged_journal_is_refused(tmp_path, journal):
    counted(SOURCE, tmp_path / "w")
    (tmp_path / "w" / "journal.json").write_text(journal)
    with pytest.raises(ValueError, match="is damaged: remove it to count anew"):
        Tally(tmp_path / "w")


def test_two_trainings_do_not_share_a_folder(tmp_path):
    with Tally(tmp_path / "w"), pytest.raises(ValueError, match="another training is counting into"):
        Tally(tmp_path / "w")
    with Tally(tmp_path / "w") as second:
        second.remove()
    assert not (tmp_path / "w").exists()


KILLED = """
import sys, time
from pathlib import Path
from llamita.tokenizer import tally
from llamita.tokenizer.train import train_within
from tests.test_tokenizer_train import random_texts
tally.BATCH_BYTES, tally.FIRST_TABLE_BYTES, tally.COMMIT_SECONDS = 2**12, 2**16, 0.0
def slowly():
    for number, text in enumerate(random_texts(12, 600)):
        time.sleep(0.002)
        yield text
train_within(slowly(), 700, folder=Path(sys.argv[1]))
"""


def test_kill_9_loses_nothing_that_was_committed(tmp_path):
    folder, root = tmp_path / "w", Path(__file__).resolve().parents[1]
    killed_with = []
    for _ in range(3):
        child = subprocess.Popen([sys.executable, "-c", KILLED, str(folder)], cwd=root)
        before = len(list(folder.glob("run-*")))
        deadline = time.monotonic() + 120
        while child.poll() is None and time.monotonic() < deadline:
            if len(list(folder.glob("run-*"))) > before + 2:
                os.kill(child.pid, signal.SIGKILL)
                break
            time.sleep(0.002)
        child.wait()
        killed_with.append(json.loads((folder / "journal.json").read_text())["texts"])
    assert killed_with == sorted(killed_with) and killed_with[0] > 0
    found = train_within(random_texts(12, 600), 700, folder=folder)
    assert found.tokenizer.fingerprint == train(random_texts(12, 600), 700).fingerprint


def test_tokens_of_merges():
    assert tokens_of(np.array([[97, 98], [256, 99]]))[256:] == [b"ab", b"abc"]

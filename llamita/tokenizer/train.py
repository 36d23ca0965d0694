"""Train a Llama 3 vocabulary of one's own from a stream of any length, in the memory that the user allows.

First the words of Llama 3's split are counted exactly, into a folder that a killed training goes on from; then
byte-pair encoding (arXiv 1508.07909) is learned from the counts. The result depends on the text and the weights
alone, neither on its order nor on the number of workers; on the memory only where rare words had to be left out.
"""

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from llamita.tokenizer.count import BUCKETS, Table, Words
from llamita.tokenizer.llama3 import NUM_SPECIALS, Tokenizer
from llamita.tokenizer.merge import Learner, memory
from llamita.tokenizer.tally import Tally, Text

MEMORY, LEAST_MEMORY = 2**31, 2**29
OWN_MEMORY = 360 * 2**20  # Python with numpy and numba, which are 240 MiB before any table
WORKER_MEMORY = 32 * 2**20  # batches on their way to a worker, and its smallest table
LARGEST = 2**24  # entries; no use is known for more, and what is asked for is set aside beforehand
WEIGHT_UNIT = 1000  # weighted counts are whole thousandths, so that sums do not depend on their order

SMALLEST = 256 + NUM_SPECIALS

Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class Weights:
    """How often a text counts: the factor of its source times that of its language; 1 for a name not listed."""

    sources: Mapping[str, float] = field(default_factory=dict)
    langs: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, factor in (*self.sources.items(), *self.langs.items()):
            if not (factor == 0 or 0.01 <= factor <= 1000):
                raise ValueError(f"the weight of {name!r} is {factor}; give 0, or one from 0.01 to 1000")

    def of(self, source: str, lang: str) -> float:
        return self.sources.get(source, 1) * self.langs.get(lang, 1)

    def units(self, groups: Mapping[tuple[str, str], int], num_bytes: int) -> np.ndarray:
        """(groups,) int64: factors in units of 1/WEIGHT_UNIT, or ones if nothing is weighted.

        ValueError for a name that no text has, and for factors that would overflow the counts of `num_bytes` of text.
        """
        if not (self.sources or self.langs):
            return np.ones(len(groups), np.int64)
        for kind, given, known in (
            ("source", self.sources, {source for source, _ in groups}),
            ("language", self.langs, {lang for _, lang in groups}),
        ):
            if missing := sorted(set(given) - known):
                raise ValueError(f"no text has the {kind} {missing[0]!r}; the counts are kept for another try")
        factors = [round(self.of(source, lang) * WEIGHT_UNIT) for source, lang in groups]
        if max(factors) * num_bytes >= 2**62:
            raise ValueError("the weights are too large for so much text: make them smaller, all by one factor")
        return np.array(factors, np.int64)


@dataclass(frozen=True)
class Trained:
    """A tokenizer and what it was learned from; `shares` of (source, language) in the weighted text."""

    tokenizer: Tokenizer
    num_texts: int
    num_bytes: int
    num_words: int
    """Different words."""
    least_count: float
    """Words with a smaller (weighted) count were left out for want of memory; 0 if none was."""
    left_out: float
    """Their share of all words of the text."""
    shares: dict[tuple[str, str], float]
    tally: Tally
    """The counts, to be removed when the tokenizer is safe."""


def train(texts: Iterable[str | Text], vocab_size: int) -> Tokenizer:
    """Learn `vocab_size` - 512 merges; the 256 single bytes and the 256 special tokens make up the rest.

    ValueError if `vocab_size` is below 512 or if the texts hold too few different words for it.
    """
    with tempfile.TemporaryDirectory() as folder:
        return train_within(texts, vocab_size, folder=Path(folder) / "words").tokenizer


def train_within(
    texts: Iterable[str | Text],
    vocab_size: int,
    *,
    folder: Path,
    max_memory: int = MEMORY,
    workers: int | None = None,
    weights: Weights | None = None,
    allow_fewer: bool = False,
    on_progress: Progress = lambda stage, done: None,
) -> Trained:
    """`train` with words counted into `folder`, and in about `max_memory` bytes.

    The same call goes on where one that was stopped or killed left `folder`; `.tally.remove()` of the result removes
    it. `on_progress` is given "count" with the bytes so far, then "learn" with the merges so far. A single text takes
    about twice its size on top if it is ASCII, else more. Too few merges in the text are a ValueError unless
    `allow_fewer`.
    """
    if not SMALLEST <= vocab_size <= LARGEST:
        raise ValueError(
            f"vocab_size {vocab_size} is too {'small' if vocab_size < SMALLEST else 'large'}: bytes and specials alone "
            f"need {SMALLEST}, and {LARGEST:,} is the most"
        )
    if max_memory < LEAST_MEMORY:
        raise ValueError(f"max_memory {max_memory >> 20} MiB is too little: {LEAST_MEMORY >> 20} MiB is the least")
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}: at least one must count")
    weights = weights or Weights()
    workers = min(workers or len(os.sched_getaffinity(0)), (max_memory - OWN_MEMORY) // (2 * WORKER_MEMORY))
    budget = max_memory - OWN_MEMORY - workers * WORKER_MEMORY
    with Tally(folder, weights.sources, weights.langs) as tally:
        tally.add(
            (text if isinstance(text, Text) else Text(text) for text in texts), max_bytes=budget, workers=workers,
            on_progress=lambda num_bytes: on_progress("count", num_bytes),
        )  # fmt: skip
        learner, found = gather(tally, weights.units(tally.groups, tally.num_bytes), budget)
    merges = learner.learn(vocab_size - SMALLEST, lambda made: on_progress("learn", made))
    if len(merges) < vocab_size - SMALLEST and not allow_fewer:
        more = "a larger max_memory" if found["left_out"] else f"more text (its counts so far are in {folder})"
        raise ValueError(
            f"the text gives only {len(merges)} of the {vocab_size - SMALLEST} merges that vocab_size {vocab_size} "
            f"needs; give {more}, or a vocab_size of at most {len(merges) + SMALLEST}"
        )
    sizes = {names: size * weights.of(*names) for names, size in tally.shares.items()}
    return Trained(
        Tokenizer(tokens_of(merges)), tally.num_texts, tally.num_bytes, **found,
        shares={names: size / (sum(sizes.values()) or 1) for names, size in sizes.items()}, tally=tally,
    )  # fmt: skip


def tokens_of(merges: np.ndarray) -> list[bytes]:
    """Bytes in merge order: the 256 single ones, then what each of (N, 2) merges joins."""
    tokens = [bytes([byte]) for byte in range(256)]
    for first, second in merges.tolist():
        tokens.append(tokens[first] + tokens[second])
    return tokens


def gather(tally: Tally, units: np.ndarray, budget: int) -> tuple[Learner, dict]:
    """All words with their weighted counts, the rarest left out where learning from them would take over `budget`."""
    kept: list[Words] = []
    sizes = np.zeros(2, np.int64)
    least, num_words, total = 1, 0, 0
    for buckets in in_ranges(tally, budget):
        words = Table.holding([weighted(run.read(bucket), units) for run in tally.runs for bucket in buckets]).words()
        num_words += len(words.lengths)
        total += int(words.counts.sum())
        kept.append(at_least(words, least))
        sizes += size_of(kept[-1])
        if memory(*sizes) > budget:
            least = enough(kept, 0.9 * budget)
            kept = [at_least(words, least) for words in kept]
            sizes = np.sum([size_of(words) for words in kept], axis=0)
    words = joined(kept)
    weight_unit = 1 if (units == 1).all() else WEIGHT_UNIT
    return Learner(words), {
        "num_words": num_words,
        "least_count": least / weight_unit if least > 1 else 0.0,
        "left_out": 1 - int(words.counts.sum()) / (total or 1),
    }


def in_ranges(tally: Tally, budget: int) -> Iterator[range]:
    """Neighbouring buckets that make up about a sixteenth of the budget, or 8 MiB; each is in memory at a time."""
    sizes = np.zeros(BUCKETS, np.int64)
    for run in tally.runs:
        sizes += np.array(run.index, np.int64) @ np.array([12, 1])
    first, size = 0, 0
    for bucket in range(BUCKETS):
        if size + sizes[bucket] > min(budget // 16, 2**23):
            yield range(first, bucket)
            first, size = bucket, 0
        size += sizes[bucket]
    yield range(first, BUCKETS)


def size_of(words: Words) -> tuple[int, int]:
    return len(words.lengths), len(words.data)


def weighted(words: Words, units: np.ndarray) -> Words:
    """Counts times the factor of the word's group; one group for all."""
    return words._replace(groups=np.zeros_like(words.groups), counts=words.counts * units[words.groups])


def joined(parts: list[Words]) -> Words:
    return Words(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def at_least(words: Words, least: int) -> Words:
    """The words with a count of `least` or more."""
    chosen = words.counts >= least
    data = words.data[np.repeat(chosen, words.lengths)]
    return Words(data, words.lengths[chosen], words.groups[chosen], words.counts[chosen])


def enough(kept: list[Words], budget: float) -> int:
    """The smallest count such that learning from the words that have it or more takes at most `budget` bytes."""
    counts = np.concatenate([words.counts for words in kept])
    lengths = np.concatenate([words.lengths for words in kept])
    values, place = np.unique(counts, return_inverse=True)
    sizes = memory(np.bincount(place), np.bincount(place, weights=lengths))
    fits = np.flatnonzero(np.cumsum(sizes[::-1])[::-1] <= budget)
    return int(values[fits[0]]) if len(fits) else int(values[-1]) + 1

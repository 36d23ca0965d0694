"""Train a Llama 3 vocabulary of one's own from a stream of any length, in the memory that the user allows.

First the words of Llama 3's split are counted exactly, into a folder that a killed training goes on from; then
byte-pair encoding (arXiv 1508.07909) is learned from the counts. The result depends on the text and the weights
alone, neither on its order nor on the number of workers; on the memory only where rare words had to be left out.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from llamita.tokenizer.count import BUCKETS, Table, Words
from llamita.tokenizer.llama3 import NUM_SPECIALS, Tokenizer
from llamita.tokenizer.merge import Learner, memory
from llamita.tokenizer.tally import Tally, Text

MEMORY, LEAST_MEMORY = 2**31, 2**29
OWN_MEMORY = 320 * 2**20  # Python with numpy and numba, and the text in flight (measured: LOG.md)
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
            if not 0 <= factor <= 1000:
                raise ValueError(f"the weight of {name!r} is {factor}; give one from 0 to 1000")

    def of_groups(self, groups: Mapping[tuple[str, str], list[int]]) -> np.ndarray:
        """(groups,) int64 in units of 1/WEIGHT_UNIT, or ones if nothing is weighted. ValueError: an unknown name."""
        if not (self.sources or self.langs):
            return np.ones(len(groups), np.int64)
        for kind, given, known in (
            ("source", self.sources, sorted({source for source, _ in groups})),
            ("language", self.langs, sorted({lang for _, lang in groups})),
        ):
            for name in given:
                if name not in known:
                    raise ValueError(f"no text has the {kind} {name!r}; there are: {', '.join(map(repr, known))}")
        factors = [self.sources.get(source, 1) * self.langs.get(lang, 1) for source, lang in groups]
        return np.array([round(factor * WEIGHT_UNIT) for factor in factors], np.int64)


@dataclass(frozen=True)
class Trained:
    """A tokenizer and what it was learned from; `shares` of (source, language) in the weighted text."""

    tokenizer: Tokenizer
    num_texts: int
    num_bytes: int
    num_words: int
    """Different words (and groups) counted."""
    least_count: int
    """Words seen less often than this were left out for want of memory; 1 if none was."""
    left_out: float
    """Their share of all words of the text."""
    shares: dict[tuple[str, str], float]


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
    """`train` with words counted into `folder`, which goes once the merges are learned, and at most `max_memory` bytes.

    The same call goes on where one that was stopped or killed left `folder`. `on_progress` is given "count" with the
    bytes so far, then "learn" with the merges so far. One text is held whole, on top of `max_memory`. A text that gives
    too few merges is a ValueError unless `allow_fewer`; the counts are kept then.
    """
    if vocab_size < SMALLEST:
        raise ValueError(f"vocab_size {vocab_size} is too small: bytes and specials alone need {SMALLEST}")
    if max_memory < LEAST_MEMORY:
        raise ValueError(
            f"max_memory {max_memory / 2**20:.0f} MiB is too little: {LEAST_MEMORY >> 20} MiB is the least"
        )
    budget = max_memory - OWN_MEMORY
    tally = Tally(folder)
    tally.add(
        (text if isinstance(text, Text) else Text(text) for text in texts),
        max_bytes=budget, workers=workers or os.cpu_count() or 1,
        on_progress=lambda num_bytes: on_progress("count", num_bytes),
    )  # fmt: skip
    factors = (weights or Weights()).of_groups(tally.groups)
    words, found = gather(tally, factors, budget)
    merges = Learner(words).learn(vocab_size - SMALLEST, lambda made: on_progress("learn", made))
    if len(merges) < vocab_size - SMALLEST and not allow_fewer:
        raise ValueError(
            f"the text gives only {len(merges)} of the {vocab_size - SMALLEST} merges that vocab_size "
            f"{vocab_size} needs; give more text, or a vocab_size of at most {len(merges) + SMALLEST}"
        )
    shutil.rmtree(folder, ignore_errors=True)  # without any text it was never made
    weighted = {names: size * factors[number] for names, (number, size) in tally.groups.items()}
    total = sum(weighted.values()) or 1
    return Trained(
        Tokenizer(tokens_of(merges)), tally.num_texts, tally.num_bytes, **found,
        shares={names: float(size / total) for names, size in weighted.items()},
    )  # fmt: skip


def tokens_of(merges: np.ndarray) -> list[bytes]:
    """Bytes in merge order: the 256 single ones, then what each of (N, 2) merges joins."""
    tokens = [bytes([byte]) for byte in range(256)]
    for first, second in merges.tolist():
        tokens.append(tokens[first] + tokens[second])
    return tokens


def gather(tally: Tally, factors: np.ndarray, budget: int) -> tuple[Words, dict]:
    """All words with their weighted counts, the rarest left out while learning from them would take over `budget`."""
    kept: list[Words] = []
    least, num_words, total = 1, 0, 0
    for bucket in range(BUCKETS):
        parts = [weighted(run.read(bucket), factors) for run in tally.runs]
        words = Table.holding(parts).words()
        num_words += len(words.lengths)
        total += int(words.counts.sum())
        kept.append(at_least(words, least))
        sizes = [(len(words.lengths), len(words.data)) for words in kept]
        if memory(*np.sum(sizes, axis=0)) > budget:
            least = enough(kept, 0.9 * budget)
            kept = [at_least(words, least) for words in kept]
    words = joined(kept)
    return words, {
        "num_words": num_words,
        "least_count": least,
        "left_out": 1 - int(words.counts.sum()) / (total or 1),
    }


def weighted(words: Words, factors: np.ndarray) -> Words:
    """Counts times the factor of the word's group; one group for all."""
    return words._replace(groups=np.zeros_like(words.groups), counts=words.counts * factors[words.groups])


def joined(parts: list[Words]) -> Words:
    return Words(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def at_least(words: Words, least: int) -> Words:
    """The words that stand in the text `least` times or more."""
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

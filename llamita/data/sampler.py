"""Which row is sample k: arithmetic without state, so resuming is exact with any number of ranks and workers.

A block of about 65,536 samples holds exactly round(65,536 w) of a pool of weight w, in a keyed order. A
pool's j-th sample is row permutation(j mod N) of its N rows, in epoch j div N: each row once an epoch.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np

BLOCK = 65_536
ROUNDS = 4
MASK = 2**64 - 1


@dataclass(frozen=True)
class Phase:
    """From sample `start` on, other weights; every source goes on where it was."""

    start: int
    weights: tuple[float, ...]


def mix(x):
    """Scrambles 64 bits of an int or of each of a uint64 array (splitmix64: Steele, Lea, Flood 2014)."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


@lru_cache(maxsize=1024)
def round_keys(*what: int | str) -> tuple[int, ...]:
    digest = hashlib.blake2b(json.dumps(what).encode(), digest_size=8 * ROUNDS).digest()
    return tuple(int(key) for key in np.frombuffer(digest, "<u8"))


def permute(i: int, n: int, keys: Sequence[int]) -> int:
    """Where a keyed permutation of range(n) takes i.

    A Feistel network on the next even number of bits, walked along its cycle until it is back below n, at
    most four steps on average (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    while True:
        left, right = i >> half, i & low
        for key in keys:
            left, right = right, left ^ (mix(right ^ key) & low)
        i = left << half | right
        if i < n:
            return i


@lru_cache(maxsize=8)
def block_order(seed: int, phase: int, block: int, counts: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The pool of each sample of a block, and how many samples of that pool come before it in the block."""
    pools = np.repeat(np.arange(len(counts)), counts)
    key = round_keys(seed, "block", phase, block)[0]
    order = np.argsort(mix(np.arange(len(pools), dtype=np.uint64) ^ np.uint64(key)))
    pools = pools[order]
    by_pool = np.argsort(pools, kind="stable")
    ranks = np.empty_like(pools)
    ranks[by_pool] = np.arange(len(pools)) - np.repeat(np.cumsum([0, *counts[:-1]]), counts)
    return pools, ranks


class Sampler:
    """Sample k of a mixture of sources with `num_rows` rows each.

    `weights` are shares of the samples, in any unit; without them all rows are one pool and an epoch visits
    each row of each source exactly once. A positive weight gives at least one sample a block. Raises
    ValueError: weights that do not fit the sources, no rows, phases out of order.
    """

    def __init__(
        self,
        num_rows: Sequence[int],
        weights: Sequence[float] | None = None,
        seed: int = 0,
        phases: Sequence[Phase] = (),
    ):
        self.num_rows, self.seed = tuple(map(int, num_rows)), seed
        self._first = [0, *accumulate(self.num_rows)]
        if weights is None and phases:
            raise ValueError("phases change weights: give the sources weights to begin with")
        # A pool is rows that share one permutation: (its first row among those of all sources, how many).
        total = [(0, self._first[-1])]
        self._pools = total if weights is None else list(zip(self._first[:-1], self.num_rows, strict=True))
        phases = [Phase(0, (1.0,) if weights is None else tuple(weights)), *phases]
        self._starts = [phase.start for phase in phases]
        if sorted(set(self._starts)) != self._starts:
            raise ValueError(f"phases must start later and later, after sample 0, not at {self._starts[1:]}")
        self._counts = [self._slots(phase.weights) for phase in phases]
        self._drawn = [np.zeros(len(self._pools), np.int64)]
        for number, start in enumerate(self._starts[1:]):
            self._drawn.append(self._drawn[number] + self._draws(number, start - self._starts[number]))

    def at(self, k: int) -> tuple[int, int, int]:
        """(source, epoch, row) of sample k."""
        number = bisect_right(self._starts, k) - 1
        counts = self._counts[number]
        block, i = divmod(k - self._starts[number], sum(counts))
        pools, ranks = block_order(self.seed, number, block, counts)
        pool = int(pools[i])
        first, num_rows = self._pools[pool]
        epoch, j = divmod(int(self._drawn[number][pool]) + block * counts[pool] + int(ranks[i]), num_rows)
        row = first + permute(j, num_rows, round_keys(self.seed, "rows", pool, epoch))
        source = bisect_right(self._first, row) - 1
        return source, epoch, row - self._first[source]

    @property
    def fingerprint(self) -> str:
        """The order of all samples in one hash: rows, samples of each pool in a block, phases and seed."""
        order = [1, self.num_rows, self._starts, self._counts, self.seed]
        return hashlib.sha256(json.dumps(order).encode()).hexdigest()

    def _slots(self, weights: Sequence[float]) -> tuple[int, ...]:
        if len(weights) != len(self._pools):
            raise ValueError(f"{len(weights)} weights for {len(self._pools)} sources")
        if not (all(0 <= weight < float("inf") for weight in weights) and sum(weights) > 0):
            raise ValueError(f"weights must be numbers from 0 up, not all 0, not {list(weights)}")
        if any(weight and not num_rows for weight, (_, num_rows) in zip(weights, self._pools, strict=True)):
            raise ValueError(f"a source without rows has a weight: rows {list(self.num_rows)}, weights {list(weights)}")
        total = sum(weights)
        return tuple(max(1, round(BLOCK * weight / total)) if weight else 0 for weight in weights)

    def _draws(self, number: int, num_samples: int) -> np.ndarray:
        """Samples of each pool among the first `num_samples` of a phase."""
        counts = self._counts[number]
        block, i = divmod(num_samples, sum(counts))
        pools, _ = block_order(self.seed, number, block, counts)
        return block * np.array(counts) + np.bincount(pools[:i], minlength=len(counts))


def shard_of(ks: range, rank: int, world: int) -> range:
    """The part of a batch's samples that a rank reads: all ranks' parts, in order of rank, are the batch."""
    return ks[rank * len(ks) // world : (rank + 1) * len(ks) // world]

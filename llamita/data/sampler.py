"""Which row is sample k: arithmetic without state, so resuming is exact with any number of ranks and workers.

A block of 65,536 samples holds 65,536 w of a pool of weight w, rounded up or down, spread evenly: at no place of
the block has a pool had a whole sample more or less than its part. So rounding costs a pool less than one sample a
block. A pool's j-th sample is row permutation(j mod N) of its N rows, in epoch j div N: each row once an epoch.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, count

import numba
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


def unpermute(i: int, n: int, keys: Sequence[int]) -> int:
    """The number that `permute` takes to i."""
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    while True:
        left, right = i >> half, i & low
        for key in reversed(keys):
            left, right = right ^ (mix(left ^ key) & low), left
        i = left << half | right
        if i < n:
            return i


@numba.njit(cache=True, nogil=True)
def permute_many(places: np.ndarray, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """`permute` of each place: places and sizes int64 [N], keys uint64 [N, ROUNDS]; int64 [N]."""
    moved = np.empty_like(places)
    for number in range(len(places)):
        size, half = np.uint64(sizes[number]), np.uint64(1)
        while size - np.uint64(1) >> half + half:
            half += np.uint64(1)
        low = (np.uint64(1) << half) - np.uint64(1)
        i = np.uint64(places[number])
        while True:
            left, right = i >> half, i & low
            for key in keys[number]:
                x = right ^ key
                x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
                x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
                left, right = right, left ^ ((x ^ (x >> np.uint64(31))) & low)
            i = left << half | right
            if i < size:
                break
        moved[number] = i
    return moved


@numba.njit(cache=True, nogil=True)
def spread(counts: np.ndarray) -> np.ndarray:
    """Pools in an order of sum(counts) places in which pool s, `counts[s]` > 0 times, is never a whole place ahead
    or behind: after m places it has stood less than 1 away from m counts[s] / sum(counts) times.

    A pool's next place may not come before its release nor after its deadline; of the pools released, the one with
    the earliest deadline is next (Tijdeman 1980, "The chairman assignment problem": at most 1 - 1 / (2 S - 2) away).
    """
    total, margin = counts.sum(), 2 * len(counts) - 2
    order = np.empty(total, np.int64)
    taken = np.zeros_like(counts)
    for place in range(total):
        chosen, earliest = -1, 0
        for pool in range(len(counts)):
            if margin * (counts[pool] * (place + 1) - taken[pool] * total) < total:
                continue
            due = margin * (taken[pool] + 1) - 1
            if chosen < 0 or due * counts[chosen] < earliest * counts[pool]:
                chosen, earliest = pool, due
        order[place] = chosen
        taken[chosen] += 1
    return order


@lru_cache(maxsize=8)
def block_order(counts: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The pool of each sample of a block, and how many samples of that pool come before it in the block."""
    drawn = np.flatnonzero(counts)
    if len(drawn) == 1:
        return np.full(BLOCK, drawn[0]), np.arange(BLOCK)
    pools = drawn[spread(np.array(counts)[drawn])]
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
        block, i = divmod(k - self._starts[number], BLOCK)
        pools, ranks = block_order(counts)
        pool = int(pools[i])
        first, num_rows = self._pools[pool]
        epoch, j = divmod(int(self._drawn[number][pool]) + block * counts[pool] + int(ranks[i]), num_rows)
        row = first + permute(j, num_rows, self._keys(pool, epoch))
        source = bisect_right(self._first, row) - 1
        return source, epoch, row - self._first[source]

    def at_many(self, ks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`at` of each of ks, int64 [N]: sources, epochs, rows, int64 [N] each."""
        pools, draws = np.empty_like(ks), np.empty_like(ks)
        numbers = np.searchsorted(self._starts, ks, side="right") - 1
        for number in np.unique(numbers).tolist():
            mine = numbers == number
            block, i = np.divmod(ks[mine] - self._starts[number], BLOCK)
            of_place, ranks = block_order(self._counts[number])
            pools[mine] = pool = of_place[i]
            draws[mine] = self._drawn[number][pool] + block * np.array(self._counts[number])[pool] + ranks[i]
        firsts, sizes = np.array(self._pools)[pools].T
        epochs, places = np.divmod(draws, sizes)
        permutations, which = np.unique(np.stack([pools, epochs]), axis=1, return_inverse=True)
        keys = np.array([self._keys(*each) for each in permutations.T.tolist()], np.uint64)[which.ravel()]
        rows = firsts + permute_many(places, sizes, keys)
        sources = np.searchsorted(self._first, rows, side="right") - 1
        return sources, epochs, rows - np.array(self._first)[sources]

    def steps_of(self, source: int, row: int) -> Iterator[int]:
        """Every sample number k at which this row is drawn, in order; without end where the last phase draws it."""
        place = self._first[source] + row
        pool = 0 if len(self._pools) == 1 else source
        first, num_rows = self._pools[pool]
        for epoch in count():
            draw = epoch * num_rows + unpermute(place - first, num_rows, self._keys(pool, epoch))
            number = int(np.searchsorted([drawn[pool] for drawn in self._drawn], draw, side="right")) - 1
            if not self._counts[number][pool]:
                return
            block, rank = divmod(draw - int(self._drawn[number][pool]), self._counts[number][pool])
            i = np.flatnonzero(block_order(self._counts[number])[0] == pool)[rank]
            yield self._starts[number] + block * BLOCK + int(i)

    def drawn(self, k: int) -> list[int]:
        """How many of the first k samples are of each pool: of each source, or, without weights, of all."""
        number = bisect_right(self._starts, k) - 1
        return (self._drawn[number] + self._draws(number, k - self._starts[number])).tolist()

    @property
    def fingerprint(self) -> str:
        """The order of all samples in one hash: rows, samples of each pool in a block, phases and seed."""
        order = [2, self.num_rows, self._starts, self._counts, self.seed]
        return hashlib.sha256(json.dumps(order).encode()).hexdigest()

    def _slots(self, weights: Sequence[float]) -> tuple[int, ...]:
        if len(weights) != len(self._pools):
            raise ValueError(f"{len(weights)} weights for {len(self._pools)} sources")
        if not (all(0 <= weight < float("inf") for weight in weights) and sum(weights) > 0):
            raise ValueError(f"weights must be numbers from 0 up, not all 0, not {list(weights)}")
        if any(weight and not num_rows for weight, (_, num_rows) in zip(weights, self._pools, strict=True)):
            raise ValueError(f"a source without rows has a weight: rows {list(self.num_rows)}, weights {list(weights)}")
        return apportioned(weights)

    def _draws(self, number: int, num_samples: int) -> np.ndarray:
        """Samples of each pool among the first `num_samples` of a phase."""
        counts = self._counts[number]
        block, i = divmod(num_samples, BLOCK)
        return block * np.array(counts) + np.bincount(block_order(counts)[0][:i], minlength=len(counts))

    def _keys(self, pool: int, epoch: int) -> tuple[int, ...]:
        return round_keys(self.seed, "rows", pool, epoch)


def apportioned(weights: Sequence[float]) -> tuple[int, ...]:
    """BLOCK samples cut by weight: largest remainders are rounded up. A positive weight gets one sample at least, and
    where that makes too many, the largest pay."""
    quotas = BLOCK * np.array(weights) / sum(weights)
    counts = np.maximum(np.floor(quotas), quotas > 0).astype(np.int64)
    missing = BLOCK - int(counts.sum())
    if missing > 0:
        counts[np.argsort(counts - quotas, kind="stable")[:missing]] += 1
    for _ in range(-missing):
        counts[np.argmax(counts)] -= 1
    return tuple(counts.tolist())


def shard_of(ks: range, rank: int, world: int) -> range:
    """The part of a batch's samples that a rank reads: all ranks' parts, in order of rank, are the batch."""
    return ks[rank * len(ks) // world : (rank + 1) * len(ks) // world]

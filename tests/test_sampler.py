"""Layer: arithmetic. The order of samples: each row once an epoch, exact weights, and pinned for ever."""

from collections import Counter
from itertools import islice, takewhile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamita.data.sampler import (
    BLOCK,
    Phase,
    Sampler,
    apportioned,
    mix,
    permute,
    permute_many,
    round_keys,
    shard_of,
    spread,
    unpermute,
)


@given(st.integers(1, 700), st.integers(0, 2**32))
def test_permute_is_a_bijection(n, seed):
    assert sorted(permute(i, n, round_keys(seed)) for i in range(n)) == list(range(n))


@settings(deadline=None)  # the kernel is compiled in the first example
@given(st.integers(1, 2**62), st.data())
def test_unpermute_and_the_kernel_agree_with_permute(n, data):
    places = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20))
    keys = [round_keys(data.draw(st.integers(0, 2**32))) for _ in places]
    moved = [permute(place, n, key) for place, key in zip(places, keys, strict=True)]
    assert [unpermute(place, n, key) for place, key in zip(moved, keys, strict=True)] == places
    assert permute_many(np.array(places), np.full(len(places), n), np.array(keys, np.uint64)).tolist() == moved


def test_permute_leaves_no_trace_of_the_order():
    n = 5000
    order = np.array([permute(i, n, round_keys(0)) for i in range(n)])
    assert abs(np.corrcoef(np.arange(n), order)[0, 1]) < 0.05
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.05


def test_mix_is_the_same_on_numbers_and_arrays():
    numbers = [0, 1, 2**63, 2**64 - 1]
    assert mix(np.array(numbers, np.uint64)).tolist() == [mix(number) for number in numbers]
    assert mix(1) == 0x5692161D100B05E5


@pytest.mark.parametrize("rows", [1, 2, 97, 70_000])
def test_one_source_is_seen_once_an_epoch(rows):
    sampler = Sampler([rows], None, seed=3)
    for epoch in (0, 2):
        seen = [sampler.at(k) for k in range(epoch * rows, (epoch + 1) * rows)]
        assert {epoch for _, epoch, _ in seen} == {epoch}
        assert sorted(row for _, _, row in seen) == list(range(rows))


def test_epochs_differ_and_seeds_differ():
    orders = {tuple(Sampler([50], seed=seed).at(e * 50 + i)[2] for i in range(50)) for seed in (0, 1) for e in (0, 1)}
    assert len(orders) == 4


def test_without_weights_every_row_of_every_source_is_seen_once_an_epoch():
    sampler = Sampler([30, 0, 5, 100])
    for epoch in range(3):
        seen = Counter(sampler.at(k) for k in range(epoch * 135, (epoch + 1) * 135))
        assert seen == Counter((s, epoch, row) for s, rows in enumerate([30, 0, 5, 100]) for row in range(rows))


def test_weights_are_exact_in_every_block_and_sources_keep_their_epochs():
    sampler = Sampler([1000, 300, 7], [2, 1, 1e-9], seed=1)
    for block in (0, 3):
        counts = np.bincount(sampler.at_many(block * BLOCK + np.arange(BLOCK))[0])
        assert counts.tolist() == [BLOCK * 2 // 3, BLOCK // 3, 1]
    first_epoch = [row for source, epoch, row in map(sampler.at, range(5000)) if (source, epoch) == (0, 0)]
    assert sorted(first_epoch) == list(range(1000))


def test_the_order_is_pinned():
    """Changing these numbers changes the order of every run in progress: do not."""
    assert [Sampler([1000], seed=5).at(k) for k in (0, 1, 2, 999, 1000, 10**9)] == PINNED_ONE
    assert [Sampler([1000, 10], [3, 1], seed=5).at(k) for k in (0, 1, 2, 99, 65_536, 10**9)] == PINNED_TWO
    assert Sampler([1000, 10], [3, 1], seed=5).fingerprint[:16] == PINNED_FINGERPRINT


PINNED_ONE = [(0, 0, 862), (0, 0, 214), (0, 0, 891), (0, 0, 537), (0, 1, 972), (0, 1000000, 627)]
PINNED_TWO = [(0, 0, 862), (0, 0, 214), (1, 0, 8), (0, 0, 270), (0, 49, 538), (0, 750000, 852)]
PINNED_FINGERPRINT = "a7cfbf6e63a53da6"


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12).filter(lambda weights: sum(weights) > 1e-3))
def test_a_block_is_cut_by_weight_to_within_a_sample(weights):
    quotas = BLOCK * np.array(weights) / sum(weights)
    counts = np.array(apportioned(weights))
    assert counts.sum() == BLOCK and ((counts > 0) == (quotas > 0)).all()
    if not ((quotas > 0) & (quotas < 1)).any():
        assert (np.abs(counts - quotas) < 1).all()


def test_many_tiny_weights_get_a_sample_each_and_the_largest_pays():
    assert apportioned([1, *[1e-9] * 100]) == (BLOCK - 100, *[1] * 100)


def farthest(order, counts):
    """The most that any source was ahead or behind at any place, in samples."""
    taken = np.cumsum(order[:, None] == np.arange(len(counts)), axis=0)
    return np.abs(taken - np.arange(1, len(order) + 1)[:, None] * counts / counts.sum()).max()


@settings(deadline=None)  # the kernel is compiled in the first example
@given(st.lists(st.integers(1, 60), min_size=2, max_size=10))
def test_no_source_is_ever_a_whole_sample_ahead_or_behind(counts):
    counts = np.array(counts)
    order = spread(counts)
    assert (np.bincount(order, minlength=len(counts)) == counts).all()
    assert farthest(order, counts) <= 1 - 1 / (2 * len(counts) - 2) + 1e-9


def test_a_mixture_keeps_its_weights_at_every_sample_of_a_block():
    weights = np.array([0.5, 0.25, 0.17, 0.03, 0.03, 0.008, 0.006, 0.004, 0.0015, 0.0005])
    sources = Sampler([100] * 10, weights.tolist(), seed=1).at_many(np.arange(BLOCK))[0]
    assert farthest(sources, np.bincount(sources)) < 1
    assert farthest(sources, BLOCK * weights) < 2
    shuffled = np.random.RandomState(0).permutation(sources)  # negative control: a random order, as exact at the end
    assert farthest(shuffled, BLOCK * weights) > 50


MIXED = [
    Sampler([37]),
    Sampler([30, 0, 5, 100], seed=2),
    Sampler([100, 30, 7, 0, 50], [2, 1, 1e-4, 0, 0.5], seed=3),
    Sampler([97, 30, 7], [2, 1, 0], 4, [Phase(700, (0, 1, 1)), Phase(70_000, (1, 0, 0)), Phase(140_000, (1, 1, 1))]),
]


@pytest.mark.parametrize("sampler", MIXED)
def test_at_many_is_at(sampler):
    ks = np.concatenate([np.arange(900), np.arange(69_900, 70_100), [139_999, 140_000, 10**9, 10**12]])
    assert list(zip(*(each.tolist() for each in sampler.at_many(ks)), strict=True)) == [sampler.at(int(k)) for k in ks]
    assert [each.tolist() for each in sampler.at_many(ks[::-1])] == [
        each[::-1].tolist() for each in sampler.at_many(ks)
    ]


@pytest.mark.parametrize("sampler", MIXED)
def test_steps_of_finds_every_draw_of_a_row_and_no_other(sampler):
    limit = 150_000
    drawn = np.stack(sampler.at_many(np.arange(limit)))
    for source, num_rows in enumerate(sampler.num_rows):
        for row in {0, num_rows // 2, num_rows - 1} & set(range(num_rows)):
            here = np.flatnonzero((drawn[0] == source) & (drawn[2] == row)).tolist()
            assert list(takewhile(lambda k: k < limit, sampler.steps_of(source, row))) == here


def test_a_row_that_is_never_drawn_again_has_an_end():
    sampler = Sampler([5, 5], [1, 1], phases=[Phase(100, (1, 0))])
    assert len(list(sampler.steps_of(1, 3))) == 10
    assert len(list(islice(sampler.steps_of(0, 3), 50))) == 50
    assert list(Sampler([5, 5], [1, 0]).steps_of(1, 3)) == []


@pytest.mark.parametrize("sampler", MIXED)
def test_drawn_counts_what_is_drawn(sampler):
    sources = sampler.at_many(np.arange(150_000))[0]
    for k in (0, 1, 699, 700, 701, BLOCK, 70_001, 140_000, 150_000):
        counts = np.bincount(sources[:k], minlength=len(sampler.num_rows)).tolist()
        assert sampler.drawn(k) == ([k] if sampler is MIXED[1] else counts)  # without weights all is one pool


def test_a_phase_changes_weights_and_nothing_before_it():
    start = 100_000
    plain = Sampler([500, 500], [1, 1], seed=2)
    phased = Sampler([500, 500], [1, 1], seed=2, phases=[Phase(start, (0.0, 1.0))])
    before = [phased.at(k) for k in range(start)]
    assert before == [plain.at(k) for k in range(start)]
    drawn = sum(source == 1 for source, _, _ in before)
    after = [phased.at(k) for k in range(start, start + 1000)]
    assert {source for source, _, _ in after} == {1}
    assert [epoch for _, epoch, _ in after] == [(drawn + i) // 500 for i in range(1000)]
    last_epoch = [row for s, epoch, row in [*before, *after] if (s, epoch) == (1, drawn // 500)]
    assert sorted(last_epoch) == list(range(500))


def test_the_fingerprint_tells_orders_apart():
    samplers = [
        Sampler([10, 10]),
        Sampler([10, 11]),
        Sampler([10, 10], seed=1),
        Sampler([10, 10], [1, 1]),
        Sampler([10, 10], [1, 2]),
        Sampler([10, 10], [1, 1], phases=[Phase(5, (1, 2))]),
    ]
    assert len({sampler.fingerprint for sampler in samplers}) == len(samplers)
    assert Sampler([10, 10], [1, 1]).fingerprint == Sampler(np.array([10, 10]), [0.5, 0.5]).fingerprint


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sampler([1, 2], [1]), "1 weights for 2 sources"),
        (lambda: Sampler([1, 2], [1, -1]), "weights must be numbers from 0 up"),
        (lambda: Sampler([1, 2], [1, float("nan")]), "weights must be numbers from 0 up"),
        (lambda: Sampler([1, 2], [0, 0]), "weights must be numbers from 0 up"),
        (lambda: Sampler([1, 0], [1, 1]), "a source without rows has a weight"),
        (lambda: Sampler([0]), "a source without rows has a weight"),
        (lambda: Sampler([1, 2], phases=[Phase(3, (1, 1))]), "give the sources weights to begin with"),
        (lambda: Sampler([1, 2], [1, 1], phases=[Phase(0, (1, 1))]), "phases must start later and later"),
    ],
)
def test_impossible_mixtures_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@given(st.integers(0, 1000), st.integers(1, 50), st.integers(1, 9))
def test_ranks_cut_a_batch_without_gap_or_overlap(first, size, world):
    ks = range(first, first + size)
    parts = [shard_of(ks, rank, world) for rank in range(world)]
    assert [k for part in parts for k in part] == list(ks)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1

"""Layer: arithmetic. The order of samples: each row once an epoch, exact weights, and pinned for ever."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamita.data.sampler import BLOCK, Phase, Sampler, mix, permute, round_keys, shard_of


@given(st.integers(1, 700), st.integers(0, 2**32))
def test_permute_is_a_bijection(n, seed):
    assert sorted(permute(i, n, round_keys(seed)) for i in range(n)) == list(range(n))


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
        counts = Counter(sampler.at(block * (BLOCK + 1) + i)[0] for i in range(BLOCK + 1))
        assert counts == {0: round(BLOCK * 2 / 3), 1: round(BLOCK / 3), 2: 1}
    first_epoch = [row for source, epoch, row in map(sampler.at, range(5000)) if (source, epoch) == (0, 0)]
    assert sorted(first_epoch) == list(range(1000))


def test_the_order_is_pinned():
    """Changing these numbers changes the order of every run in progress: do not."""
    assert [Sampler([1000], seed=5).at(k) for k in (0, 1, 2, 999, 1000, 10**9)] == PINNED_ONE
    assert [Sampler([1000, 10], [3, 1], seed=5).at(k) for k in (0, 1, 2, 99, 65_536, 10**9)] == PINNED_TWO
    assert Sampler([1000, 10], [3, 1], seed=5).fingerprint[:16] == PINNED_FINGERPRINT


PINNED_ONE = [(0, 0, 862), (0, 0, 214), (0, 0, 891), (0, 0, 537), (0, 1, 972), (0, 1000000, 627)]
PINNED_TWO = [(1, 0, 8), (0, 0, 862), (1, 0, 4), (1, 2, 6), (0, 49, 538), (0, 750000, 608)]
PINNED_FINGERPRINT = "e4bc75fd78d4be6f"


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

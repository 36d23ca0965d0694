"""Layer: arithmetic, with real worker processes. The same rows in the same order for any workers and ranks."""

import pickle
from itertools import islice

import numpy as np
import pyarrow as pa
import pytest
import torch

from llamita.data.loader import Steps, batches
from llamita.data.pack import PackedRows, packed
from llamita.data.sampler import BLOCK, Phase, Sampler
from llamita.data.shards import RECORD, Documents, write_shard
from tests.fakes import Texts

BATCH = 9
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores


@pytest.fixture
def rows(tmp_path):
    """Rows of two pools of documents in three shards, all read through memory maps."""
    rng = np.random.RandomState(0)
    shards = []
    for number in range(3):
        lengths = rng.randint(2, 40, 20)
        records = np.zeros(20, RECORD)
        records["end"], records["source"] = np.cumsum(lengths), np.arange(20) % 2
        ids = [rng.randint(0, 258, lengths.sum()).astype(np.uint32)]
        shards.append(write_shard(tmp_path, number, ids, records, pa.table({"name": [""] * 20})))
    documents = Documents(tmp_path, shards, {"source": ["web", "books"], "lang": [""], "kind": [""]})
    _, packings = packed(documents, ["source=web:70% rest"], 16, "corpus", tmp_path / "packing")
    return [PackedRows(documents, 16, packing=packing) for packing in packings]


def sampler_of(rows, seed=4):
    return Sampler([len(part) for part in rows], [0.7, 0.3], seed, [Phase(40, (0.2, 0.8))])


def take(rows, steps, **options):
    options = {"first": 0, "batch_size": BATCH} | options
    return list(islice(batches(rows, sampler_of(rows), **options), steps))


def lines(taken):
    """All rows of some batches, in order, with all that a batch says of them."""
    return [
        (inputs.tolist(), targets.tolist(), starts)
        for batch in taken
        for inputs, targets, starts in zip(batch.inputs_BT, batch.targets_BT, batch.starts, strict=True)
    ]


def test_batches_follow_the_sampler(rows):
    taken = take(rows, 4)
    assert [batch.first for batch in taken] == [0, 9, 18, 27]
    sampler = sampler_of(rows)
    picks = [sampler.at(k) for k in range(4 * BATCH)]
    assert [inputs for inputs, _, _ in lines(taken)] == [rows[s][row].inputs.tolist() for s, _, row in picks]
    assert lines(taken) != lines(islice(batches(rows, sampler_of(rows, 9), first=0, batch_size=BATCH), 4))


@pytest.mark.parametrize("num_workers", [1, 3])
def test_workers_change_nothing(rows, num_workers):
    assert lines(take(rows, 12, num_workers=num_workers)) == lines(take(rows, 12))


def test_what_workers_are_handed_survives_pickling(rows):
    """Workers are forked on Linux today; elsewhere, and in later Pythons, they are handed a pickle."""
    steps = Steps(rows, sampler_of(rows), 0, BATCH, 0, 1)
    handed = pickle.dumps(steps)
    assert lines([pickle.loads(handed)[3]]) == lines([steps[3]]) and len(handed) < 5_000


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7, 8])
def test_ranks_change_nothing(rows, world):
    by_rank = [take(rows, 6, rank=rank, world=world) for rank in range(world)]
    steps = [lines(parts) for parts in zip(*by_rank, strict=True)]
    assert steps == [lines([batch]) for batch in take(rows, 6)]
    assert [batch.first for batch in by_rank[-1]] == [batch.first for batch in take(rows, 6)]


def test_resuming_goes_on_where_it_stopped(rows):
    taken = take(rows, 7)
    assert lines(take(rows, 4, first=taken[2].first + BATCH)) == lines(taken[3:])
    assert lines(take(rows, 2, first=2 * BATCH, batch_size=2 * BATCH)) == lines(taken[2:6])


@pytest.mark.parametrize("first", [0, 1, 39, 41, BLOCK + 35, 10**9, 10**15])
def test_beginning_anywhere_is_the_continuous_stream(rows, first):
    """Batches of any size begun at any sample are cut out of one stream, across phases, blocks and epochs."""
    sampler = sampler_of(rows)
    picks = [sampler.at(k) for k in range(first, first + 2 * BATCH)]
    stream = [rows[source][row].inputs.tolist() for source, _, row in picks]
    for batch_size in (1, 3, BATCH):
        taken = take(rows, 2 * BATCH // batch_size, first=first, batch_size=batch_size)
        assert [inputs for inputs, _, _ in lines(taken)] == stream


@pytest.mark.parametrize(("world", "num_workers"), [(1, 3), (4, 1), (7, 3), (8, 3)])
def test_workers_and_ranks_together_change_nothing(rows, world, num_workers):
    by_rank = [take(rows, 2, first=33, rank=r, world=world, num_workers=num_workers) for r in range(world)]
    assert [lines(parts) for parts in zip(*by_rank, strict=True)] == [
        lines([batch]) for batch in take(rows, 2, first=33)
    ]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_global_generators_are_not_touched(rows, num_workers):
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    take(rows, 3, num_workers=num_workers)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()


def test_one_epoch_holds_every_pair_once():
    documents = np.split(np.arange(1, 301), [7, 40, 41, 90, 200, 260])
    rows = [PackedRows(Texts(documents), 16)]
    one_by_one = batches(rows, Sampler([len(rows[0])], seed=8), first=0, batch_size=1)
    for _ in range(2):
        epoch = torch.cat([batch.inputs_BT[batch.targets_BT >= 0] for batch in islice(one_by_one, len(rows[0]))])
        assert sorted(epoch.tolist()) == [t for document in documents for t in document[:-1].tolist()]


def test_a_batch_needs_a_row_for_each_rank(rows):
    with pytest.raises(ValueError, match=r"a batch of 9 rows cannot be cut among 10 ranks; raise --train\.batch_size"):
        batches(rows, sampler_of(rows), first=0, batch_size=BATCH, world=10)


def test_a_sampler_of_other_rows_is_our_bug(rows):
    with pytest.raises(AssertionError, match="not of these rows"):
        batches(rows[:1], sampler_of(rows), first=0, batch_size=BATCH)

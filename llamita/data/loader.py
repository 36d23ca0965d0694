"""Endless batches by sample number: the same rows in the same order for any number of workers and ranks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from llamita.data.pack import Batch, Rows
from llamita.data.sampler import Sampler, shard_of


@dataclass(frozen=True)
class Steps(Dataset[Batch]):
    """Item t is a rank's part of step t: of the samples first + t * batch_size and on, batch_size in all."""

    rows_by_source: Sequence[Rows]
    sampler: Sampler
    first: int
    batch_size: int
    rank: int
    world: int

    def __getitem__(self, t: int) -> Batch:
        first = self.first + t * self.batch_size
        ks = np.array(shard_of(range(first, first + self.batch_size), self.rank, self.world))
        sources, _, rows = self.sampler.at_many(ks)
        inputs_BT = np.empty((len(ks), self.rows_by_source[0].seq_len), np.int64)
        targets_BT = np.empty_like(inputs_BT)
        starts = [
            self.rows_by_source[source].fill(row, inputs, targets)
            for source, row, inputs, targets in zip(sources.tolist(), rows.tolist(), inputs_BT, targets_BT, strict=True)
        ]
        return Batch(torch.from_numpy(inputs_BT), torch.from_numpy(targets_BT), starts, first)


def unchanged(batch: Any) -> Any:
    return batch


def batches(
    rows_by_source: Sequence[Rows],
    sampler: Sampler,
    *,
    first: int,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    num_workers: int = 0,
) -> Iterator[Batch]:
    """The rank's parts of the batches from sample `first` on, without end; `batch_size` counts all ranks'
    rows.

    Going on after a batch: `first = batch.first + batch_size`. Raises ValueError when a rank would get no
    row.
    """
    assert [len(rows) for rows in rows_by_source] == list(sampler.num_rows), "the sampler is not of these rows"
    if batch_size < world:
        raise ValueError(f"a batch of {batch_size} rows cannot be cut among {world} ranks; raise --train.batch_size")
    steps = Steps(rows_by_source, sampler, first, batch_size, rank, world)
    # Without a generator the loader would draw its workers' seeds from the global one, which training uses.
    return iter(
        DataLoader(
            steps,
            batch_size=None,
            sampler=count(),
            num_workers=num_workers,
            collate_fn=unchanged,
            generator=torch.Generator(),
        )
    )

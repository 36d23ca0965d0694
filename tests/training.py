"""A training run small enough for a test: real loop, real rows, a model of 40,000 weights."""

import dataclasses
from pathlib import Path

import numpy as np
import torch

from llamita.data.pack import Batch, PackedRows, collate
from llamita.model.llama import Llama, build
from llamita.model.shape import Shape
from llamita.train.loop import Trainer
from llamita.train.run import Checkpoint, Data, Log, Optim, Run, Schedule
from tests.fakes import Texts

SHAPE = Shape(dim=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=64, vocab_size=128, max_seq_len=64)
RUN = Run(
    name="test",
    shape=SHAPE,
    steps=20,
    batch_size=4,
    micro_batch_size=2,
    precision="fp32",
    device="cpu",
    data=Data(seq_len=64),
    optim=Optim(lr=1e-2),
    schedule=Schedule(warmup_steps=2),
    checkpoint=Checkpoint(every=5, keep=2),
    log=Log(every=5, eval_every=100, sample_every=100),
)


def rows(seq_len: int = 64, seed: int = 0) -> PackedRows:
    generator = np.random.default_rng(seed)
    return PackedRows(Texts([generator.integers(0, 128, size) for size in generator.integers(5, 200, 60)]), seq_len)


def model(seed: int = 0, dtype: torch.dtype = torch.float32, shape: Shape = SHAPE) -> Llama:
    return build(shape).init_weights(seed).to(dtype)


def batch_of(num_rows: int, seed: int = 0) -> Batch:
    """Rows of unequal numbers of target tokens: some have padding, some have masked targets."""
    packed = rows(seed=seed)
    batch = collate([packed[len(packed) - 1 - index % len(packed)] for index in range(num_rows)], 0)
    targets = batch.targets_BT.clone()
    for row in range(0, num_rows, 3):
        targets[row, : 20 + row] = -1
    return dataclasses.replace(batch, targets_BT=targets)


def trainer(folder: Path, run: Run = RUN, **kwargs) -> Trainer:
    return Trainer(run, folder, model(run.seed, shape=run.shape), [rows(run.data.seq_len)], **kwargs)

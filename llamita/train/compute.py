"""Forward and backward of one batch under any layout; what is left is the same gradient in all of them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from llamita.data.pack import Batch
from llamita.model.llama import Llama
from llamita.parallel import apply, context, pipeline, reduce
from llamita.parallel import loss as parallel_loss
from llamita.parallel.layout import Layout
from llamita.train.objective import PLAIN, Objective, Ways, next_token, num_targets

FirstRows = Callable[[str, Sequence[int], range], Tensor]
Timed = Callable[[str], AbstractContextManager[None]]
"""Told what part of a step it is put around, as `utilization.Timer` is."""


def untimed(part: str) -> AbstractContextManager[None]:
    return nullcontext()


def rows_of(batch: Batch, begin: int, end: int) -> Batch:
    """Some rows of a batch."""
    rows = slice(begin, end)
    return Batch(batch.inputs_BT[rows], batch.targets_BT[rows], batch.starts[rows], batch.first + begin)


def sliced(batch: Batch, number: int) -> list[Batch]:
    """The batch in `number` slices, of as many rows as can be or one fewer."""
    borders = [len(batch.starts) * each // number for each in range(number + 1)]
    return [rows_of(batch, begin, end) for begin, end in pairwise(borders)]


def num_slices(batch_size: int, micro_batch_size: int, num_data_ranks: int) -> int:
    """Forward passes of a step: the same on every rank, even of a world that does not divide the rows evenly. There a
    slice may be one row larger than `micro_batch_size`."""
    most, least = -(-batch_size // num_data_ranks), batch_size // num_data_ranks
    return min(-(-most // micro_batch_size), least)


def accumulate(
    model: Llama, batch: Batch, micro_batch_size: int, dtype: torch.dtype, objective: Objective = next_token
) -> float:
    """Leave the gradient of the mean loss per target token of the whole batch; return that mean in nats.

    The sum of every slice is divided by the tokens of all slices, so that the slicing changes nothing.
    """
    parts = sliced(batch, num_slices(len(batch.starts), micro_batch_size, 1))
    return float(_summed(model, parts, num_targets(batch), dtype, objective, PLAIN))


def _summed(
    model: Llama, parts: Sequence[Batch], tokens: int, dtype: torch.dtype, objective: Objective, ways: Ways,
    before: Callable[[bool], None] = lambda last: None, timed: Timed = untimed,
) -> Tensor:  # fmt: skip
    """`before` is told of each slice's backward pass, whether it is the last. The loss stays on its device: reading it
    would make a GPU wait."""
    losses = []
    for number, part in enumerate(parts):
        before(number == len(parts) - 1)
        device = part.inputs_BT.device.type
        with timed("forward"), torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = objective(model, part, dtype, ways) / max(1, tokens)
        if torch.is_grad_enabled():
            with timed("backward"):
                loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum()


class Compute:
    """A model laid over the ranks of `mesh` (None: this process alone), and what runs batches through it.

    `parts` are what this rank holds: the model, cut in place, or stages of a pipeline. A model on the meta device gets
    its memory and first values from `first_rows`; any other must be the same on all ranks.
    """

    def __init__(
        self, model: Llama, layout: Layout, mesh: DeviceMesh | None, dtype: torch.dtype, device: torch.device,
        *, first_rows: FirstRows | None = None, objective: Objective = next_token, timed: Timed = untimed,
    ):  # fmt: skip
        self.timed = timed
        self.layout, self.mesh, self.dtype, self.device, self.objective = layout, mesh, dtype, device, objective
        self.parts, self.ways, self.pipeline = [model], PLAIN, None
        if mesh is not None and layout.pp > 1:
            self.parts = pipeline.stages(model, layout, mesh.get_local_rank("pp"))
        wide = torch.promote_types(next(model.parameters()).dtype, torch.float32)
        for part in self.parts:
            apply.parallelize(part, layout, mesh, compute_dtype=dtype, reduce_dtype=wide)
            if first_rows is None:
                part.to(device)
            else:
                apply.initialize(part, first_rows, device)
        if mesh is not None:
            self.ways = Ways(
                (lambda batch: context.Context(batch.starts, mesh)) if layout.cp > 1 else PLAIN.attend,
                parallel_loss.linear_cross_entropy if layout.tp > 1 else PLAIN.cross_entropy,
            )
        if mesh is not None and layout.pp > 1:
            self.pipeline = pipeline.Pipeline(self.parts, layout, mesh, self.ways.attend, self._of_hidden, dtype)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Those that this rank holds a part of, under their names in the whole model."""
        return (pair for part in self.parts for pair in part.named_parameters())

    def modules(self) -> Iterator[nn.Module]:
        return (module for part in self.parts for module in part.modules())

    def gradients(self, batch: Batch, batch_size: int, micro_batch_size: int) -> tuple[float, int]:
        """Add the gradient of the mean loss per target token of all ranks' rows; return that mean, in nats, and the
        number of those tokens. `batch` is this rank's rows, of `batch_size` in all."""
        for part in self.parts:
            part.train()
        return self._run(batch, num_slices(batch_size, micro_batch_size, self.layout.num_data_ranks))

    @torch.no_grad()
    def loss(self, batch: Batch, batch_size: int, micro_batch_size: int) -> tuple[float, int]:
        """The same without gradients."""
        for part in self.parts:
            part.eval()
        found = self._run(batch, num_slices(batch_size, micro_batch_size, self.layout.num_data_ranks))
        self.reshard()
        return found

    def reshard(self) -> None:
        """Let go of whole weights that a forward pass without a backward pass has left gathered."""
        for part in self.parts:
            if isinstance(part, FSDPModule):
                part.reshard()

    def _run(self, batch: Batch, number: int) -> tuple[float, int]:
        batch = replace(batch, inputs_BT=batch.inputs_BT.to(self.device), targets_BT=batch.targets_BT.to(self.device))
        mine = torch.tensor(num_targets(batch), dtype=torch.float64)
        with self.timed("communication"):
            tokens = int(reduce.total(mine, self.mesh, ("dp", "fsdp")))
        slices = [self._cut(part) for part in sliced(batch, number)]
        if self.pipeline is not None:
            step = self.pipeline.step if torch.is_grad_enabled() else self.pipeline.evaluate
            with self.timed("forward"):  # and backward, interleaved
                loss = torch.tensor(step(slices, max(1, tokens)), dtype=torch.float64)
        elif self.mesh is None:
            loss = _summed(self.parts[0], slices, tokens, self.dtype, self.objective, self.ways, timed=self.timed)
        else:
            before = partial(reduce.sum_gradients, self.parts[0])
            loss = _summed(self.parts[0], slices, tokens, self.dtype, self.objective, self.ways, before, self.timed)
        with self.timed("communication"):
            return float(reduce.total(loss.double().cpu(), self.mesh, ("dp", "fsdp", "cp", "pp"))), tokens

    def _cut(self, batch: Batch) -> Batch:
        """A rank's pieces of each row, where cp cuts them."""
        if self.mesh is None or self.layout.cp == 1:
            return batch
        inputs_BT, targets_BT = (context.cut(x_BT, self.mesh) for x_BT in (batch.inputs_BT, batch.targets_BT))
        return replace(batch, inputs_BT=inputs_BT, targets_BT=targets_BT)

    def _of_hidden(self, part: Llama, hidden_BTD: Tensor, batch: Batch) -> Tensor:
        return self.objective.of_hidden(part, hidden_BTD, batch, self.dtype, self.ways)

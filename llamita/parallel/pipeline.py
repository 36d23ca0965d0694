"""Pipeline parallelism: the layers cut into stages, run by the schedules of torch.distributed.pipelining.

A rank of pp holds one stage (1F1B: arXiv 2104.04473, section 2.2.1) or two, which halves the wait for the pipeline to
fill (interleaved: the same, section 2.2.2), and may put off the weights' gradients to where it would wait (zero bubble,
ZB1P: arXiv 2401.10241). Hidden states alone travel between stages: all ranks of pp read the same rows, so each knows
the documents of every micro-batch. Shapes: B rows, T tokens, D dim.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import pipelining
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from llamita.kernels.attention import Attend
from llamita.parallel.layout import Layout

AXIS = "pp"
SCHEDULES: dict[str, Any] = {
    "1f1b": pipelining.Schedule1F1B,
    "interleaved": pipelining.ScheduleInterleaved1F1B,
    "zero-bubble": pipelining.ScheduleInterleavedZeroBubble,
}


class MicroBatch(Protocol):
    """What is read of a batch here."""

    @property
    def inputs_BT(self) -> Tensor: ...


def layer_counts(num_layers: int, num_stages: int) -> list[int]:
    """How many layers each stage has: the embedding and the head count as one each (Llama 3, arXiv 2407.21783,
    section 3.3.2), and what does not divide goes to the middle. Raises ValueError with fewer layers than stages."""
    if num_layers < num_stages:
        raise ValueError(f"{num_layers} layers cannot fill {num_stages} pipeline stages: lower parallel.pp")
    ends = (0, num_stages - 1)
    counts = [1] * num_stages
    for _ in range(num_layers - num_stages):
        least = min(range(num_stages), key=lambda stage: (counts[stage] + ends.count(stage), stage in ends))
        counts[least] += 1
    return counts


def stage_numbers(layout: Layout, rank: int) -> list[int]:
    """The stages of a rank of pp, in the order of the layers."""
    return [rank + turn * layout.pp for turn in range(layout.stages_per_rank)]


def stages(model: Any, layout: Layout, rank: int) -> list[Any]:
    """The stages of a rank of pp: the model, pruned in place, and, where a rank has two, another with the same code.

    What a stage does not hold is None in it (`layers[i]`, `tok_embeddings`, `norm` and `output`), and what it holds
    keeps its name: the names of all ranks together are those of the model. Weights may be on the meta device.
    Raises ValueError with fewer layers than stages.
    """
    numbers = stage_numbers(layout, rank)
    last = layout.pp * len(numbers) - 1
    borders = [0, *accumulate(layer_counts(len(model.layers), last + 1))]
    weights = {id(weight): weight for weight in model.parameters()}
    parts = [model, *(copy.deepcopy(model, dict(weights)) for _ in numbers[1:])]
    for part, number in zip(parts, numbers, strict=True):
        for layer in range(len(part.layers)):
            if not borders[number] <= layer < borders[number + 1]:
                part.layers[layer] = None
        if number > 0:
            part.tok_embeddings = None
        if number < last:
            part.norm = part.output = None
    return parts


class Pipeline:
    """Runs batches through the stages of all ranks of pp; `parts` are what `stages` gave, sharded or not.

    `attend` makes a micro-batch's Attend, on every rank by itself. `loss(part, hidden_BTD, batch)` is the sum of the
    loss over its target tokens, of the normed residual stream and `part.output`. With a `dtype` of bfloat16 stages
    run under autocast. The stages' `forward` becomes what the schedule calls.
    """

    def __init__(
        self,
        parts: Sequence[Any],
        layout: Layout,
        mesh: DeviceMesh,
        attend: Callable[[Any], Attend],
        loss: Callable[[Any, Tensor, Any], Tensor],
        dtype: torch.dtype = torch.float32,
    ):
        self.layout, self.attend, self.loss, self.dtype = layout, attend, loss, dtype
        self.device = next(parts[0].parameters()).device
        self.stages = []
        for part, number in zip(parts, stage_numbers(layout, mesh.get_local_rank(AXIS)), strict=True):
            part.forward = partial(self._forward, part)
            if isinstance(part, FSDPModule):
                # One gathering a step, not two a micro-batch (Llama 3, section 3.3.2); and zero bubble looks for the
                # weights of a stage between its passes.
                part.set_reshard_after_forward(False)
            num_stages = layout.pp * len(parts)
            group = mesh.get_group(AXIS)
            self.stages.append(pipelining.PipelineStage(part, number, num_stages, self.device, group=group))
        self.schedule: Any = None
        self.made_for: tuple[int, torch.Size] | None = None

    def step(self, batches: Sequence[MicroBatch], num_targets: int) -> float:
        """Add the gradient of the loss over all micro-batches, divided by `num_targets`; return that loss in nats.

        It is 0 on the ranks that do not hold the last stage, so that a sum over pp tells it to all. Raises ValueError
        when micro-batches differ in size, or their number does not suit the schedule.
        """
        return self._run(batches, num_targets, train=True)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[MicroBatch], num_targets: int) -> float:
        """The same loss without gradients."""
        return self._run(batches, num_targets, train=False)

    def _run(self, batches: Sequence[MicroBatch], num_targets: int, train: bool) -> float:
        self.batches, self.num_targets = batches, num_targets
        self.attends = [self.attend(batch) for batch in batches]
        schedule = self._schedule_for(batches)
        numbers = torch.arange(len(batches))
        inputs = (numbers,) if self.stages[0].is_first else ()
        losses: list[Tensor] = []
        run = schedule.step if train else schedule.eval
        run(*inputs, number=numbers, target=numbers, losses=losses, return_outputs=False)
        return float(sum(losses))

    def _forward(self, part: Any, received: Tensor, number: Tensor) -> Tensor:
        """One micro-batch through a stage: the hidden states [B, T, D], or, of the last stage, the loss."""
        batch, attend = self.batches[int(number)], self.attends[int(number)]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            x_BTD = received if part.tok_embeddings is None else part.tok_embeddings(batch.inputs_BT)
            x_BTD = part.through(x_BTD, attend.positions(batch.inputs_BT), attend)
            return x_BTD if part.norm is None else self.loss(part, part.norm(x_BTD), batch) / self.num_targets

    def _schedule_for(self, batches: Sequence[MicroBatch]) -> Any:
        """The one of the last step if as many micro-batches of that size came again: it keeps buffers for them."""
        sizes = {batch.inputs_BT.shape for batch in batches}
        if len(sizes) != 1:
            raise ValueError(
                f"micro-batches of {len(sizes)} sizes cannot go down one pipeline: let micro_batch_size divide the "
                "rows that a rank reads of a batch"
            )
        key = (len(batches), sizes.pop())
        if key != self.made_for:
            held = self.stages if len(self.stages) > 1 else self.stages[0]
            make = SCHEDULES[self.layout.schedule]
            self.schedule, self.made_for = make(held, len(batches), loss_fn=_same, scale_grads=False), key
        return self.schedule


def _same(loss: Tensor, number: Tensor) -> Tensor:
    """The last stage's output is the loss already: its head is sharded with it."""
    return loss

"""What a step minimizes: pure functions of a model and a batch. Sums, never means: the loop divides by all tokens."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from llamita.data.pack import Batch
from llamita.kernels.attention import Attend, Documents
from llamita.kernels.loss import NO_LOSS, linear_cross_entropy
from llamita.model.llama import Llama


def documents(batch: Batch) -> Attend:
    """Packed rows: no document sees another."""
    return Documents(batch.starts)


class Ways(NamedTuple):
    """How a layout attends and sums the loss; without a mesh, the kernels' own."""

    attend: Callable[[Batch], Attend] = documents
    cross_entropy: Callable[[Tensor, Tensor, Tensor], Tensor] = linear_cross_entropy


PLAIN = Ways()


class Objective(NamedTuple):
    """What of the hidden states [B, T, D], the head and the batch is minimized: a sum over target tokens, in nats.

    Apart from the forward pass, so that a pipeline's last stage can do it. `dtype` is that of the head's matmul.
    """

    of_hidden: Callable[[Llama, Tensor, Batch, torch.dtype, Ways], Tensor]

    def __call__(self, model: Llama, batch: Batch, dtype: torch.dtype, ways: Ways = PLAIN) -> Tensor:
        return self.of_hidden(model, model.hidden(batch.inputs_BT, ways.attend(batch)), batch, dtype, ways)


def _next_token(model: Llama, hidden_BTD: Tensor, batch: Batch, dtype: torch.dtype, ways: Ways) -> Tensor:
    return ways.cross_entropy(hidden_BTD.flatten(0, 1).to(dtype), model.output.weight, batch.targets_BT.flatten())


next_token = Objective(_next_token)
"""-log p(target | its document so far): pretraining, and SFT by its targets."""


def num_targets(batch: Batch) -> int:
    return int((batch.targets_BT != NO_LOSS).sum())

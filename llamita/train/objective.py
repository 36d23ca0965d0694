"""What a step minimizes: pure functions of a model and a batch. Sums, never means: the loop divides by all tokens."""

from torch import Tensor

from llamita.data.pack import Batch
from llamita.kernels.attention import Documents
from llamita.kernels.loss import NO_LOSS, linear_cross_entropy
from llamita.model.llama import Llama


def next_token(model: Llama, batch: Batch, dtype) -> Tensor:
    """Sum over target tokens of -log p(target | its document so far), in nats: pretraining, and SFT by its targets.

    `dtype` is that of the head's matmul.
    """
    hidden_BTD = model.hidden(batch.inputs_BT, Documents(batch.starts))
    return linear_cross_entropy(hidden_BTD.flatten(0, 1).to(dtype), model.output.weight, batch.targets_BT.flatten())


def num_targets(batch: Batch) -> int:
    return int((batch.targets_BT != NO_LOSS).sum())

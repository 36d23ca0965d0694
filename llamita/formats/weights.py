"""A model's weights one at a time, wherever they lie: what every reader gives and every writer takes.

Names and layouts are ours (`names.py`); a tied head is no tensor of its own. So a model of any size is converted
in the memory of its largest tensor.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llamita.model.llama import Llama, build
from llamita.model.shape import Shape

# Kinds that are a dtype of torch; all others are GGUF's block formats, which `load` gives in float32.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
KINDS = {dtype: kind for kind, dtype in DTYPES.items()}


def sizes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Our name -> size of every tensor of a model, a tied head left out, in the model's order."""
    return {name: tuple(weight.shape) for name, weight in build(shape, device="meta").named_parameters()}


@dataclass(frozen=True)
class Weights:
    """`kinds`: our name -> how the tensor is stored ("F32", "BF16", "Q4_K", ...), for every name of `sizes(shape)`.

    `load(name)` gives the tensor on the CPU in our layout, in the dtype of its kind, float32 where that is none.
    It may be mapped from its file: copy before changing it. ValueError where the file is damaged.
    """

    shape: Shape
    kinds: Mapping[str, str]
    load: Callable[[str], Tensor]

    @classmethod
    def of(cls, model: Llama) -> "Weights":
        """A model in memory. Raises ValueError for one that is not plain: with adapters, or quantized."""
        weights = dict(model.named_parameters())
        if strange := sorted(weights.keys() ^ sizes(model.shape).keys()):
            raise ValueError(
                f"{strange[0]} is not a plain Llama's weight: merge adapters and undo quantization before export"
            )
        kinds = {name: KINDS[weight.dtype] for name, weight in weights.items()}
        return cls(model.shape, kinds, lambda name: weights[name].detach().cpu())

    @property
    def dtype(self) -> torch.dtype:
        """The one dtype that holds every tensor as it is: the matrices', or float32 where they differ or are quantized.

        Norms may be stored wider (GGUF's are float32) as long as their values fit.
        """
        matrices = {kind for name, kind in self.kinds.items() if "norm" not in name}
        dtype = DTYPES.get(matrices.pop(), torch.float32) if len(matrices) == 1 else torch.float32
        for name in self.kinds:
            if "norm" in name and DTYPES[self.kinds[name]] != dtype:
                norm = self.load(name)
                if not torch.equal(norm.to(dtype).double(), norm.double()):
                    return torch.float32
        return dtype

    def model(self, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = torch.float32) -> Llama:
        """The whole model in memory, in `dtype` (None: the weights' own)."""
        model = build(self.shape, device=device, dtype=dtype or self.dtype)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.copy_(self.load(name))
        return model


def check_rows(weights: Weights, vocab_size: int) -> None:
    """Raises ValueError when a tokenizer of `vocab_size` ids is too large for the model."""
    if vocab_size > weights.shape.vocab_size:
        raise ValueError(
            f"the tokenizer has {vocab_size} tokens, but the model has {weights.shape.vocab_size}: "
            "give the tokenizer that the model was trained with, or more rows by `llamita surgery vocab`"
        )

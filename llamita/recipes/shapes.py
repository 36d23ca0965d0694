"""What `show` tells of a model: every tensor, exact counts, memory, and the KV cache beside what MHA would cost."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.table import Table

from llamita.config import nearest
from llamita.formats import open
from llamita.formats.weights import sizes
from llamita.model.shape import PRESETS, Shape
from llamita.recipes import stages
from llamita.recipes.runs import RECIPES

# Bits per weight: GGUF's blocks of 32 carry a 16-bit scale, its super-blocks of 256 more (ggml, ggml-common.h).
BITS = {"F32": 32.0, "BF16": 16.0, "Q8_0": 8.5, "Q4_0": 4.5}


def named(name: str) -> Shape:
    """The shape of a recipe, a preset, or of a model on disk in any format. Raises ValueError for anything else."""
    shapes = {recipe: make().shape for recipe, make in RECIPES.items()} | PRESETS
    if name in shapes:
        return shapes[name]
    path = Path(name)
    if (path / "run.toml").is_file():
        return stages.newest_run(path).shape
    if path.exists():
        return open.read(path).shape
    raise ValueError(f"no recipe, shape or file is called {name!r}{nearest(name, shapes)}")


def describe(shape: Shape, contexts: Sequence[int]) -> dict[str, Any]:
    """Tensors by name ({} for a layer's number) with size and number, parameters, FLOPs, bytes of weights and cache.

    The model is built on the meta device, so 405B costs no memory.
    """
    tensors: dict[str, dict[str, Any]] = {}
    for name, size in sizes(shape).items():
        general = re.sub(r"^layers\.\d+", "layers.{}", name)
        row = tensors.setdefault(general, {"size": list(size), "count": 0, "parameters": 0})
        row["count"] += 1
        row["parameters"] += math.prod(size)
    num_params = sum(row["parameters"] for row in tensors.values())
    assert num_params == shape.num_params, "counting and the formula agree"
    gqa = shape.kv_bytes_per_token()
    mha = gqa * shape.num_heads // shape.num_kv_heads
    return {
        "tensors": tensors,
        "parameters": num_params,
        "parameters_without_embeddings": num_params - math.prod(tensors["tok_embeddings.weight"]["size"]),
        "weight_bytes": {kind: round(num_params * bits / 8) for kind, bits in BITS.items()},
        "kv_bytes_per_token": {"gqa": gqa, "mha": mha},
        "contexts": {
            str(context): {
                "flops_per_token": shape.forward_flops_per_token(context),
                "kv_bytes_gqa": gqa * context,
                "kv_bytes_mha": mha * context,
            }
            for context in contexts
        },
    }


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:,.4g} {unit}"
        count /= 1024
    return f"{count:,.4g} TiB"


def show(shape: Shape, told: dict[str, Any], console: Console) -> None:
    """`describe`'s answer as tables."""
    tensors = Table(title=str(shape), title_justify="left", box=None)
    for column in ("tensor", "size", "number", "parameters"):
        tensors.add_column(column, justify="left" if column == "tensor" else "right")
    for name, row in told["tensors"].items():
        size = " x ".join(f"{n:,}" for n in row["size"])
        tensors.add_row(name, size, str(row["count"]), f"{row['parameters']:,}")
    tensors.add_row("all", "", "", f"{told['parameters']:,}")
    memory = Table(title="weights", title_justify="left", box=None)
    for kind in told["weight_bytes"]:
        memory.add_column(kind, justify="right")
    memory.add_row(*map(_bytes, told["weight_bytes"].values()))
    per_token = told["kv_bytes_per_token"]
    cache = Table(title=f"KV cache in bf16: {per_token['gqa']:,} bytes a token, {per_token['mha']:,} with MHA",
                  title_justify="left", box=None)  # fmt: skip
    for column in ("context", f"GQA ({shape.num_kv_heads} KV heads)", f"MHA ({shape.num_heads})", "FLOPs a token"):
        cache.add_column(column, justify="right")
    for context, row in told["contexts"].items():
        cache.add_row(f"{int(context):,}", _bytes(row["kv_bytes_gqa"]), _bytes(row["kv_bytes_mha"]),
                      f"{row['flops_per_token']:.4g}")  # fmt: skip
    console.print(Group(tensors, "", memory, "", cache))

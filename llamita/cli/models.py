"""The verbs of models on disk. Each is a thin call of a public function; heavy imports wait until it is called."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional

Folder = Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
Json = Annotated[bool, tyro.conf.arg(name="json")]
Dtype = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_k_m", "q5_k_m", "q6_k"]


def told(proof: dict[str, Any], as_json: bool = False) -> None:
    """What each reader found, a line each, or the whole proof as JSON."""
    from llamita.recipes.card import proof_lines

    print(json.dumps(proof) if as_json else "\n".join(proof_lines(proof)))


def import_(
    model: Positional[str], out: Folder, dtype: Literal["f32", "f16", "bf16"] | None = None, license: str = "",
    as_json: Json = False,
) -> None:  # fmt: skip
    """Make a model folder of any plain Llama: Hugging Face, Meta, GGUF, llama2.c, by path or by the hub's name.

    Args:
        model: Path, or OWNER/NAME or OWNER/NAME/FILE.gguf on the hub (wants the network and the hub extra).
        out: Model folder to write; it stands only once it is proved.
        dtype: How weights are stored; as they are unless given, float32 where they are quantized.
        license: Licence for the model card; the source's own unless given.
        as_json: Print the proof as one JSON object.
    """
    from llamita.recipes import convert

    found = convert.fetch(model)
    told(convert.convert(found, out, kind=dtype and dtype.upper(), license=license), as_json)


def export(
    model: Positional[Path], out: Folder, format: Literal["hf", "meta", "gguf"] = "hf", dtype: Dtype | None = None,
    license: str = "", as_json: Json = False,
) -> None:  # fmt: skip
    """Write a model for transformers, Meta's code or llama.cpp, read it back and prove that nothing changed.

    Args:
        model: Run folder, or a model in any format.
        out: Folder to write; it stands only once it is proved.
        format: hf: transformers, vLLM, MLX; meta: consolidated.00.pth; gguf: llama.cpp and Ollama, with a Modelfile.
        dtype: How weights are stored; as they are unless given. q8_0 and q4_0 are GGUF's; q4_k_m and its kin
            are made by llama.cpp's own quantizer, where llama-cpp-python is installed.
        license: Licence for the model card.
        as_json: Print the proof as one JSON object.
    """
    from llamita.recipes import convert

    told(convert.convert(model, out, form=format, kind=dtype and dtype.upper(), license=license), as_json)


def show(model: Positional[str], context: tuple[int, ...] = (8192, 131_072), as_json: Json = False) -> None:
    """A model's tensors, parameters, memory, FLOPs per token and KV cache, with GQA beside what MHA would cost.

    Args:
        model: Recipe, shape preset (llama3.1-405b), or a model on disk.
        context: Tokens of context, one or several numbers.
        as_json: Print one JSON object.
    """
    from rich.console import Console

    from llamita.recipes import shapes

    if bad := [length for length in context if length < 1]:
        raise ValueError(f"--context {bad[0]}: give at least 1 token")
    shape = shapes.named(model)
    told = shapes.describe(shape, context)
    if as_json:
        print(json.dumps(told))
    else:
        shapes.show(shape, told, Console(highlight=False, width=None if sys.stdout.isatty() else 110))

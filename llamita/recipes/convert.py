"""From any format to any other, proved: what `import` and `export` call."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from llamita import log, runtime
from llamita.formats import gguf, hf, llama_cpp, meta, open
from llamita.formats.files import replacing
from llamita.formats.proof import prove, seal
from llamita.formats.weights import KINDS, Weights, check_rows
from llamita.recipes import card, stages
from llamita.recipes.modelfile import modelfile

FORMATS = {"hf": hf, "meta": meta, "gguf": gguf}
KINDS_OF = {
    "hf": ("F32", "F16", "BF16", "F64"),
    "meta": ("F32", "F16", "BF16"),
    "gguf": ("F32", "F16", "BF16", "Q8_0", "Q4_0", *llama_cpp.QUANTIZERS),
}
# What a model needs of a hub's repository: no pickles, no second copy of the weights in another format.
HUB_FILES = ["config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*",
             "special_tokens_map.json", "chat_template.jinja"]  # fmt: skip
MEMORY_SHARE = 0.8  # of what is free may be filled by a proof


def fetch(name: str) -> Path:
    """A path, or else a model of the Hugging Face hub, downloaded once: OWNER/NAME, or OWNER/NAME/FILE.gguf.

    Raises ValueError when there is neither.
    """
    path = Path(name)
    parts = name.split("/")
    if path.exists() or len(parts) not in (2, 3):
        return path
    try:
        from huggingface_hub import hf_hub_download, snapshot_download
    except ImportError:
        raise ValueError(f"{name} does not exist; to fetch it from the hub: pip install 'llamita[hub]'") from None
    try:
        if len(parts) == 3:
            return Path(hf_hub_download("/".join(parts[:2]), parts[2]))
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{name} is no file here and cannot be had from the hub: {reason}") from None


def open_any(path: Path) -> tuple[Weights, Any]:
    """Weights and tokenizer of a run folder (its newest whole checkpoint) or of a model in any format."""
    if (path / "run.toml").is_file():
        model, tokenizer = stages.open_model(path)
        return Weights.of(model), tokenizer
    return open.read(path), open.tokenizer(path)


def watched(weights: Weights, what: str) -> Weights:
    """The same weights, telling how far each pass over them is, with the time that is left."""
    total, done, eta = weights.shape.num_params, 0, log.Eta()

    def load(name: str) -> torch.Tensor:
        nonlocal done, eta
        tensor = weights.load(name)
        done += tensor.numel()
        eta.update(done / total, f"{what}: {100 * done // total}% of {total:,} parameters")
        if done >= total:
            eta.end()
            done, eta = 0, log.Eta()
        return tensor

    return dataclasses.replace(weights, load=load)


def convert(path: Path, out: Path, *, form: str = "hf", kind: str | None = None, license: str = "") -> dict[str, Any]:
    """Write the model at `path` to the folder `out` in another format, read it back and prove it equal.

    `form` is "hf", "meta" or "gguf"; `kind` the storage of the matrices, F32, F16, BF16, for gguf also Q8_0, Q4_0,
    and what llama.cpp's own quantizer makes (`llama_cpp.QUANTIZERS`); None keeps the weights' own. Returns the proof.
    Raises ValueError naming what differs; `out` then stays as it was, so what stands there has always been proved.
    """
    weights, tokenizer = open_any(path)
    return write(weights, tokenizer, out, form=form, kind=kind, facts=card.known(path, license))


def write(weights: Weights, tokenizer: Any, out: Path, *, form: str, kind: str | None, facts: card.Facts) -> dict:
    """The second half of `convert`, for weights that are at hand."""
    check_rows(weights, tokenizer.vocab_size)
    if form not in FORMATS:
        raise ValueError(f"no format is called {form!r}; there are: {', '.join(FORMATS)}")
    kind = kind or KINDS[weights.dtype]
    if kind not in KINDS_OF[form]:
        raise ValueError(f"{form} has no {kind}; there are: {', '.join(KINDS_OF[form])}")
    others = [path.name for path in out.glob("*.gguf") if path.name != f"model-{kind.lower()}.gguf"]
    if form == "gguf" and others:
        raise ValueError(f"{out} holds {others[0]}, which would be deleted: choose another folder for {kind}")
    with replacing(out) as new:
        notes = _write(watched(weights, "writing"), tokenizer, new, form, kind)
        if form == "gguf":
            try:
                (new / "Modelfile").write_text(modelfile(tokenizer, open.locate(new)[1].name, weights.shape), "utf-8")
            except ValueError as error:
                notes.append(f"no Modelfile for Ollama: {error}")
        free = MEMORY_SHARE * runtime.free_memory()
        proof = prove(watched(weights, "proving"), tokenizer, new, form, kind, max_memory=free)
        (new / "README.md").write_text(card.text(weights.shape, proof, facts, notes), "utf-8")
        seal(new, proof)
    for note in notes:
        log.say(f"note: {note}")
    return proof


def _write(weights: Weights, tokenizer: Any, folder: Path, form: str, kind: str) -> list[str]:
    """Fill the folder; what the user should know is returned, a line each."""
    if form == "gguf" and kind in llama_cpp.QUANTIZERS:
        llama_cpp.require(kind)
        gguf.write(weights, tokenizer, folder, "F32" if weights.dtype == torch.float64 else KINDS[weights.dtype])
        whole = open.locate(folder)[1]
        notes = llama_cpp.quantize(whole, folder / f"model-{kind.lower()}.gguf", kind)
        whole.unlink()
        return notes
    return FORMATS[form].write(weights, tokenizer, folder, kind)

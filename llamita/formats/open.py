"""A model, whatever its format: found on disk or on the hub, told by what lies there."""

from pathlib import Path

from llamita.formats import gguf, hf, llama2c, meta
from llamita.formats.weights import Weights
from llamita.tokenizer.carried import AnyTokenizer
from llamita.tokenizer.llamacpp import from_gguf
from llamita.tokenizer.opened import open_tokenizer
from llamita.tokenizer.pieces import from_llama2c


def locate(path: Path | str) -> tuple[str, Path]:
    """("hf", folder), ("meta", folder), ("gguf", file) or ("llama2c", file).

    A folder may also hold one GGUF file, or a model in `model/`, as a run that has been exported. Raises ValueError
    for anything else.
    """
    path = Path(path)
    if path.is_dir():
        there = {file.name for file in path.iterdir() if file.is_file()}
        if "config.json" in there and there & {hf.WEIGHTS, hf.INDEX}:  # it may also lie beside another format
            return "hf", path
        if meta.PARAMS in there:
            return "meta", path
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1:
            return "gguf", files[0]
        if files:
            raise ValueError(f"{path} holds {len(files)} GGUF files: name one of them, as {files[0]}")
        if (path / "model").is_dir():
            return locate(path / "model")
        if "config.json" in there:  # hf.read knows what is missing
            return "hf", path
    if path.is_file():
        with path.open("rb") as file:
            head = file.read(4)
        if head == b"GGUF":
            return "gguf", path
        if path.suffix == ".bin":
            return "llama2c", path
    if (path / "run.toml").is_file():
        raise ValueError(f"{path} is a run: llamita export {path} --out {path / 'model'} makes a model of it")
    raise ValueError(
        f"{path} is no model: give a folder with config.json (Hugging Face) or params.json (Meta), "
        "a .gguf file, or a llama2.c .bin file"
    )


def read(path: Path | str) -> Weights:
    """The weights at `path`, one at a time. Raises ValueError with the reason for all that is not a plain Llama."""
    kind, place = locate(path)
    return {"hf": hf.read, "meta": meta.read, "gguf": gguf.read, "llama2c": llama2c.read}[kind](place)


def tokenizer(path: Path | str) -> AnyTokenizer:
    """The tokenizer that lies with the weights at `path`: in the folder, in the GGUF file, or tokenizer.bin beside."""
    kind, place = locate(path)
    if kind == "gguf":
        return from_gguf(gguf.read_fields(place))
    if kind == "llama2c":
        return from_llama2c(place.with_name("tokenizer.bin"), llama2c.read(place).shape.vocab_size)
    return open_tokenizer(place)

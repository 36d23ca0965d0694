"""Model folders as Hugging Face keeps them: `LlamaForCausalLM`, plain enough for every reader of the format.

config.json carries rotary settings and dtype under the keys of transformers 4 and of transformers 5: a reader
that knows the other set alone takes defaults in silence (mlx-lm, v5 keys: RoPE base 10,000, logits off by 8).
"""

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from llamita.formats.names import hf_names
from llamita.model.llama import Llama, build
from llamita.model.shape import RopeScaling, Shape
from llamita.tokenizer import Tokenizer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Bounds on what a stranger's config.json may ask for, far above any Llama.
MAX_JSON_BYTES, MAX_LAYERS, MAX_SIZE = 64 << 20, 4096, 1 << 24


def write(
    model: Llama,
    tokenizer: Tokenizer,
    folder: Path | str,
    *,
    dtype: torch.dtype | None = None,
    card: str | None = None,
) -> None:
    """Write a whole model folder, weights cast to `dtype` (None: the model's own), `card` as its README.md.

    An older folder is replaced once the new one is whole and on disk. It stays as it was where the disk fails
    (OSError) and where it holds files that no model folder of ours has (ValueError).
    """
    folder = Path(folder).resolve()
    if folder.is_file():
        raise ValueError(f"{folder} is a file: give the name of a folder")
    if tokenizer.vocab_size > model.shape.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but the model has {model.shape.vocab_size}: "
            "give the tokenizer that the model was trained with"
        )
    dtype = dtype or model.tok_embeddings.weight.dtype
    new = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        _write_json(new / "config.json", _config(model.shape, tokenizer, dtype))
        _write_json(new / "generation_config.json", _generation_config(tokenizer))
        save_file(_tensors(model, dtype), new / WEIGHTS, metadata={"format": "pt"})
        shutil.copymode(new / "config.json", new / WEIGHTS)  # safetensors lets the owner alone read it
        tokenizer.save(new)
        if card is not None:
            (new / "README.md").write_text(card, encoding="utf-8")
        swap(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _config(shape: Shape, tokenizer: Tokenizer, dtype: torch.dtype) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default"}
    if scaling := shape.rope_scaling:
        rope = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_seq_len,
        }
    dtype_name = str(dtype).removeprefix("torch.")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.dim,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.ffn_dim,
        "vocab_size": shape.vocab_size,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": shape.max_seq_len,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_scaling": rope if shape.rope_scaling else None,
        "rope_parameters": rope | {"rope_theta": shape.rope_theta},
        "torch_dtype": dtype_name,
        "dtype": dtype_name,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": sorted(tokenizer.stop_ids),
        "use_cache": True,
    }


def _generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """Every token that ends a reply stops generation; temperature and top_p as in Meta's own folders."""
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": sorted(tokenizer.stop_ids),
        "pad_token_id": tokenizer.pad_id,
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
    }


def _tensors(model: Llama, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    names = hf_names(model.shape.num_layers, tied=model.shape.tied)
    weights = dict(model.named_parameters())
    if strange := sorted(weights.keys() ^ names.keys()):
        raise ValueError(
            f"{strange[0]} is not a plain Llama's weight: merge adapters and undo quantization before export"
        )
    return {names[ours]: weight.detach().to("cpu", dtype).contiguous() for ours, weight in weights.items()}


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def swap(new: Path, folder: Path) -> None:
    """Put the whole folder `new` in the place of `folder`; at no moment are both gone."""
    for path in new.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    if not folder.exists():
        os.replace(new, folder)
        return
    ours = {path.name for path in new.iterdir()} | {"README.md", "proof.json"}
    if strange := sorted({path.name for path in folder.iterdir()} - ours):
        raise ValueError(
            f"{folder} holds {strange[0]!r}, which would be deleted: move it away or choose another folder"
        )
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    os.replace(folder, old)
    try:
        os.replace(new, folder)
    except OSError:
        os.replace(old, folder)
        raise
    shutil.rmtree(old)


def read_shape(folder: Path | str) -> Shape:
    """The shape that config.json states, under the keys of transformers 4, of 5, or both alike.

    Raises ValueError with the reason for anything that is not exactly a Llama 3.
    """
    path = Path(folder) / "config.json"
    config = read_json(path)
    _refuse_others(config, path)
    num_heads = _whole(config, "num_attention_heads", path)
    shape = Shape(
        dim=_whole(config, "hidden_size", path),
        num_layers=_whole(config, "num_hidden_layers", path, limit=MAX_LAYERS),
        num_heads=num_heads,
        num_kv_heads=_whole(config, "num_key_value_heads", path, num_heads),
        ffn_dim=_whole(config, "intermediate_size", path),
        vocab_size=_whole(config, "vocab_size", path),
        tied=bool(config.get("tie_word_embeddings")),
        max_seq_len=_whole(config, "max_position_embeddings", path, 2048),
        norm_eps=_number(config, "rms_norm_eps", path, 1e-6),
        **_rope(config, path),
    )
    if config.get("head_dim") not in (None, shape.head_dim):
        raise ValueError(
            f"{path}: head_dim is {config['head_dim']}, but a Llama 3 has hidden_size / num_attention_heads, "
            f"{shape.head_dim}"
        )
    return shape


def _refuse_others(config: dict[str, Any], path: Path) -> None:
    kind, architectures = config.get("model_type"), config.get("architectures") or ["LlamaForCausalLM"]
    if kind != "llama" or architectures != ["LlamaForCausalLM"]:
        raise ValueError(f"{path}: model_type {kind!r} with architectures {architectures} is not a LlamaForCausalLM")
    plain = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "quantization_config": None}
    for key, value in plain.items():
        if (config.get(key) or value) != value:
            raise ValueError(f"{path}: {key} is {config[key]!r}, but a Llama 3 has {value!r}")


def _rope(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Shape's `rope_theta` and `rope_scaling`. A file that states them twice must say the same twice."""
    base = {"rope_theta": config["rope_theta"]} if config.get("rope_theta") is not None else {}
    version4, version5 = config.get("rope_scaling") or {}, config.get("rope_parameters") or {}
    if not isinstance(version4, dict) or not isinstance(version5, dict):
        raise ValueError(f"{path}: rope_scaling and rope_parameters must be objects or null")
    stated = [_one_rope(base | version5, config, path)] if version5 else []
    if not stated or "rope_theta" in config or "rope_scaling" in config:
        stated.append(_one_rope(base | version4, config, path))
    if stated[0] != stated[-1]:
        raise ValueError(
            f"{path}: rope_parameters says {stated[0]}, rope_theta and rope_scaling {stated[-1]}: correct one"
        )
    return stated[0]


def _one_rope(rope: dict[str, Any], config: dict[str, Any], path: Path) -> dict[str, Any]:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3") or rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"{path}: a Llama 3 has no rotary settings {rope}: rope_type must be 'default' or 'llama3'")
    scaling = None
    if kind == "llama3":
        context = config.get("max_position_embeddings")
        scaling = RopeScaling(
            factor=_number(rope, "factor", path),
            low_freq_factor=_number(rope, "low_freq_factor", path),
            high_freq_factor=_number(rope, "high_freq_factor", path),
            original_max_seq_len=_whole(rope, "original_max_position_embeddings", path, context),
        )
    return {"rope_theta": _number(rope, "rope_theta", path, 10_000.0), "rope_scaling": scaling}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of bounded size. Raises ValueError when it is absent or anything else."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give the folder of a Hugging Face model")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{path} is larger than {MAX_JSON_BYTES} bytes: it is no such file")
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds no JSON object")
    return data


def _whole(data: dict[str, Any], key: str, path: Path, default: int | None = None, limit: int = MAX_SIZE) -> int:
    value = default if data.get(key) is None else data[key]
    if type(value) is not int or not 1 <= value <= limit:
        raise ValueError(f"{path}: {key} must be a whole number from 1 to {limit}, not {value!r}")
    return value


def _number(data: dict[str, Any], key: str, path: Path, default: float | None = None) -> float:
    value: Any = default if data.get(key) is None else data[key]
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"{path}: {key} must be a number above 0, not {value!r}")
    return float(value)


def read(folder: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = torch.float32) -> Llama:
    """The model of a folder, from one safetensors file or several, in `dtype` (None: the stored embedding's).

    Raises ValueError naming the first tensor that is missing, extra or of a wrong shape, or the damaged file.
    Pickled weights (.bin, .pth) can run code and are refused.
    """
    folder = Path(folder)
    shape = read_shape(folder)
    paths = _weight_files(folder)
    stored = _headers(paths)
    names = hf_names(shape.num_layers, tied=shape.tied)
    if missing := sorted(set(names.values()) - stored.keys()):
        raise ValueError(f"{folder}: tensor {missing[0]} is missing ({len(missing)} in all)")
    if extra := sorted(stored.keys() - set(names.values())):
        raise ValueError(f"{folder}: config.json knows no tensor {extra[0]} ({len(extra)} in all)")
    for ours, weight in build(shape, device="meta").named_parameters():
        size, _ = stored[names[ours]]
        if size != list(weight.shape):
            raise ValueError(f"{folder}: tensor {names[ours]} has shape {size}, expected {list(weight.shape)}")
    model = build(shape, device=device, dtype=dtype or stored[names["tok_embeddings.weight"]][1])
    weights = {names[ours]: weight for ours, weight in model.named_parameters()}
    with torch.no_grad():
        for path in paths:
            with _opened(path) as file:
                for theirs in weights.keys() & set(file.keys()):
                    weights[theirs].copy_(file.get_tensor(theirs))
    return model


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if not (folder / INDEX).exists():
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pth"))
        reason = "; pickled weights can run code when read: convert them to safetensors" if pickled else ""
        raise ValueError(f"{folder} holds neither {WEIGHTS} nor {INDEX}{reason}")
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / INDEX} holds no weight_map")
    shards = sorted({str(shard) for shard in weight_map.values()})
    for shard in shards:
        if Path(shard).name != shard or "\\" in shard or not shard.endswith(".safetensors"):
            raise ValueError(f"{folder / INDEX}: {shard!r} is not the name of a safetensors file in the same folder")
        if not (folder / shard).is_file():
            raise ValueError(f"{folder}: the shard {shard} is missing")
    return [folder / shard for shard in shards]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is cut short or damaged ({error}): fetch or write it again") from None


def _headers(paths: list[Path]) -> dict[str, tuple[list[int], torch.dtype]]:
    """Tensor name -> shape and dtype, without reading a weight."""
    stored: dict[str, tuple[list[int], torch.dtype]] = {}
    for path in paths:
        with _opened(path) as file:
            for name in set(file.keys()):
                if name.endswith("rotary_emb.inv_freq"):  # older folders store what config.json implies
                    continue
                part = file.get_slice(name)
                if name in stored:
                    raise ValueError(f"{path}: tensor {name} is in two shards")
                if part.get_dtype() not in DTYPES:
                    raise ValueError(f"{path}: tensor {name} has dtype {part.get_dtype()}, not one of {list(DTYPES)}")
                stored[name] = (part.get_shape(), DTYPES[part.get_dtype()])
    return stored

"""config.json and generation_config.json of a LlamaForCausalLM, written and read.

Rotary settings and dtype stand under the keys of transformers 4 and of transformers 5: a reader that knows the
other set alone takes defaults in silence (mlx-lm, v5 keys: RoPE base 10,000, logits off by 8).
"""

from pathlib import Path
from typing import Any

import torch

from llamita.formats.files import number, read_json, whole
from llamita.model.shape import MAX_LAYERS, RopeScaling, Shape
from llamita.tokenizer.carried import AnyTokenizer


def config(shape: Shape, tokenizer: AnyTokenizer, dtype: torch.dtype) -> dict[str, Any]:
    """The content of config.json."""
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


def generation_config(tokenizer: AnyTokenizer) -> dict[str, Any]:
    """Every token that ends a reply stops generation; temperature and top_p as in Meta's own folders."""
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": sorted(tokenizer.stop_ids),
        "pad_token_id": tokenizer.pad_id,
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
    }


def read_shape(folder: Path | str) -> Shape:
    """The shape that config.json states, under the keys of transformers 4, of 5, or both alike.

    Raises ValueError with the reason for anything that is not exactly a Llama 3.
    """
    path = Path(folder) / "config.json"
    config = read_json(path)
    _refuse_others(config, path)
    num_heads = whole(config, "num_attention_heads", path)
    shape = Shape(
        dim=whole(config, "hidden_size", path),
        num_layers=whole(config, "num_hidden_layers", path, limit=MAX_LAYERS),
        num_heads=num_heads,
        num_kv_heads=whole(config, "num_key_value_heads", path, num_heads),
        ffn_dim=whole(config, "intermediate_size", path),
        vocab_size=whole(config, "vocab_size", path),
        tied=bool(config.get("tie_word_embeddings")),
        max_seq_len=whole(config, "max_position_embeddings", path, 2048),
        norm_eps=number(config, "rms_norm_eps", path, 1e-6),
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
    if not stated or base or version4:
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
            factor=number(rope, "factor", path),
            low_freq_factor=number(rope, "low_freq_factor", path),
            high_freq_factor=number(rope, "high_freq_factor", path),
            original_max_seq_len=whole(rope, "original_max_position_embeddings", path, context),
        )
    return {"rope_theta": number(rope, "rope_theta", path, 10_000.0), "rope_scaling": scaling}

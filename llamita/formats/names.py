"""The one table of weight names (Meta's are ours; Hugging Face's) and the one permutation of rotary rows.

A `{}` stands for the layer's number. Every format reads this table; none keeps its own.
"""

from torch import Tensor

from llamita.model.shape import Shape

EMBEDDINGS, HEAD = "tok_embeddings.weight", "output.weight"
# Ours (Meta's) -> Hugging Face's LlamaForCausalLM.
TO_HF = {
    EMBEDDINGS: "model.embed_tokens.weight",
    "layers.{}.attention.wq.weight": "model.layers.{}.self_attn.q_proj.weight",
    "layers.{}.attention.wk.weight": "model.layers.{}.self_attn.k_proj.weight",
    "layers.{}.attention.wv.weight": "model.layers.{}.self_attn.v_proj.weight",
    "layers.{}.attention.wo.weight": "model.layers.{}.self_attn.o_proj.weight",
    "layers.{}.feed_forward.w1.weight": "model.layers.{}.mlp.gate_proj.weight",
    "layers.{}.feed_forward.w2.weight": "model.layers.{}.mlp.down_proj.weight",
    "layers.{}.feed_forward.w3.weight": "model.layers.{}.mlp.up_proj.weight",
    "layers.{}.attention_norm.weight": "model.layers.{}.input_layernorm.weight",
    "layers.{}.ffn_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "norm.weight": "model.norm.weight",
    HEAD: "lm_head.weight",
}


def hf_names(num_layers: int, *, tied: bool) -> dict[str, str]:
    """Our name -> Hugging Face's for every tensor of a model; a tied head is no tensor of its own."""
    names = {}
    for ours, theirs in TO_HF.items():
        if tied and ours == HEAD:
            continue
        for layer in range(num_layers) if "{}" in ours else (0,):
            names[ours.format(layer)] = theirs.format(layer)
    return names


def rotary_heads(name: str, shape: Shape) -> int | None:
    """How many heads turn in the rows of the tensor that we call `name`; None where its rows do not."""
    return {"wq": shape.num_heads, "wk": shape.num_kv_heads}.get(name.split(".")[-2])


def to_half_split(weight: Tensor, num_heads: int) -> Tensor:
    """Rows of wq or wk from Meta's order (a head's pair p in rows 2p, 2p + 1) to ours (p, p + head_dim / 2).

    weight [num_heads * head_dim, dim], the same shape out; for wk num_heads is the number of KV heads.
    """
    return weight.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def to_interleaved(weight: Tensor, num_heads: int) -> Tensor:
    """The inverse of `to_half_split`: from our order to Meta's, which GGUF and llama2.c share."""
    return weight.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()

"""A Llama as Meta's files mean it, from the raw state dict: rotary pairs side by side, turned as complex numbers.

Written from the papers and from what the format is known to be (models/llama3 of meta-llama/llama-models); it shares
nothing with llamita.
"""

import math

import torch
from torch.nn import functional as F


def turns(head_dim, num_tokens, theta, scaled):
    """exp(i * angle) of every position and pair, [T, P]; scaled with the numbers that Meta's code holds."""
    freqs = theta ** (-torch.arange(0, head_dim, 2).double() / head_dim)
    if scaled:
        wavelengths = 2 * math.pi / freqs
        blend = (8192 / wavelengths - 1) / (4 - 1)
        between = (1 - blend) * freqs / 8 + blend * freqs
        freqs = torch.where(wavelengths > 8192 / 1, freqs / 8, torch.where(wavelengths < 8192 / 4, freqs, between))
    angles = torch.outer(torch.arange(num_tokens).double(), freqs)
    return torch.polar(torch.ones_like(angles), angles)


def norm(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def logits(state, params, tokens):
    """tokens [T] -> logits [T, vocab_size], in float64."""
    state = {name: tensor.double() for name, tensor in state.items()}
    num_heads, num_kv_heads, eps = params["n_heads"], params["n_kv_heads"], params["norm_eps"]
    head_dim = params["dim"] // num_heads
    turn = turns(head_dim, len(tokens), params["rope_theta"], params["use_scaled_rope"])[:, None]
    unseen = torch.ones(len(tokens), len(tokens), dtype=torch.bool).triu(1)

    def rotated(x):
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)

    x = state["tok_embeddings.weight"][tokens]
    for layer in range(params["n_layers"]):
        weight = {key: state[f"layers.{layer}.attention.{key}.weight"] for key in ("wq", "wk", "wv", "wo")}
        inner = norm(x, state[f"layers.{layer}.attention_norm.weight"], eps)
        q = rotated((inner @ weight["wq"].T).unflatten(-1, (num_heads, head_dim)))
        k = rotated((inner @ weight["wk"].T).unflatten(-1, (num_kv_heads, head_dim)))
        v = (inner @ weight["wv"].T).unflatten(-1, (num_kv_heads, head_dim))
        k, v = (y.repeat_interleave(num_heads // num_kv_heads, dim=1) for y in (k, v))
        scores = torch.einsum("inh,jnh->nij", q, k) / head_dim**0.5
        seen = scores.masked_fill(unseen, -math.inf).softmax(-1)
        x = x + torch.einsum("nij,jnh->inh", seen, v).flatten(1) @ weight["wo"].T
        w1, w2, w3 = (state[f"layers.{layer}.feed_forward.w{which}.weight"] for which in "123")
        inner = norm(x, state[f"layers.{layer}.ffn_norm.weight"], eps)
        x = x + (F.silu(inner @ w1.T) * (inner @ w3.T)) @ w2.T
    return norm(x, state["norm.weight"], eps) @ state["output.weight"].T

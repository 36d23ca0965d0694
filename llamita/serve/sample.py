"""From logits to a token: pure functions on logits_BV [B rows, V vocab_size].

The order of the filters and the meaning of each number are those of Hugging Face's `generate`.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NEVER = float("-inf")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose tokens and when to stop. Raises ValueError for a number out of its range.

    temperature 0 is greedy. top_k 0, top_p 1, min_p 0 and repetition_penalty 1 switch a filter off. The
    default temperature and top_p are those of Meta's Llama 3 (`generation_config.json`). Without a seed every
    call differs. `stop` may be one string or several: the text ends before the first that appears.
    """

    max_tokens: int = 256
    temperature: float = 0.6
    top_p: float = 0.9
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        ranges = {
            "max_tokens": (self.max_tokens >= 1, "at least 1"),
            "temperature": (
                self.temperature == 0 or 1e-3 <= self.temperature < math.inf,
                "0 (greedy) or at least 0.001",
            ),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "top_k": (self.top_k >= 0, "at least 0 (0 is off)"),
            "min_p": (0 <= self.min_p <= 1, "from 0 to 1"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "above 0 (1 is off)"),
            "stop": (all(stop), "made of strings that are not empty"),
        }
        for name, (holds, range_) in ranges.items():
            if not holds:
                raise ValueError(f"sampling.{name} must be {range_}, got {getattr(self, name)}")


def penalize(logits_BV: Tensor, contexts: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Make each row's tokens so far less likely: positive logits / penalty, negative ones * penalty.

    CTRL (arXiv 1909.05858, section 4.1), in Hugging Face's form, which counts the prompt and keeps the sign.
    """
    seen_BV = torch.zeros_like(logits_BV, dtype=torch.bool)
    for row, context in enumerate(contexts):
        seen_BV[row, list(context)] = True
    lowered_BV = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return torch.where(seen_BV, lowered_BV, logits_BV)


def top_k(logits_BV: Tensor, k: int) -> Tensor:
    """Forbid all but the k best; what ties with the k-th stays."""
    best_BK = logits_BV.topk(min(k, logits_BV.shape[-1])).values
    return logits_BV.masked_fill(logits_BV < best_BK[:, -1:], NEVER)


def top_p(logits_BV: Tensor, p: float) -> Tensor:
    """Keep the fewest best tokens that together have probability p (nucleus sampling, arXiv 1904.09751)."""
    sorted_BV, order_BV = logits_BV.sort(descending=True)
    probs_BV = sorted_BV.softmax(dim=-1)
    better_BV = probs_BV.cumsum(dim=-1) - probs_BV
    forbidden_BV = (better_BV >= p).scatter(-1, order_BV, better_BV >= p)
    return logits_BV.masked_fill(forbidden_BV, NEVER)


def min_p(logits_BV: Tensor, p: float) -> Tensor:
    """Forbid what is less than p times as likely as the best token (arXiv 2407.01082)."""
    return logits_BV.masked_fill(logits_BV < logits_BV.amax(dim=-1, keepdim=True) + math.log(p), NEVER)


def filtered(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """The logits that are drawn from, at a temperature above 0."""
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_k:
        logits_BV = top_k(logits_BV, sampling.top_k)
    if sampling.top_p < 1:
        logits_BV = top_p(logits_BV, sampling.top_p)
    if sampling.min_p:
        logits_BV = min_p(logits_BV, sampling.min_p)
    return logits_BV


def choose(
    logits_BV: Tensor,
    sampling: Sampling,
    contexts: Sequence[Sequence[int]],
    generators: Sequence[torch.Generator],
) -> list[int]:
    """The next token of each row; `contexts` are the rows' tokens so far, `generators` live on the CPU."""
    logits_BV = logits_BV.float()
    if logits_BV.isnan().any():
        raise ValueError("the model's logits are NaN: its weights are broken; did its training diverge?")
    if sampling.repetition_penalty != 1:
        logits_BV = penalize(logits_BV, contexts, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=-1).tolist()
    # One uniform number a row, through the inverse of its distribution function: a draw depends on the row's
    # own generator alone, on any device. float64: a float32 sum of 128,256 terms would round rare tokens away.
    total_BV = filtered(logits_BV, sampling).double().softmax(dim=-1).cumsum(dim=-1)
    uniform_B1 = torch.stack([torch.rand(1, generator=one, dtype=torch.float64) for one in generators])
    target_B1 = uniform_B1.to(total_BV.device) * total_BV[:, -1:]
    return torch.searchsorted(total_BV, target_B1, right=True).squeeze(-1).tolist()


def row_generators(prompts: Sequence[Sequence[int]], seed: int) -> list[torch.Generator]:
    """A generator for each prompt, decided by the seed, the prompt and how often it came before in the list.

    So a prompt draws the same alone and in a batch, while the same prompt given n times draws n samples.
    """
    times: dict[tuple[int, ...], int] = {}
    generators = []
    for prompt in map(tuple, prompts):
        times[prompt] = times.get(prompt, 0) + 1
        digest = hashlib.blake2b(repr((seed, prompt, times[prompt])).encode(), digest_size=4).digest()
        generators.append(torch.Generator().manual_seed(int.from_bytes(digest, "little")))
    return generators

"""What a step costs in FLOPs, what share of the machine's peak that is, and where a step's time goes.

MFU counts what the model needs: forward and backward over real tokens, attention by the documents' own lengths and its
causal half alone (PaLM, arXiv 2204.02311, appendix B, counts the whole square: ours is lower). HFU counts what is
computed: padding and recomputed layers too, but not what attention's backward pass recomputes within itself.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from llamita import log, runtime
from llamita.data.pack import Batch
from llamita.kernels.loss import NO_LOSS
from llamita.model.shape import Shape

PARTS = ("data", "forward", "backward", "communication", "optimizer", "checkpoint")
MATMUL_ROWS = 2048  # tokens of a matmul whose speed is measured: enough for its best speed, few enough for a CPU


def work(batch: Batch, *, padding: bool) -> tuple[int, int]:
    """Tokens of a batch, and pairs of a token and one that it sees; with or without what pads the rows."""
    seq_len, tokens, pairs = batch.inputs_BT.shape[1], 0, 0
    for row, starts in enumerate(batch.starts):
        ends = [*starts[1:], seq_len]
        if not padding and _is_padding(batch, row, starts[-1]):
            starts, ends = starts[:-1], ends[:-1]
        lengths = [end - start for start, end in zip(starts, ends, strict=True)]
        tokens += sum(lengths)
        pairs += sum(length * (length + 1) // 2 for length in lengths)
    return tokens, pairs


def _is_padding(batch: Batch, row: int, start: int) -> bool:
    blank = (batch.inputs_BT[row, start:] == 0) & (batch.targets_BT[row, start:] == NO_LOSS)
    return bool(blank.all())


def model_flops(shape: Shape, batch: Batch) -> float:
    """FLOPs that a step over these rows needs, forward and backward: what MFU counts."""
    return 3 * shape.forward_flops(*work(batch, padding=False))


def hardware_flops(shape: Shape, batch: Batch, recompute: bool) -> float:
    """FLOPs that it computes: what HFU counts. Recomputed is all of the layers but their last matmul, w2, whose result
    no gradient asks for (torch's checkpoint stops before it)."""
    tokens, pairs = work(batch, padding=True)
    forward = shape.forward_flops(tokens, pairs)
    once = 2 * tokens * shape.dim * (shape.vocab_size + shape.num_layers * shape.ffn_dim)
    return 3 * forward + recompute * (forward - once)


class Peak:
    """The most FLOP/s of a device: published, or the fastest of the model's own matmuls, measured when first asked."""

    def __init__(self, device: torch.device, precision: str, shape: Shape):
        self.published = runtime.peak_flops(device, precision)
        self.device, self.dtype = device, torch.float32 if precision == "fp32" else torch.bfloat16
        pairs = [(shape.dim, shape.dim), (shape.dim, shape.ffn_dim), (shape.ffn_dim, shape.dim)]
        self.sizes = [(MATMUL_ROWS, *pair) for pair in pairs] + [(MATMUL_ROWS // 4, shape.dim, shape.vocab_size)]
        self.reached = 0.0

    @property
    def flops(self) -> float:
        """FLOP/s of one device."""
        return self.published or max(self.reached, runtime.measured_peak(self.device, self.dtype, self.sizes))

    def share(self, flops_per_second: float) -> float | None:
        """Share of the peak that so many FLOP/s of one device are, never above 1; None where that is more than the
        vendor publishes, so that one of the two numbers is wrong.

        Where they are more than was measured, that was a slow minute: it is measured again and the larger stays.
        """
        if flops_per_second > self.flops:
            if self.published:
                return None
            log.say("more than 100% of the measured peak is impossible: the peak is measured again")
            runtime.measured_peak(self.device, self.dtype, self.sizes, again=True)
            self.reached = max(self.reached, flops_per_second)  # what was reached can be reached
        return flops_per_second / self.flops


class Timer:
    """Where time goes: `with timer("data"): ...` around the PARTS of a step, one in another counting for itself alone.

    On a GPU time is that of its own stream, by events, and nothing waits for them until `shares` is asked: "data" is
    then the time that the GPU had nothing to do for want of data, and communication is seen only as far as the compute
    stream waits for it inside `timer("communication")`.
    """

    def __init__(self, device: torch.device):
        self._now: Any = _event if device.type == "cuda" else time.perf_counter
        self.reset()

    def reset(self) -> None:
        """Forget what was timed."""
        self._open = ["other"]
        self._marks: list[tuple[str, Any]] = []

    def __call__(self, part: str) -> "Timer":
        self._open.append(part)
        self._marks.append((part, self._now()))
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: object) -> None:
        self._open.pop()
        self._marks.append((self._open[-1], self._now()))

    def shares(self, seconds: float) -> dict[str, float]:
        """The share of each part, and of what is "other", in the `seconds` since the last reset."""
        spent = dict.fromkeys((*PARTS, "other"), 0.0)
        if self._marks and not isinstance(self._marks[-1][1], float):
            self._marks[-1][1].synchronize()
        for (part, start), (_, end) in pairwise(self._marks):
            spent[part] += end - start if isinstance(end, float) else start.elapsed_time(end) / 1000
        spent["other"] = max(0.0, seconds - sum(spent[part] for part in PARTS))
        return {part: each / seconds for part, each in spent.items()}


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


@contextmanager
def profile(folder: Path, steps: range, rank: int = 0) -> Iterator[torch.profiler.profile]:
    """Records the steps numbered `steps`, from 0 where this begins; call `.step()` of what it gives after each step.

    Writes `trace-RANK.json`, for chrome://tracing or Perfetto, and `trace-RANK.txt`, the operators that took longest.
    """
    cuda = torch.cuda.is_available()

    def write(profiler: torch.profiler.profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(folder / f"trace-{rank}.json"))
        order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
        (folder / f"trace-{rank}.txt").write_text(profiler.key_averages().table(sort_by=order, row_limit=30))

    warmup = min(1, steps.start)
    schedule = torch.profiler.schedule(wait=steps.start - warmup, warmup=warmup, active=len(steps), repeat=1)
    kinds = [torch.profiler.ProfilerActivity.CPU] + cuda * [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds, schedule=schedule, on_trace_ready=write) as profiler:
        yield profiler

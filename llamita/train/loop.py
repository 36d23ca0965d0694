"""The one training loop: a stream of rows, an objective, a Run. Evaluations and samples arrive as callables."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llamita import config, log, runtime
from llamita.checkpoint import store
from llamita.data.loader import batches
from llamita.data.pack import Batch, Rows
from llamita.data.sampler import Sampler
from llamita.model.llama import Llama
from llamita.train import state
from llamita.train.objective import next_token, num_targets
from llamita.train.optim import Optimizer
from llamita.train.run import Run
from llamita.train.schedule import lr_ratio

Objective = Callable[[Llama, Batch, torch.dtype], Tensor]


def no_evaluation(model: Llama) -> dict[str, float]:
    return {}


def no_samples(model: Llama) -> list[tuple[str, str]]:
    return []


@dataclass(frozen=True)
class Watch:
    """What a run is watched by; called between steps, never changes the model.

    `evaluate` returns metrics ("loss" in nats a token, "bits_per_byte"), `sample` pairs of prompt and text.
    """

    evaluate: Callable[[Llama], dict[str, float]] = no_evaluation
    sample: Callable[[Llama], list[tuple[str, str]]] = no_samples


def micro_batches(batch: Batch, size: int) -> Iterator[Batch]:
    """The batch in slices of `size` rows."""
    for row in range(0, len(batch.starts), size):
        part = slice(row, row + size)
        yield Batch(batch.inputs_BT[part], batch.targets_BT[part], batch.starts[part], batch.first + row)


def accumulate(
    model: Llama, batch: Batch, micro_batch_size: int, dtype: torch.dtype, objective: Objective = next_token
) -> float:
    """Leave the gradient of the mean loss per target token of the whole batch; return that mean in nats.

    The sum of every slice is divided by the tokens of all slices, so that the slicing changes nothing.
    """
    tokens = max(1, num_targets(batch))
    total = 0.0
    for part in micro_batches(batch, micro_batch_size):
        device = part.inputs_BT.device.type
        with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = objective(model, part, dtype) / tokens
        loss.backward()
        total += loss.item()
    return total


class Trainer:
    """Brings a model from its newest whole checkpoint (or its start) to `run.steps`; may be killed at any instant."""

    def __init__(
        self,
        run: Run,
        folder: Path,
        model: Llama,
        rows: Sequence[Rows],
        *,
        stage: str = "train",
        sampler: Sampler | None = None,
        pools: Sequence[str] = (),
        watch: Watch | None = None,
        sources: dict[str, str] | None = None,
    ):
        self.run, self.folder, self.stage, self.watch = run, folder, stage, watch or Watch()
        self.device = runtime.pick_device(run.device)
        self.dtype = torch.bfloat16 if run.precision == "bf16" else model.norm.weight.dtype
        self.model = model.to(self.device)
        self.optimizer = Optimizer(self.model, run.optim)
        self.counters = state.Counters()
        self.rows = rows
        self.sampler = sampler or Sampler([len(source) for source in rows], None, run.data.seed)
        self.pools = pools  # names of the pools of a mixture
        self.flops_per_token = run.shape.train_flops_per_token(run.data.seq_len)
        self.peak_flops = runtime.peak_flops(self.device, run.precision)
        folder.mkdir(parents=True, exist_ok=True)
        self.metrics = log.Metrics(folder / "metrics.jsonl", stage)
        self._start(sources or {})

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def _start(self, sources: dict[str, str]) -> None:
        torch.manual_seed(self.run.seed)
        found = store.newest(self.checkpoints, self._event)
        if found:
            state.check_same(config.load(Run, found / "run.toml"), self.run, self.folder)
            self.counters = state.load(found, self.model, self.optimizer)
            self._event(f"resumed from the checkpoint of step {self.counters.step}")
        config.save(self.run, self.folder / "run.toml")
        values = {
            key: {"value": value, "source": sources.get(key, "default")}
            for key, value in config.flatten(self.run).items()
        }
        shape = {name: getattr(self.run.shape, name) for name in ("num_params", "num_matmul_params", "head_dim")}
        shape |= {
            "train_flops_per_token": self.flops_per_token,
            "kv_bytes_per_token": self.run.shape.kv_bytes_per_token(),
        }
        self.metrics.write("settings", values=values, shape=shape, machine=runtime.machine())

    def _event(self, message: str) -> None:
        log.say(message)
        self.metrics.write("event", step=self.counters.step, message=message)

    def fit(self) -> Llama:
        """Train to the last step and return the model. Raises ValueError when the loss stops being a number."""
        run, done = self.run, self.counters
        first = done.step * run.batch_size
        stream = batches(
            self.rows, self.sampler, first=first, batch_size=run.batch_size, num_workers=run.data.num_workers
        )
        progress = log.Progress(run.log.every)
        began, logged = time.perf_counter(), (done.step, done.tokens, done.elapsed)
        if done.step == 0:
            self._watch()
        while done.step < run.steps:
            loss, grad_norm, lr = self._step(next(stream))
            now = time.perf_counter()
            done.elapsed, began = done.elapsed + now - began, now
            last = done.step == run.steps
            if last or done.step % run.log.every == 0:
                self._log(progress, loss, grad_norm, lr, logged)
                logged = (done.step, done.tokens, done.elapsed)
            if last or done.step % run.checkpoint.every == 0:
                state.save(self.checkpoints, run, self.model, self.optimizer, done)
            self._watch(last)
            began = time.perf_counter()
        self.metrics.close()
        return self.model

    def _step(self, batch: Batch) -> tuple[float, float, float]:
        """One optimizer step; returns loss (nats a token), gradient norm and the rate it used."""
        run, done = self.run, self.counters
        batch = Batch(batch.inputs_BT.to(self.device), batch.targets_BT.to(self.device), batch.starts, batch.first)
        self.model.train()
        loss = accumulate(self.model, batch, run.micro_batch_size, self.dtype)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), run.optim.clip).item()
        if not (torch.isfinite(torch.tensor([loss, grad_norm])).all()):
            raise ValueError(
                f"the loss is no number any more at step {done.step + 1} (loss {loss}, gradient norm {grad_norm}): "
                "lower --optim.lr, or lengthen --schedule.warmup-steps, and start from the last checkpoint"
            )
        ratio = lr_ratio(run.schedule, done.step, run.steps)
        self.optimizer.step(ratio)
        done.step += 1
        done.tokens += num_targets(batch)
        return loss, grad_norm, run.optim.lr * ratio

    def _log(
        self, progress: log.Progress, loss: float, grad_norm: float, lr: float, since: tuple[int, int, float]
    ) -> None:
        done, run = self.counters, self.run
        step, tokens, elapsed = since
        speed = (done.tokens - tokens) / max(done.elapsed - elapsed, 1e-9)
        eta = (done.elapsed - elapsed) / max(1, done.step - step) * (run.steps - done.step)
        mfu = speed * self.flops_per_token / self.peak_flops if self.peak_flops else None
        memory = runtime.peak_memory_gib(self.device)
        samples = done.step * run.batch_size
        drawn = [count / samples for count in self.sampler.drawn(samples)] if self.pools else []
        self.metrics.write(
            "train", step=done.step, steps=run.steps, tokens=done.tokens, loss=loss, lr=lr, grad_norm=grad_norm,
            tokens_per_second=speed, mfu=mfu, memory_gib=memory, elapsed=done.elapsed, eta=eta,
            **({"drawn": dict(zip(self.pools, drawn, strict=True))} if drawn else {}),
        )  # fmt: skip
        progress.update(
            done.step,
            f"{self.stage} {done.step}/{run.steps} ({done.step / run.steps:.0%})  loss {loss:.3f}  lr {lr:.1e}  "
            f"grad {grad_norm:.2f}  {speed:,.0f} tok/s  MFU {f'{mfu:.0%}' if mfu else 'n/a'}  {memory:.1f} GiB  "
            f"{log.duration(done.elapsed)}  ETA {log.duration(eta)}",
            last=done.step == run.steps,
        )

    def _watch(self, last: bool = False) -> None:
        done, every = self.counters, self.run.log
        self.model.eval()
        if last or done.step % every.eval_every == 0:
            found = self.watch.evaluate(self.model)
            if found:
                self.metrics.write("eval", step=done.step, tokens=done.tokens, **found)
                shown = "  ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in found.items())
                log.say(f"{self.stage} {done.step}: held-out {shown}")
        if last or done.step % every.sample_every == 0:
            for prompt, text in self.watch.sample(self.model):
                self.metrics.write("sample", step=done.step, prompt=prompt, text=text)
                log.say(f"  {prompt!r} -> {text.strip()[:100]!r}")

"""The one training loop: a stream of rows, an objective, a Run, and any number of ranks. Evaluations and samples arrive
as callables."""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from llamita import config, log, runtime
from llamita.data.loader import batches
from llamita.data.pack import Batch, Rows
from llamita.data.sampler import Sampler, shard_of
from llamita.kernels import fp8
from llamita.model.llama import Llama
from llamita.parallel import mesh, reduce, replicas, rules
from llamita.parallel.watchdog import STOPPED, Stop, Watchdog
from llamita.train import incidents, schedule, state, utilization
from llamita.train.average import EMA, kept
from llamita.train.compute import Compute, FirstRows, rows_of
from llamita.train.health import Guard, advice
from llamita.train.incidents import Incident
from llamita.train.optim import Optimizer
from llamita.train.run import Run
from llamita.train.watch import Watch, settings

PATIENT = 6  # times as long as a step may an evaluation or a checkpoint take before the watchdog barks
TRACED = 3  # steps of a trace
PROBE = 10  # steps between two looks at how fast a rank's device is
WORTH_MEASURING = 10.0  # seconds of training, before the device's peak is measured, which takes one


class Trainer:
    """Brings a model from its newest whole checkpoint (or its start) to `run.steps`; may be killed at any instant.

    Every rank makes one, with the same arguments. A model on the meta device gets its first values from `first_rows`,
    wherever a rank's part of it lies. Raises ValueError for a layout that the model, the rows or the ranks do not fit.
    """

    def __init__(
        self,
        run: Run,
        folder: Path,
        model: Llama,
        rows: Sequence[Rows],
        *,
        first_rows: FirstRows | None = None,
        stage: str = "train",
        sampler: Sampler | None = None,
        pools: Sequence[str] = (),
        watch: Watch | None = None,
        sources: dict[str, str] | None = None,
    ):
        self.run, self.folder, self.stage, self.watch = run, folder, stage, watch or Watch()
        self.rows, self.pools = rows, pools  # names of the pools of a mixture
        self.sampler = sampler or Sampler([len(source) for source in rows], None, run.data.seed)
        device = runtime.pick_device(run.device)
        self.rank, world = mesh.join(device.type)
        self.layout = run.parallel.resolved(world)
        for stage_of in schedule.stages(run):
            rules.check(
                self.layout, run.shape, seq_len=run.data.seq_len, batch_size=stage_of.rows,
                micro_batch_size=run.micro_batch_size,
            )  # fmt: skip
        self.mesh, self.device = mesh.start(self.layout, device.type), device
        dtype = next(model.parameters()).dtype if run.precision == "fp32" else torch.bfloat16
        if run.precision == "fp8":
            fp8.check(run.data.seq_len // self.layout.cp, self.layout.tp)
            fp8.convert(model)
        torch.manual_seed(run.seed)
        self.timer, self.peak = utilization.Timer(device), utilization.Peak(device, run.precision, run.shape)
        self.compute = Compute(model, self.layout, self.mesh, dtype, device, first_rows=first_rows, timed=self.timer)
        self.model = self.compute.parts[0]
        self.optimizer = Optimizer(self.compute, run.optim)
        self.average = EMA(self.compute) if run.average.half_life else None
        self.guard, self.counters = Guard(run.health), state.Counters()
        log.console.quiet = log.console.quiet or self.rank > 0
        folder.mkdir(parents=True, exist_ok=True)
        self.metrics = log.Metrics(folder / "metrics.jsonl" if self.rank == 0 else None, stage)
        self.saver = state.Saver(
            folder / "checkpoints", run, (self.rank, world), self.compute, self.optimizer, self.average, self.guard,
            self.counters,
        )  # fmt: skip
        self._start(sources or {})

    def _start(self, sources: dict[str, str]) -> None:
        found = self.saver.newest(self._event)
        if found:
            state.check_same(config.load(Run, found / "run.toml"), self.run, self.folder, state.step_of(found))
            self.saver.load(found, with_guard=True)
            self._event(f"resumed from the checkpoint of step {self.counters.step}")
        if self.rank == 0:
            config.save(self.run, self.folder / "run.toml")
        self.metrics.write("settings", **settings(self.run, self.layout, sources))

    def _event(self, message: str) -> None:
        log.say(message)
        self.metrics.write("event", step=self.counters.step, message=message)

    def _incident(self, step: int, kind: str, message: str, action: str, *, rank: int | None = None) -> None:
        """Into the incident log and before the user's eyes. Of a step that is not applied, with its documents."""
        if self.rank:
            return
        self._event(f"{kind} at step {step}: {message}; {action}")
        first, size = None, 0
        documents: tuple[str, ...] = ()
        if kind in ("nan", "spike"):
            first, size = schedule.first_sample(self.run, step - 1), schedule.batch_size(self.run, step - 1)
            documents = self.watch.documents(first, size)
        try:
            incidents.append(self.folder, Incident(
                step=step, kind=kind, rank=rank, message=message, action=action, first_sample=first, num_samples=size,
                documents=documents,
            ))  # fmt: skip
        except OSError as error:  # a full disk: no reason to end a run
            log.say(f"the incident log could not be written: {error.strerror}")

    def fit(self) -> Llama:
        """Train to the last step and return the model, or this rank's part of it.

        Raises ValueError when the loss stops being a number and going back does not help, OSError when the last
        checkpoint cannot be written; SystemExit with `watchdog.STOPPED`, after a checkpoint, when SIGTERM came.
        """
        done, self.stop = self.counters, Stop()
        self.pace = None if self.mesh is None else replicas.Pace(self.device)
        first = self.run.log.trace_step - 1 - done.step
        steps = range(first, first + TRACED)
        tracer = utilization.profile(self.folder / "trace", steps, self.rank) if first >= 0 else nullcontext()
        dog = Watchdog(self.folder, self._hung, seconds=self.run.health.hang_seconds)
        with self.stop, dog as self.dog, tracer as self.tracer:
            progress = log.Progress(self.run.log.every)
            if done.step == 0:
                self._watch()
            while done.step < self.run.steps:
                self._stretch(progress)
        self.metrics.close()
        return self.model

    def _hung(self, message: str, ranks: list[int]) -> None:
        incidents.append(self.folder, Incident(
            step=self.counters.step, kind="hang", rank=ranks[0] if len(ranks) == 1 else None, message=message,
            action="the world ends; started again, it goes on from the newest checkpoint",
        ))  # fmt: skip

    def _stretch(self, progress: log.Progress) -> None:
        """Steps of one batch size and mixture, in the order of samples, until one changes or training goes back."""
        run, done = self.run, self.counters
        size, end = schedule.batch_size(run, done.step), schedule.next_change(run, done.step)
        if done.step == schedule.next_change(run, done.step - 1):
            self.guard.forget()  # the loss may rightly jump
        stream = batches(
            self.rows, self.sampler, first=schedule.first_sample(run, done.step), batch_size=size,
            rank=self.layout.data_rank(self.rank), world=self.layout.num_data_ranks, num_workers=run.data.num_workers,
        )  # fmt: skip
        began, since = time.perf_counter(), state.Since(done)
        self.timer.reset()
        while done.step < end:
            with self.timer("data"), nullcontext() if self.pace is None else self.pace.own():
                batch = next(stream)
            found = self._step(batch, size)
            if found is None:
                return
            now = time.perf_counter()
            done.elapsed, began = done.elapsed + now - began, now
            last = done.step == run.steps
            if self.tracer is not None:
                self.tracer.step()
            if not self.guard.skips(done.step):
                since.flops += utilization.model_flops(run.shape, batch)
                since.computed += utilization.hardware_flops(run.shape, batch, self.layout.recompute)
            if last or done.step % run.log.every == 0:
                self._log(progress, *found, since)
                since = state.Since(done)
                self.timer.reset()
            if self._between(last):
                return
            began = time.perf_counter()

    def _step(self, batch: Batch, batch_size: int) -> tuple[float, float, float] | None:
        """One optimizer step; its loss (nats a token), gradient norm and rate; None when training went back."""
        run, done = self.run, self.counters
        step = done.step + 1
        self.dog.beat(f"step {step}")
        ratio = schedule.lr_ratio(run.schedule, done.step, run.steps)
        loss, grad_norm, tokens = float("nan"), float("nan"), 0
        if not self.guard.skips(step):
            loss, tokens = self.compute.gradients(batch, batch_size, run.micro_batch_size)
            weights = [weight for _, weight in self.compute.named_parameters()]
            with self.timer("communication"):
                grad_norm = reduce.clip(weights, run.optim.clip, self.mesh)
            verdict = self.guard.judge(step, loss, grad_norm)
            if verdict.decision == "ok":
                with self.timer("optimizer"):
                    self.optimizer.step(ratio)
                    if self.average is not None:
                        self.average.update(kept(run.average, tokens))
            else:
                self.optimizer.forget_gradients()
                if verdict.decision == "roll back":
                    self._go_back(step, verdict.kind, verdict.reason)
                    return None
                self._incident(step, verdict.kind, verdict.reason, "its update is left out")
                tokens = 0
        done.step += 1
        done.tokens += tokens
        return loss, grad_norm, run.optim.lr * ratio

    def _go_back(self, step: int, kind: str, reason: str, *, leave_out: bool = True) -> None:
        """To the newest whole checkpoint, from where the batches since, to `step`, are left out or seen again.

        Raises ValueError where there is none, or it has been tried too often.
        """
        self.dog.beat("going back", PATIENT * self.run.health.hang_seconds)
        self._wait()
        found = self.saver.newest(self._event)
        if found is None:
            raise ValueError(
                f"{reason} at step {step}, and there is no checkpoint to go back to: {advice(leave_out)}, and start "
                "again"
            )
        before = state.step_of(found)
        self.guard.roll_back(step, before, leave_out=leave_out)
        what = "leaving out the batches since" if leave_out else "and the batches since are seen again"
        self._incident(step, kind, reason, f"back to the checkpoint of step {before}, {what}")
        self.saver.load(found, with_guard=False)

    def _between(self, last: bool) -> bool:
        """What scheduler, neighbours and settings ask for between two steps; whether training went back."""
        run, done = self.run, self.counters
        stopping = bool(reduce.total(torch.tensor(float(self.stop.asked)), self.mesh, reduce.ALL).item()) and not last
        if self.pace is not None:
            if done.step % PROBE == 0:
                self.pace.probe()
            for slow in self.pace.step():
                self._incident(done.step, "straggler", str(slow), "training goes on at its pace", rank=slow.rank)
        if last or stopping or done.step % run.checkpoint.every == 0:
            self.dog.beat(f"checkpoint of step {done.step}", PATIENT * run.health.hang_seconds)
            if last:
                self._watch(last)  # first, for a run that has its last checkpoint is not gone on with
            if self._undo_corruption():
                return True
            with self.timer("checkpoint"):
                self._save(must=last or stopping)
        if stopping:
            self._incident(
                done.step, "stop", "SIGTERM", "its checkpoint is written, and the same command goes on from there"
            )
            self.metrics.close()
            mesh.leave()
            raise SystemExit(STOPPED)
        if not last:
            self._watch()
        return False

    def _save(self, must: bool) -> None:
        """A checkpoint; where the disk takes none, training goes on, unless this one `must` be kept."""
        self._wait()
        try:
            self.saver.save()
            if must:
                self.saver.wait()
        except OSError as error:
            if must:
                raise
            self._no_checkpoint(error)

    def _wait(self) -> None:
        """Until the checkpoint under way is written, or known to be lost."""
        try:
            self.saver.wait()
        except OSError as error:
            self._no_checkpoint(error)

    def _no_checkpoint(self, error: OSError) -> None:
        self._incident(self.counters.step, "disk", str(error), "training goes on; the older checkpoints stand")

    def _undo_corruption(self) -> bool:
        """Whether copies of the model, which must be equal to the bit, are not; then training has gone back."""
        found = replicas.compare(self.compute.named_parameters(), self.mesh) if self.mesh is not None else None
        if not found:
            return False
        ranks = {rank for difference in found for rank in difference.ranks}
        named = ", ".join(map(str, found[:3])) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
        step = self.counters.step
        self._incident(step, "corruption", named, "see the next line", rank=min(ranks) if len(ranks) == 1 else None)
        self._go_back(step, "corruption", "copies of the weights differ", leave_out=False)
        return True

    def _log(self, progress: log.Progress, loss: float, grad_norm: float, lr: float, since: state.Since) -> None:
        done, run = self.counters, self.run
        seconds = max(done.elapsed - since.elapsed, 1e-9)
        speed = (done.tokens - since.tokens) / seconds
        eta = seconds / max(1, done.step - since.step) * (run.steps - done.step)
        shares = self.timer.shares(max(time.perf_counter() - since.began, seconds))
        used = [self._share_of_peak(flops / seconds) for flops in (since.flops, since.computed)]
        mfu = used[0]
        memory = runtime.peak_memory_gib(self.device)
        samples = schedule.first_sample(run, done.step)
        drawn = [count / samples for count in self.sampler.drawn(samples)] if self.pools else []
        self.metrics.write(
            "train", step=done.step, steps=run.steps, tokens=done.tokens, loss=loss, lr=lr, grad_norm=grad_norm,
            tokens_per_second=speed, mfu=mfu, hfu=used[1], time=shares, memory_gib=memory, elapsed=done.elapsed,
            eta=eta, **({"drawn": dict(zip(self.pools, drawn, strict=True))} if drawn else {}),
        )  # fmt: skip
        progress.update(
            done.step,
            f"{self.stage} {done.step}/{run.steps} ({done.step / run.steps:.0%})  loss {loss:.3f}  lr {lr:.1e}  "
            f"grad {grad_norm:.2f}  {speed:,.0f} tok/s  MFU {f'{mfu:.0%}' if mfu else 'n/a'}  {memory:.1f} GiB  "
            f"{log.duration(done.elapsed)}  ETA {log.duration(eta)}",
            last=done.step == run.steps,
        )

    def _share_of_peak(self, flops_per_second: float) -> float | None:
        """Of all devices together, of what this rank's rows ask for; None while it is not worth measuring the peak."""
        together = reduce.total(torch.tensor(flops_per_second, dtype=torch.float64), self.mesh, ("dp", "fsdp")).item()
        too_early = self.peak.published is None and self.counters.elapsed < WORTH_MEASURING
        if too_early or self.rank or self.run.precision == "fp8":
            return None
        return self.peak.share(together / self.layout.world)

    def _watch(self, last: bool = False) -> None:
        """Evaluate and sample where it is time to, by the averaged weights where there are any."""
        done, every = self.counters, self.run.log
        evaluates, samples = (last or done.step % each == 0 for each in (every.eval_every, every.sample_every))
        if not (evaluates or samples):
            return
        self.dog.beat(f"evaluation at step {done.step}", PATIENT * self.run.health.hang_seconds)
        self.model.eval()
        whole = self.layout.is_whole
        with nullcontext() if self.average is None or done.step == 0 else self.average.applied():
            found = {} if not evaluates else self.watch.evaluate(self.model) if whole else self._score()
            if found:
                self.metrics.write("eval", step=done.step, tokens=done.tokens, **found)
                shown = "  ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in found.items())
                log.say(f"{self.stage} {done.step}: held-out {shown}")
            for prompt, text in self.watch.sample(self.model) if samples and whole else []:
                self.metrics.write("sample", step=done.step, prompt=prompt, text=text)
                log.say(f"  {prompt!r} -> {text.strip()[:100]!r}")
        self.compute.reshard()

    def _score(self) -> dict[str, float]:
        """The mean loss of the held-out rows, as all ranks compute it together."""
        batch = self.watch.heldout
        if batch is None:
            return {}
        mine = shard_of(range(len(batch.starts)), self.layout.data_rank(self.rank), self.layout.num_data_ranks)
        part = rows_of(batch, mine.start, mine.stop)
        return {"loss": self.compute.loss(part, len(batch.starts), self.run.micro_batch_size)[0]}

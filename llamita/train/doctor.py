"""Before step 1: does the run fit into this machine, how long will it take, and is what it does right?"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import median
from typing import Literal

import torch

from llamita import log, runtime
from llamita.data.loader import batches
from llamita.model.llama import Llama, build
from llamita.parallel import memory, rules
from llamita.parallel.layout import Layout
from llamita.train import doctor_checks as checks
from llamita.train import schedule
from llamita.train.doctor_checks import Case, Finding
from llamita.train.utilization import Peak, model_flops

TIMED, ENOUGH = 5, 20.0  # steps that are timed, and the seconds after which fewer are
PATIENCE_DAYS = 60.0
GIB = 2**30


def examine(case: Case, first_weights: Callable[[], Llama]) -> Iterator[Finding]:
    """Every check's finding, one by one. The model of `first_weights`, on the case's device, is trained and thrown
    away: never give the run's own. Without the memory for it the checks that need a model are left out."""
    yield checks.round_trip(case)
    yield checks.labels(case)
    fits = fit(case, _free(case.device))
    yield fits
    if fits.status == "fail":
        return
    model = first_weights()
    for check in (checks.leaks, checks.causality, checks.accumulation, checks.first_loss, checks.overfit):
        yield check(case, model)
    step, update = seconds(case, model)
    yield pace(case, step, update, Peak(case.device, case.run.precision, case.run.shape))
    yield loading(case, step)


def _layout(case: Case) -> Layout:
    """With one shard, where the run takes as many as there will be ranks."""
    return replace(case.run.parallel, fsdp=case.run.parallel.fsdp or 1)


def _free(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else runtime.free_memory()


def fit(case: Case, free: int) -> Finding:
    """What a rank needs, by formula, against so many bytes that this machine has left."""
    run, layout = case.run, _layout(case)
    weights = rules.weights(build(run.shape, device="meta"))
    rows = run.micro_batch_size * layout.num_data_ranks
    found = [
        memory.memory(
            weights, run.shape, layout, rank, seq_len=run.data.seq_len, micro_batch_size=run.micro_batch_size,
            micro_batches=math.ceil(schedule.batch_size(run, run.steps - 1) / rows),
            compute_bytes=case.dtype.itemsize,
        )
        for rank in range(0, layout.world, layout.world // layout.pp)
    ]  # fmt: skip
    most = max(found, key=lambda each: each.total)
    kept = most.weights + most.gradients + most.optimizer
    measured = (
        f"{most.total / GIB:.2f} GiB a rank ({kept / GIB:.2f} weights, gradients and optimizer, "
        f"{most.activations / GIB:.2f} activations, {most.head / GIB:.2f} the head), and {free / GIB:.2f} GiB are free"
    )
    advice = "lower --micro-batch-size or set --parallel.recompute; on more ranks --parallel.fsdp cuts the weights"
    status: Literal["ok", "warn", "fail"] = "ok" if most.total < 0.8 * free else "warn" if most.total < free else "fail"
    return Finding("memory", status, measured, advice * (status != "ok"))


def seconds(case: Case, model: Llama) -> tuple[float, float]:
    """What forward and backward of a micro-batch take, and what clipping and an update do. Trains `model`."""
    batch, step, begun = case.batch(case.run.micro_batch_size), checks.stepper(case, model), time.perf_counter()
    step(batch)  # warms up
    taken = [step(batch)]
    while len(taken) < TIMED and time.perf_counter() - begun < ENOUGH:
        taken.append(step(batch))
    return median(each.passes for each in taken), median(each.update for each in taken)


def pace(case: Case, micro_batch: float, update: float, peak: Peak) -> Finding:
    """Speed, utilization and duration of the whole run, of what `seconds` measured. Ranks are taken to wait for
    nothing; a batch that grows is counted."""
    run, ranks = case.run, _layout(case).num_data_ranks
    per_step = schedule.first_sample(run, run.steps) / run.steps
    step = per_step / run.micro_batch_size / ranks * micro_batch + update
    share = peak.share(model_flops(run.shape, case.batch(run.micro_batch_size)) / micro_batch)
    left = step * run.steps
    mfu = "n/a" if share is None else f"{share:.0%} of the {'published' if peak.published else 'measured'} peak"
    measured = (
        f"{per_step * run.data.seq_len / step:,.0f} tokens/s, forward and backward at {mfu}; "
        f"{run.steps:,} steps take {log.duration(left)}"
    )
    if not left < PATIENCE_DAYS * 86_400:
        advice = f"more than {PATIENCE_DAYS:.0f} days: take fewer steps, a smaller model, or more ranks"
        return Finding("pace", "warn", measured, advice)
    return Finding("pace", "ok", measured)


def loading(case: Case, micro_batch: float, limit: float = 1.0) -> Finding:
    """Rows a second of the loader alone, for about `limit` seconds, against those that training asks for."""
    run, ranks = case.run, _layout(case).num_data_ranks
    stream = batches(
        case.rows, case.sampler, first=0, batch_size=run.batch_size, world=ranks, num_workers=run.data.num_workers
    )
    for _ in range(1 + 2 * run.data.num_workers):  # what workers have fetched ahead is no measure
        next(stream)
    begun, rows = time.perf_counter(), 0
    while (spent := time.perf_counter() - begun) < limit:
        rows += len(next(stream).starts)
    have, need = rows / spent, run.micro_batch_size / micro_batch
    measured = f"{have * run.data.seq_len:,.0f} tokens/s, and training asks for {need * run.data.seq_len:,.0f}"
    if have < need:
        return Finding("loading", "fail", measured, "training would wait for rows: raise --data.num-workers")
    if have < 20 * need and not run.data.num_workers:
        return Finding("loading", "warn", measured, "over 5% of the time goes to rows: try --data.num-workers 2")
    return Finding("loading", "ok", measured)

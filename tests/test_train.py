"""Numerics of the one loop: accumulation, overfitting, optimizers, what it logs, and what it refuses."""

import dataclasses
import errno
import json

import pytest
import torch

from llamita import log
from llamita.kernels.attention import Causal
from llamita.train import loop, state
from llamita.train.compute import accumulate
from llamita.train.objective import Objective, next_token
from llamita.train.optim import Optimizer
from llamita.train.run import Optim
from llamita.train.watch import Watch
from tests.training import RUN, batch_of, model, trainer


def gradients(batch, micro_batch_size, objective=next_token):
    llama = model(dtype=torch.float64)
    loss = accumulate(llama, batch, micro_batch_size, torch.float64, objective)
    return loss, [weight.grad for weight in llama.parameters()]


def test_accumulating_1x32_4x8_and_32x1_gives_the_same_gradient():
    batch = batch_of(32)
    counts = {int((row != -1).sum()) for row in batch.targets_BT}
    assert len(counts) > 3, "the rows must be of unequal lengths"
    loss, whole = gradients(batch, 32)
    for size in (8, 1):
        other_loss, other = gradients(batch, size)
        assert abs(loss - other_loss) < 1e-12
        assert max((a - b).abs().max().item() for a, b in zip(whole, other, strict=True)) < 1e-12


def test_averaging_each_slice_would_be_caught():
    """Negative control: the common mistake, a mean per slice, gives another gradient on the same batch."""

    def mean_of_slice(llama, hidden_BTD, part, dtype, ways):
        return next_token.of_hidden(llama, hidden_BTD, part, dtype, ways) / (part.targets_BT != -1).sum() * tokens / 4

    batch = batch_of(32)
    tokens = (batch.targets_BT != -1).sum()
    _, right = gradients(batch, 8)
    _, wrong = gradients(batch, 8, Objective(mean_of_slice))
    assert max((a - b).abs().max().item() for a, b in zip(right, wrong, strict=True)) > 1e-6


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_one_batch_is_overfitted_to_near_zero(kind):
    llama, batch = model(), batch_of(4)
    optimizer = Optimizer(llama, Optim(kind=kind, lr=2e-2, muon_lr=0.05, weight_decay=0.0))
    first = accumulate(llama, batch, 4, torch.float32)
    for _ in range(150):
        last = accumulate(llama, batch, 4, torch.float32)
        optimizer.step(1.0)
    assert first > 4.5 and last < 0.05


def test_a_batch_that_holds_nothing_to_learn_moves_nothing():
    """Negative control of the overfit: with every target masked the weights stay."""
    llama, batch = model(), batch_of(2)
    before = [weight.clone() for weight in llama.parameters()]
    blank = dataclasses.replace(batch, targets_BT=torch.full_like(batch.targets_BT, -1))
    optimizer = Optimizer(llama, Optim(weight_decay=0.0))
    assert accumulate(llama, blank, 2, torch.float32) == 0
    optimizer.step(1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, llama.parameters(), strict=True))


def test_bf16_starts_where_fp32_starts():
    losses = [accumulate(model(), batch_of(4), 4, dtype) for dtype in (torch.float32, torch.bfloat16)]
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)


def test_the_loop_logs_what_the_report_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "WORTH_MEASURING", 1e9)
    watch = Watch(lambda llama: {"loss": 1.0, "bits_per_byte": 2.0}, lambda llama: [("a", "b")])
    trainer(tmp_path, watch=watch).fit()
    found = log.read(tmp_path / "metrics.jsonl")
    assert {row["kind"] for row in found} == {"settings", "train", "eval", "sample"}
    last = [row for row in found if row["kind"] == "train"][-1]
    assert last["step"] == last["steps"] == 20 and last["mfu"] is None and last["eta"] == 0
    assert last["tokens_per_second"] > 0 and last["memory_gib"] > 0 and last["loss"] < 5
    assert [row["step"] for row in found if row["kind"] == "eval"] == [0, 20]


def test_a_torn_last_line_is_closed_and_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n{"kind": "tra')
    metrics = log.Metrics(path, "train")
    metrics.write("event", message="on we go", loss=float("nan"))
    metrics.close()
    rows = log.read(path)
    assert [row["kind"] for row in rows] == ["train", "event"] and rows[1]["loss"] is None
    assert len(path.read_text().splitlines()) == 3


def test_a_loss_that_stays_no_number_stops_the_run_and_says_what_to_do(tmp_path):
    started = trainer(tmp_path)
    with torch.no_grad():
        started.model.norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match=r"loss is nan.* at step 3, .*no checkpoint to go back to: lower --optim.lr"):
        started.fit()
    assert not (tmp_path / "checkpoints").exists()


def test_a_disk_that_takes_no_line_of_the_logs_ends_no_run(tmp_path, monkeypatch, capsys):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    started = trainer(tmp_path, dataclasses.replace(RUN, steps=4))
    real, first = started.compute.gradients, []

    def faulty_once(*args):
        found = real(*args)
        if not first:
            first.append(found)
            return float("nan"), found[1]
        return found

    monkeypatch.setattr(loop.incidents, "append", full)
    monkeypatch.setattr(started.compute, "gradients", faulty_once)
    started.fit()
    assert started.counters.step == 4
    assert "the incident log could not be written: No space left on device" in capsys.readouterr().err


def test_the_guard_and_the_clock_go_on_from_a_checkpoint(tmp_path):
    begun = trainer(tmp_path, dataclasses.replace(RUN, steps=5))
    begun.guard.skipped = [2, 7]
    begun.fit()
    again = trainer(tmp_path, dataclasses.replace(RUN, steps=5))
    assert again.guard.state() == begun.guard.state() and again.guard.skipped == [2, 7] and len(again.guard.losses) == 4
    assert again.counters.elapsed == begun.counters.elapsed > 0 and again.counters.tokens == begun.counters.tokens


def test_watching_does_not_change_the_weights(tmp_path):
    def nosy(llama):
        torch.rand(3)
        return {"loss": llama(torch.zeros(1, 4, dtype=torch.int64), Causal()).sum().item()}

    quiet, watched = trainer(tmp_path / "a").fit(), trainer(tmp_path / "b", watch=Watch(nosy)).fit()
    assert all(torch.equal(a, b) for a, b in zip(quiet.parameters(), watched.parameters(), strict=True))


def test_settings_of_the_run_lie_in_the_folder_and_in_every_checkpoint(tmp_path):
    trainer(tmp_path).fit()
    wanted = (tmp_path / "run.toml").read_text()
    found = sorted((tmp_path / "checkpoints").iterdir())
    assert [path.name for path in found] == ["step_00000015", "step_00000020"]
    assert all((path / "run.toml").read_text() == wanted for path in found)
    assert state.counters(found[-1]).step == RUN.steps


def test_a_trace_of_three_steps_is_written_on_request(tmp_path):
    run = dataclasses.replace(RUN, steps=8, log=dataclasses.replace(RUN.log, trace_step=4))
    trainer(tmp_path, run).fit()
    assert {path.name for path in (tmp_path / "trace").iterdir()} == {"trace-0.json", "trace-0.txt"}
    traced = json.loads((tmp_path / "trace/trace-0.json").read_text())
    assert any("mm" in event["name"] for event in traced["traceEvents"])
    trainer(tmp_path / "quiet", dataclasses.replace(RUN, steps=2)).fit()
    assert not (tmp_path / "quiet/trace").exists()


def test_the_share_of_a_measured_peak_is_one_of_real_work(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "WORTH_MEASURING", 0.0)
    trainer(tmp_path, dataclasses.replace(RUN, steps=5, seed=3)).fit()
    (row,) = [row for row in log.read(tmp_path / "metrics.jsonl") if row["kind"] == "train"]
    assert 0 < row["mfu"] <= row["hfu"] <= 1
    assert sum(row["time"].values()) == pytest.approx(1.0, abs=0.02) and row["time"]["backward"] > 0.1
    state_after = torch.get_rng_state()
    torch.manual_seed(3)
    assert torch.equal(state_after, torch.get_rng_state()), "measuring must not draw from the run's random numbers"


@pytest.mark.parametrize(
    ("section", "change", "told"),
    [("optim", {"clip": 0.0}, "optim.clip must be above 0"), ("optim", {"lr": -1.0}, "optim.lr must not be below 0"),
     ("optim", {"beta2": 1.0}, "beta1 and beta2"), ("checkpoint", {"keep_every": -1}, "checkpoint.keep_every")],
)  # fmt: skip
def test_settings_that_cannot_train_are_refused(section, change, told):
    with pytest.raises(ValueError, match=told):
        dataclasses.replace(RUN, **{section: dataclasses.replace(getattr(RUN, section), **change)})

"""Pure arithmetic: learning rate, batch size and first sample by step; a run stopped or branched anywhere goes on."""

import dataclasses
import math
from itertools import pairwise

import pytest
import torch

from llamita import config
from llamita.data.loader import batches
from llamita.data.sampler import Sampler
from llamita.train.objective import next_token, num_targets
from llamita.train.optim import Optimizer
from llamita.train.run import Data, Run, Schedule
from llamita.train.schedule import (
    batch_size,
    check_extension,
    decay_start,
    extended,
    first_sample,
    lr_ratio,
    place,
    stages,
)
from tests.training import RUN, model, rows

WSD = Schedule(kind="wsd", warmup_steps=10, decay_share=0.2)
ROOT = dataclasses.replace(WSD, decay="1-sqrt")
COSINE = Schedule(kind="cosine", warmup_steps=10, final_ratio=0.1)
STEM = dataclasses.replace(RUN, steps=12, schedule=Schedule(warmup_steps=2, decay_steps=3, ramp=("4:6", "2_000t:8")))


@pytest.mark.parametrize(
    ("schedule", "step", "ratio"),
    [
        (WSD, 0, 0.1), (WSD, 9, 1.0), (WSD, 10, 1.0), (WSD, 79, 1.0), (WSD, 80, 1.0), (WSD, 81, 0.95), (WSD, 90, 0.5),
        (WSD, 99, 0.05), (WSD, 100, 0.0), (WSD, 130, 0.0),
        (ROOT, 80, 1.0), (ROOT, 81, 1 - math.sqrt(0.05)), (ROOT, 85, 0.5), (ROOT, 99, 1 - math.sqrt(0.95)),
        (ROOT, 100, 0.0), (dataclasses.replace(ROOT, final_ratio=0.5), 85, 0.75),
        (dataclasses.replace(WSD, decay_steps=10), 90, 1.0), (dataclasses.replace(WSD, decay_steps=10), 95, 0.5),
        (dataclasses.replace(WSD, decay_share=0.0), 99, 1.0), (dataclasses.replace(WSD, decay_share=1.0), 50, 0.5),
        (COSINE, 9, 1.0), (COSINE, 10, 1.0), (COSINE, 55, 0.55),
        (COSINE, 32, 0.1 + 0.45 * (1 + math.cos(math.pi * 22 / 90))),
        (COSINE, 100, 0.1), (COSINE, 130, 0.1),
        (Schedule(warmup_steps=0), 0, 1.0), (dataclasses.replace(WSD, final_ratio=0.1), 130, 0.1),
    ],
)  # fmt: skip
def test_the_rate_at_its_borders(schedule, step, ratio):
    assert lr_ratio(schedule, step, 100) == pytest.approx(ratio, abs=1e-12)


def test_rates_rise_and_fall_and_the_root_falls_faster_at_first():
    for schedule in (WSD, ROOT, COSINE):
        rates = [lr_ratio(schedule, step, 100) for step in range(120)]
        assert all(a < b for a, b in pairwise(rates[:10])) and all(a >= b for a, b in pairwise(rates[9:]))
    assert all(lr_ratio(ROOT, step, 100) < lr_ratio(WSD, step, 100) for step in range(81, 100))


def with_ramp(*ramp: str, **changes) -> Run:
    return dataclasses.replace(RUN, schedule=Schedule(ramp=ramp), **changes)


def test_llama3s_ramp():
    """arXiv 2407.21783, section 3.4.1: 4M tokens a step, 8M after 252M tokens, 16M after 2.87T; rows of 8,192 here."""
    run = with_ramp("252_000_000t:1024", "2_870_000_000_000t:2048", steps=1_200_000, batch_size=512)
    run = dataclasses.replace(run, shape=dataclasses.replace(run.shape, max_seq_len=8192), data=Data(seq_len=8192))
    first, second, third = stages(run)
    assert (first.rows * 8192, second.rows * 8192, third.rows * 8192) == (2**22, 2**23, 2**24)
    assert second.step == math.ceil(252e6 / 2**22) == 61
    for stage, tokens in ((second, 252_000_000), (third, 2_870_000_000_000)):
        assert (stage.first_sample - batch_size(run, stage.step - 1)) * 8192 < tokens <= stage.first_sample * 8192
        assert (batch_size(run, stage.step - 1), batch_size(run, stage.step)) == (stage.rows // 2, stage.rows)


@pytest.mark.parametrize("ramp", [(), ("4:6",), ("4:6", "2_000t:8", "15:2"), ("256t:2", "257t:4")])
def test_every_sample_belongs_to_exactly_one_step(ramp):
    run = with_ramp(*ramp)
    assert first_sample(run, 0) == 0 and batch_size(run, 0) == run.batch_size
    for step in range(40):
        assert first_sample(run, step + 1) == first_sample(run, step) + batch_size(run, step)
        assert place(run, first_sample(run, step)) == (step, 0)
        assert place(run, first_sample(run, step + 1) - 1) == (step, batch_size(run, step) - 1)
    if ramp:
        assert first_sample(run, 40) != 40 * run.batch_size, "negative control: one batch size is not enough"


@pytest.mark.parametrize(
    ("ramp", "message"),
    [
        (("100",), "'100' is no stage"), (("1:0",), "'1:0' is no stage"), (("5k:8",), "'5k' is no length"),
        (("0:8",), "begins at step 0, not after 0"), (("9:8", "4:16"), "begins at step 4, not after 9"),
        (("9:8", "100t:16"), "begins at step 9|not after 9"), (("4:7",), "no multiple of micro_batch_size 2"),
    ],
)  # fmt: skip
def test_a_ramp_that_cannot_be_is_refused(ramp, message):
    with pytest.raises(ValueError, match=message):
        stages(with_ramp(*ramp))


def test_a_schedule_that_cannot_be_is_refused():
    for wrong in ({"decay_share": 1.5}, {"warmup_steps": -1}, {"decay_steps": -1}):
        with pytest.raises(ValueError, match="decay_share is from 0 to 1"):
            Schedule(**wrong)


class Training:
    """A loop such as the real one: its whole state is weights, optimizer and one integer."""

    def __init__(self, run: Run):
        self.run, self.step, self.model = run, 0, model(run.seed)
        self.optimizer = Optimizer(self.model, run.optim)
        self.drawn: list[tuple[int, int, float]] = []
        source = rows(run.data.seq_len)
        self.rows, self.sampler = [source], Sampler([len(source)], None, run.data.seed)

    def to(self, step: int, run: Run | None = None) -> "Training":
        run = self.run = run or self.run
        while self.step < step:
            first, rows = first_sample(run, self.step), batch_size(run, self.step)
            batch = next(batches(self.rows, self.sampler, first=first, batch_size=rows))
            loss = next_token(self.model, batch, torch.float32) / num_targets(batch)
            loss.backward()
            self.optimizer.step(lr_ratio(run.schedule, self.step, run.steps))
            self.drawn.append((batch.first, len(batch.starts), loss.item()))
            self.step += 1
        return self

    def stopped_and_resumed(self) -> "Training":
        again = Training(dataclasses.replace(self.run, seed=1))
        again.run, again.step, again.drawn = self.run, self.step, list(self.drawn)
        again.model.load_state_dict(self.model.state_dict())
        again.optimizer.load_state_dict(self.optimizer.state_dict())
        return again

    def same_as(self, other: "Training") -> bool:
        pairs = zip(self.model.parameters(), other.model.parameters(), strict=True)
        return self.drawn == other.drawn and all(torch.equal(a, b) for a, b in pairs)


def test_stopped_at_any_step_of_a_ramp_it_goes_on_bit_for_bit():
    assert [stage.step for stage in stages(STEM)] == [0, 4, 7]
    straight = Training(STEM).to(12)
    stopped = Training(STEM)
    for step in range(1, 13):
        stopped = stopped.to(step).stopped_and_resumed()
    assert stopped.same_as(straight)
    flat = dataclasses.replace(STEM, schedule=dataclasses.replace(STEM.schedule, ramp=()))
    assert not Training(STEM).to(5).stopped_and_resumed().to(12, flat).same_as(straight), "negative control"


def test_a_branch_is_the_run_that_was_planned_with_its_fall_from_the_start():
    for step, steps, fall in ((9, 12, 3), (6, 13, 4)):
        run = extended(STEM, step, steps=steps, decay_steps=fall)
        planned = Training(run).to(steps)
        branched = Training(STEM).to(step).stopped_and_resumed()
        branched.to(step + 1, run)
        assert branched.stopped_and_resumed().to(steps, run).same_as(planned), "stopped in the middle of a branch too"
        rates = [lr_ratio(run.schedule, each, steps) for each in range(steps)]
        assert rates[: step + 1] == [lr_ratio(STEM.schedule, each, 12) for each in range(step + 1)]
        assert rates[steps - fall :] == pytest.approx([1 - each / fall for each in range(fall)])
    late = Training(STEM).to(11).stopped_and_resumed().to(12, extended(STEM, 9, steps=12, decay_steps=2))
    assert not late.same_as(Training(extended(STEM, 9, steps=12, decay_steps=2)).to(12)), "negative control"


def test_a_finished_run_is_extended_from_its_plateau_only():
    assert decay_start(STEM.schedule, STEM.steps) == 9
    with pytest.raises(
        ValueError, match=r"the stem's learning rate falls from step 9 on, before step 12 .* at or before 9"
    ):
        extended(STEM, 12, steps=30, decay_steps=5)
    with pytest.raises(ValueError, match="falls from step 9 on, before step 10"):
        extended(STEM, 10, steps=30, decay_steps=5)
    with pytest.raises(ValueError, match="does not fit between steps 9 and 11"):
        extended(STEM, 9, steps=11, decay_steps=3)
    cosine = dataclasses.replace(STEM, schedule=Schedule(kind="cosine", warmup_steps=2))
    with pytest.raises(ValueError, match=r"only a plateau can be gone on from"):
        extended(cosine, 9, steps=30, decay_steps=5)
    with pytest.raises(ValueError, match="the stem's learning rate falls from step 2 on"):
        check_extension(cosine, dataclasses.replace(cosine, steps=30), 9)
    check_extension(cosine, cosine, 9)
    jump = lr_ratio(cosine.schedule, 9, 30) - lr_ratio(cosine.schedule, 9, 12)
    assert jump > 0.5, "what the refusal prevents: at step 9 the longer cosine's rate is far above the stem's"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"steps": 20, "schedule.decay_steps": 15},
            "the extended learning rate falls from step 5 on, .* or fall over fewer",
        ),
        ({"steps": 20, "schedule.warmup_steps": 3}, "only a plateau can be gone on from"),
        ({"schedule.ramp": ("5:6", "2_000t:8")}, "schedule.ramp differs before step 9"),
        ({"batch_size": 2}, "schedule.ramp differs before step 9"),
        ({"data.mix": ("rest", "5: kind=code:30% rest")}, "data.mix differs before step 9"),
    ],
)
def test_an_extension_that_changes_what_is_done_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        check_extension(STEM, config.override(STEM, changes), 9)


def test_what_follows_may_change():
    later = {
        "steps": 40,
        "schedule.decay": "1-sqrt",
        "schedule.decay_steps": 9,
        "schedule.final_ratio": 0.1,
        "schedule.ramp": ("4:6", "2_000t:8", "30:16"),
        "data.mix": ("natural", "9: kind=code:30% rest"),
    }
    check_extension(STEM, config.override(STEM, later), 9)


def test_annealing_on_another_mixture_leaves_the_stems_phases_at_their_steps():
    stem = config.override(
        STEM, {"steps": 100, "data.mix": ("rest", "40%: kind=code:20% rest", "95%: lang=de:9% rest")}
    )
    run = extended(stem, 60, steps=70, decay_steps=10, mix_line="source=books:30% rest")
    assert run.data.mix == ("rest", "40: kind=code:20% rest", "60: source=books:30% rest")
    assert (run.steps, run.schedule.decay_steps, lr_ratio(run.schedule, 65, 70)) == (70, 10, 0.5)
    assert extended(stem, 60, steps=200, decay_steps=10).data.mix == (
        "rest", "40: kind=code:20% rest", "95: lang=de:9% rest")  # fmt: skip
    assert extended(STEM, 9, steps=12, decay_steps=3).data.mix == ()
    with pytest.raises(ValueError, match=r"data\.mix differs before step 60"):
        check_extension(stem, config.override(stem, {"steps": 200, "schedule.decay_steps": 3}), 60)


def test_the_new_settings_pass_through_a_file(tmp_path):
    config.save(STEM, tmp_path / "run.toml")
    assert config.load(Run, tmp_path / "run.toml") == STEM

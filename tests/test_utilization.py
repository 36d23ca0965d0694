"""What a step costs, against torch's own counter; shares of a peak; where time goes, by a clock that a test moves."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llamita import runtime
from llamita.kernels.attention import Documents, reference
from llamita.parallel import apply
from llamita.parallel.layout import Layout
from llamita.train import utilization
from llamita.train.objective import Ways, next_token
from llamita.train.utilization import PARTS, Peak, Timer, hardware_flops, model_flops, profile, work
from tests.training import SHAPE, batch_of, model, rows

CPU = torch.device("cpu")


def seen(batch) -> torch.Tensor:
    """Who sees whom, written out: bool [B, T, T]."""
    seq_len = batch.inputs_BT.shape[1]
    of_BT = torch.zeros_like(batch.inputs_BT)
    for row, starts in enumerate(batch.starts):
        for start in starts:
            of_BT[row, start:] = start
    return (of_BT.unsqueeze(2) == of_BT.unsqueeze(1)) & torch.ones(seq_len, seq_len, dtype=torch.bool).tril()


class Written(Documents):
    """Packed documents with every query multiplied by every key, as FLOP counters see attention."""

    def __init__(self, batch):
        super().__init__(batch.starts)
        self.mask_BTT = seen(batch)

    def __call__(self, layer, q_BTNH, k_BTKH, v_BTKH):
        return reference(q_BTNH, k_BTKH, v_BTKH, self.mask_BTT)


def counted(batch, recompute: bool) -> float:
    """FLOPs of forward, loss and backward by torch's counter, with attention's square made the pairs that are seen."""
    llama = model()
    apply.parallelize(llama, Layout(recompute=recompute), None, compute_dtype=torch.float32, reduce_dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        next_token(llama, batch, torch.float32, Ways(Written)).backward()
    unseen = batch.inputs_BT.numel() * batch.inputs_BT.shape[1] - int(seen(batch).sum())
    return counter.get_total_flops() - (3 + recompute) * 4 * SHAPE.num_layers * SHAPE.dim * unseen


def test_flops_of_packed_documents_are_those_that_torch_counts():
    batch = batch_of(5)
    assert any(len(starts) > 2 for starts in batch.starts)
    assert hardware_flops(SHAPE, batch, recompute=False) == counted(batch, recompute=False)


def test_recomputed_layers_are_those_that_torch_counts():
    batch = batch_of(3)
    assert hardware_flops(SHAPE, batch, recompute=True) == counted(batch, recompute=True)
    assert hardware_flops(SHAPE, batch, recompute=True) > 1.2 * hardware_flops(SHAPE, batch, recompute=False)


def test_tokens_and_pairs_are_those_of_the_mask_and_padding_is_no_work():
    batch = batch_of(6)
    assert work(batch, padding=True) == (batch.inputs_BT.numel(), int(seen(batch).sum()))
    packed = rows()
    padded = [i for i in range(len(packed)) if packed[i].targets[-1] == -1]
    assert padded, "some rows must have padding"
    whole = utilization.Batch(*batch_rows(packed, padded))
    tokens, pairs = work(whole, padding=False)
    real_BT = whole.targets_BT != -1
    assert tokens == int(real_BT.sum()) < whole.inputs_BT.numel()
    assert pairs == int((seen(whole) & real_BT.unsqueeze(2)).sum())
    assert model_flops(SHAPE, whole) < hardware_flops(SHAPE, whole, recompute=False)


def batch_rows(packed, numbers):
    picked = [packed[i] for i in numbers]
    inputs_BT, targets_BT = (torch.stack([torch.from_numpy(row[i]) for row in picked]) for i in (0, 1))
    return inputs_BT, targets_BT, [row.starts for row in picked], 0


def test_a_row_that_is_one_document_costs_what_the_shape_says():
    batch = utilization.Batch(torch.ones(2, 64, dtype=torch.int64), torch.ones(2, 64, dtype=torch.int64), [[0], [0]], 0)
    assert model_flops(SHAPE, batch) == 128 * SHAPE.train_flops_per_token(64)


def test_a_share_is_never_above_one_and_a_slow_measurement_is_taken_again(monkeypatch):
    speeds = iter([100.0, 90.0, 80.0, 300.0])
    asked = []

    def measured(device, dtype, sizes, again=False):
        asked.append(again)
        kept.append(max(next(speeds), kept[-1]) if again or len(kept) == 1 else kept[-1])
        return kept[-1]

    kept = [0.0]
    monkeypatch.setattr(runtime, "measured_peak", measured)
    peak = Peak(CPU, "bf16", SHAPE)
    assert asked == [], "nothing is measured before it is asked for"
    assert peak.share(50.0) == 0.5 and not any(asked)
    assert peak.share(200.0) == 1.0 and asked.count(True) == 1, "measured 90 the second time, but 200 was reached"
    assert peak.share(100.0) == 0.5
    assert peak.share(250.0) == 1.0 and peak.share(350.0) == 1.0 and peak.share(175.0) == 0.5


def test_a_published_peak_is_not_measured_and_more_than_it_is_not_available(monkeypatch):
    monkeypatch.setattr(runtime, "peak_flops", lambda device, precision: 1000.0)
    monkeypatch.setattr(runtime, "measured_peak", None)
    peak = Peak(CPU, "bf16", SHAPE)
    assert peak.share(400.0) == 0.4 and peak.share(1001.0) is None


def test_a_measured_peak_is_the_fastest_size_and_is_kept(monkeypatch):
    speeds = iter([5.0, 7.0, 1.0, 2.0, 9.0, 3.0])
    monkeypatch.setattr(runtime, "_matmul_speed", lambda *_, **__: next(speeds))
    monkeypatch.setattr(runtime, "_measured", {})
    sizes = [(1, 2, 3), (4, 5, 6)]
    assert runtime.measured_peak(CPU, torch.float32, sizes) == runtime.measured_peak(CPU, torch.float32, sizes) == 7
    assert runtime.measured_peak(CPU, torch.float32, sizes, again=True) == 7, "a slow minute takes nothing away"
    assert runtime.measured_peak(CPU, torch.float32, sizes, again=True) == 9


def test_the_speed_of_a_matmul_is_a_speed():
    assert 1e6 < runtime._matmul_speed(CPU, torch.bfloat16, 64, 64, 64, seconds=0.0) < 1e16


def walk(timer, clock) -> None:
    """data 1, forward 2, backward 4 of which 1 is communication, 1 between."""
    for part, seconds in (("data", 1.0), ("forward", 2.0)):
        with timer(part):
            clock[0] += seconds
    clock[0] += 1
    with timer("backward"):
        clock[0] += 2
        with timer("communication"):
            clock[0] += 1
        clock[0] += 1


def test_time_goes_to_the_innermost_part_and_the_rest_is_other():
    clock = [100.0]
    timer = Timer(CPU)
    timer._now = lambda: clock[0]
    walk(timer, clock)
    shares = timer.shares(10.0)
    assert set(shares) == {*PARTS, "other"} and sum(shares.values()) == pytest.approx(1)
    assert (shares["data"], shares["forward"], shares["backward"], shares["communication"]) == (0.1, 0.2, 0.3, 0.1)
    assert shares["other"] == pytest.approx(0.3) and shares["optimizer"] == 0
    timer.reset()
    assert timer.shares(1.0)["other"] == 1
    walk(timer, clock)
    walk(timer, clock)
    assert timer.shares(20.0)["forward"] == 0.2, "shares of all steps since the reset"


def test_a_part_that_fails_is_closed():
    timer = Timer(CPU)
    with pytest.raises(KeyError), timer("data"):
        raise KeyError
    assert timer._open == ["other"]


def test_events_are_waited_for_only_when_shares_are_asked():
    """A GPU's timer, with events that stand for CUDA's."""
    clock, waits = [0.0], []

    class Event:
        def __init__(self):
            self.at = clock[0]

        def synchronize(self):
            waits.append(self.at)

        def elapsed_time(self, end):
            return 1000 * (end.at - self.at)

    timer = Timer(CPU)
    timer._now = Event
    walk(timer, clock)
    assert waits == []
    assert timer.shares(10.0)["backward"] == pytest.approx(0.3) and waits == [8.0]


def test_a_profile_holds_the_steps_that_were_asked_for(tmp_path):
    with profile(tmp_path, range(2, 4), rank=3) as profiler:
        for number in range(6):
            with torch.profiler.record_function(f"number {number}"):
                torch.randn(8, 8) @ torch.randn(8, 8)
            profiler.step()
    events = json.loads((tmp_path / "trace-3.json").read_text())["traceEvents"]
    assert {event["name"] for event in events if event["name"].startswith("number")} == {"number 2", "number 3"}
    assert "aten::mm" in (tmp_path / "trace-3.txt").read_text()

"""The doctor finds nothing wrong with a sound run, and each check finds the fault that it is there for."""

import dataclasses
import io
import json

import numpy as np
import pytest
import torch
from rich.console import Console

from llamita import cli
from llamita.cli import training
from llamita.data.pack import PackedRows
from llamita.data.sampler import Sampler
from llamita.kernels.attention import Causal, Documents, reference
from llamita.model.llama import build
from llamita.recipes import doctor as room
from llamita.recipes.runs import recipe
from llamita.train import doctor
from llamita.train import doctor_checks as checks
from llamita.train.doctor_checks import Case, Finding, Shown
from llamita.train.objective import Objective, Ways, next_token
from llamita.train.run import Data, Optim
from llamita.train.utilization import Peak
from tests.fakes import Texts, byte_tokenizer
from tests.training import RUN

TOKENIZER = byte_tokenizer()
SHAPE = dataclasses.replace(RUN.shape, vocab_size=TOKENIZER.vocab_size)
CPU = torch.device("cpu")


def documents(count: int = 60) -> list[list[int]]:
    words = "the llama hums a song on its hill and counts stars".split()
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(words, size)) for size in generator.integers(1, 12, count)]
    return [TOKENIZER.encode(text, bos=True, eos=True) for text in texts]


FULL = [TOKENIZER.encode(letter * 63, bos=True, eos=True) for letter in "ab"]  # each fills a row


class Rows:
    """Packed rows that a test may spoil."""

    def __init__(self, packed, spoil=lambda inputs, targets, starts: starts):
        self.packed, self.seq_len, self.spoil = packed, packed.seq_len, spoil

    def __len__(self):
        return len(self.packed)

    def fill(self, i, inputs, targets):
        return self.spoil(inputs, targets, self.packed.fill(i, inputs, targets))


def case(docs=None, spoil=None, run=RUN, seq_len=64, **changes) -> Case:
    texts = Texts(docs or documents())
    rows = Rows(PackedRows(texts, seq_len), *([spoil] if spoil else []))
    run = dataclasses.replace(run, shape=SHAPE, data=Data(seq_len=seq_len))
    return Case(run, [rows], Sampler([len(rows)]), texts, TOKENIZER, CPU, **changes)


def fresh(scale: float = 1.0):
    llama = build(SHAPE).init_weights(0)
    with torch.no_grad():
        for weight in llama.parameters():
            weight.mul_(scale)
    return llama


def of_run(optim=None, **changes):
    return dataclasses.replace(RUN, **changes, **({"optim": optim} if optim else {}))


def test_a_sound_run_passes_every_check():
    found = list(doctor.examine(case(), fresh))
    names = ["tokenizer", "labels", "memory", "leaks", "causality", "accumulation", "first loss", "overfit", "pace"]
    assert [finding.name for finding in found] == [*names, "loading"]
    assert {finding.status for finding in found} <= {"ok", "warn"}, found
    assert all(finding.status == "ok" for finding in found[:-2]), found
    assert all(finding.measured and "\n" not in finding.measured for finding in found)


def test_a_sound_run_in_bfloat16_passes():
    sound = case(run=of_run(precision="bf16"))
    for check in (checks.leaks, checks.causality, checks.accumulation, checks.first_loss, checks.overfit):
        assert check(sound, fresh()).status == "ok", check


def test_a_mask_that_lets_documents_see_one_another_is_found():
    leaky = case(ways=Ways(lambda batch: Causal()))
    assert checks.leaks(leaky, fresh()).status == "fail"
    assert checks.causality(leaky, fresh()).status == "ok"


def test_a_single_border_that_is_forgotten_is_found_and_a_long_document_is_cut_to_try():
    def forgetful(batch):
        return Documents([starts[:-1] for starts in batch.starts])

    assert checks.leaks(case(ways=Ways(forgetful)), fresh()).status == "fail"
    assert checks.leaks(case(FULL), fresh()).status == "ok"
    assert checks.leaks(case(FULL, ways=Ways(lambda batch: Causal())), fresh()).status == "fail"


class SeesAhead(Documents):
    """Each token sees the next one of its document too."""

    def __call__(self, layer, q_BTNH, k_BTKH, v_BTKH):
        length = q_BTNH.shape[1]
        of_BT = torch.zeros(len(self.starts), length, dtype=torch.int64)
        for row, starts in enumerate(self.starts):
            for start in starts:
                of_BT[row, start:] = start
        near = torch.ones(length, length, dtype=torch.bool).tril(1)
        return reference(q_BTNH, k_BTKH, v_BTKH, near & (of_BT.unsqueeze(2) == of_BT.unsqueeze(1)))


def test_a_token_that_sees_the_next_one_is_found():
    ahead = case(ways=Ways(lambda batch: SeesAhead(batch.starts)))
    assert checks.causality(ahead, fresh()).status == "fail"
    assert checks.leaks(ahead, fresh()).status == "ok"


def test_a_model_that_sees_nothing_passes_no_mask_check():
    """Without this nothing would move, neither wrongly nor rightly."""
    for check in (checks.leaks, checks.causality):
        assert check(case(), fresh(0.0)).status == "fail"


def shifted(inputs, targets, starts):
    targets[1:] = targets[:-1].copy()
    return starts


def across(inputs, targets, starts):
    for start in starts[1:]:
        targets[start - 1] = inputs[start]
    return starts


def joined(inputs, targets, starts):
    for start in starts[1:]:
        targets[start - 1] = -1
    return starts[:1]


def masked(inputs, targets, starts):
    targets[:] = -1
    return starts


def mostly_masked(inputs, targets, starts):
    targets[10:] = -1
    return starts


@pytest.mark.parametrize(("spoil", "status"), [
    (shifted, "fail"), (across, "fail"), (masked, "fail"), (joined, "fail"),
    (mostly_masked, "warn"),
])  # fmt: skip
def test_wrong_labels_are_found(spoil, status):
    assert checks.labels(case(spoil=spoil)).status == status


def test_the_label_view_tells_targets_from_others():
    docs = [TOKENIZER.encode(text, bos=True, eos=True) for text in ("a llama", "x" * 53)]

    def first_four_masked(inputs, targets, starts):
        for start in starts:
            targets[start : start + 4] = -1
        return starts

    finding = checks.labels(case(docs, spoil=first_four_masked))
    assert finding.view[:11] == (
        Shown("| ", "border"), Shown("<|begin_of_text|>xxxx", "no loss"), Shown("x" * 19, "loss"),
        Shown(" ... ", "border"), Shown("x" * 5 + "<|end_of_text|>", "loss"),
        Shown("| ", "border"), Shown("<|begin_of_text|>a ll", "no loss"), Shown("ama<|end_of_text|>", "loss"),
        *finding.view[8:11],
    )  # fmt: skip


def shown(console: Console) -> str:
    finding = Finding(
        "labels", "warn", "50%", "do this", (Shown("| ", "border"), Shown("[a", "no loss"), Shown("b\n", "loss"))
    )
    assert room.show([finding], console) == [finding]
    return console.file.getvalue()


def test_a_finding_is_shown_in_colour_and_without():
    plain = shown(Console(file=io.StringIO()))
    assert plain == "warn labels        50%\n     -> do this\n     | [[a]b\\n\n"
    coloured = shown(Console(file=io.StringIO(), force_terminal=True, color_system="standard"))
    assert "\x1b[32mb" in coloured and "[[a]" not in coloured


def test_a_mean_of_means_is_found():
    """Even where all rows have as many targets, so that it would do no harm."""

    def mean(llama, hidden_BTD, part, dtype, ways):
        total = next_token.of_hidden(llama, hidden_BTD, part, dtype, ways)
        return total / (part.targets_BT != -1).sum() * len(part.starts)

    assert checks.accumulation(case(FULL, objective=Objective(mean)), fresh()).status == "fail"


def test_a_first_loss_that_is_too_high_or_too_low_is_found():
    assert checks.first_loss(case(), fresh(8.0)).status == "fail"
    told = Objective(lambda llama, hidden_BTD, part, dtype, ways: (part.targets_BT != -1).sum() * 0.5)
    finding = checks.first_loss(case(objective=told), fresh())
    assert finding.status == "fail" and "sees what it is to predict" in finding.advice


@pytest.mark.parametrize(("lr", "status"), [(0.0, "fail"), (1e-4, "warn"), (1e-2, "ok"), (1e3, "fail")])
def test_a_rate_at_which_nothing_is_learnt_is_found(lr, status):
    assert checks.overfit(case(run=of_run(Optim(lr=lr))), fresh()).status == status


def test_a_corpus_of_another_tokenizer_is_found():
    good = documents(5)
    bos, eos = TOKENIZER.bos_id, TOKENIZER.eos_id
    assert checks.round_trip(case(good)).status == "ok"
    for bad, said in (
        ([bos, 900, eos], "has the id 900"), ([65, 66, eos], "between BOS and EOS"), ([bos, 65], "between BOS and EOS"),
        ([bos, 0xFF, 0xC3, eos], "other ids"),
    ):  # fmt: skip
        finding = checks.round_trip(case([*good, bad]))
        assert finding.status == "fail" and said in finding.measured, finding


BIG = dataclasses.replace(recipe("100m"), batch_size=1024)


def fits(free: int, **axes) -> Finding:
    parallel = dataclasses.replace(BIG.parallel, **axes)
    return doctor.fit(dataclasses.replace(case(), run=dataclasses.replace(BIG, parallel=parallel)), free)


def test_memory_of_a_rank_is_held_against_what_is_free():
    def needed(**axes) -> float:
        return float(fits(0, **axes).measured.split()[0])

    for share, status in ((0.9, "fail"), (1.1, "warn"), (1.3, "ok")):
        assert fits(int(share * needed() * 2**30)).status == status
    assert needed() == needed(fsdp=1) == needed(dp=2)
    assert needed() - needed(fsdp=4) == pytest.approx(0.75 * 16 * BIG.shape.num_params / 2**30, abs=0.02)
    assert needed(pp=2) < needed()


def test_without_the_memory_no_model_is_made(monkeypatch):
    monkeypatch.setattr(doctor, "_free", lambda device: 1000)
    found = list(doctor.examine(case(), None))
    assert [finding.name for finding in found] == ["tokenizer", "labels", "memory"] and found[-1].status == "fail"


class Known(Peak):
    """A peak of 1 TFLOP/s."""

    flops = 1e12


def test_pace_counts_slices_updates_and_a_growing_batch():
    peak = Known(CPU, "fp32", SHAPE)
    found = doctor.pace(case(), 1.0, 0.5, peak)  # 20 steps, each 2 slices and an update: 50 s, 256 tokens in 2.5 s
    assert found.status == "ok" and found.measured.startswith("102 tokens/s") and "20 steps take 50s" in found.measured
    schedule = dataclasses.replace(RUN.schedule, ramp=("10:8",))  # then 10 steps of 4 slices and an update: 45 s
    assert "take 1m10s" in doctor.pace(case(run=of_run(schedule=schedule)), 1.0, 0.5, peak).measured
    parallel = dataclasses.replace(RUN.parallel, dp=2)
    assert "take 30s" in doctor.pace(case(run=of_run(parallel=parallel)), 1.0, 0.5, peak).measured
    assert doctor.pace(case(), 1e6, 0.5, peak).status == "warn"


def test_rows_that_come_too_slowly_are_found():
    """Against needs so far apart that no machine is fast or slow enough to matter."""
    assert doctor.loading(case(), 1e-12, limit=0.05).status == "fail"
    assert doctor.loading(case(), 1e3, limit=0.05).status == "ok"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    home = tmp_path_factory.mktemp("doctor")
    (home / "text").mkdir()
    for number in range(30):
        lines = [f"Story {number}: a llama hums {number * line} songs and counts {line} stars.\n" for line in range(20)]
        (home / "text" / f"{number}.txt").write_text("".join(lines))
    words = ["tokenizer", "train", str(home / "text"), "--out", str(home / "tok"), "--vocab-size", "600"]
    assert cli.main(words) == 0
    words = ["data", "build", "plain", str(home / "text"), "--tokenizer", str(home / "tok"), "--out", str(home / "c")]
    assert cli.main(words) == 0
    return home / "c"


def examined(corpus, lr: float) -> training.Examined:
    run = recipe("tiny")
    shape = dataclasses.replace(run.shape, dim=64, ffn_dim=128, vocab_size=600)
    run = dataclasses.replace(run, shape=shape, device="cpu", optim=Optim(lr=lr))
    return training.Examined(dataclasses.replace(run, data=Data(corpus=str(corpus), seq_len=64)), as_json=True)


def test_the_verb_ends_with_1_where_something_is_wrong(corpus, capsys):
    capsys.readouterr()
    training.doctor(examined(corpus, 1e-2), {})
    found = json.loads(capsys.readouterr().out)["findings"]
    assert len(found) == 10 and all(finding["status"] in ("ok", "warn") for finding in found), found
    with pytest.raises(SystemExit) as stop:
        training.doctor(examined(corpus, 0.0), {})
    assert stop.value.code == 1
    found = json.loads(capsys.readouterr().out)["findings"]
    assert [finding["name"] for finding in found if finding["status"] == "fail"] == ["overfit"]

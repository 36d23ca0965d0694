"""Going on from a run elsewhere, proving that it may be killed, and one run on two processes, all by their verbs."""

import json
import subprocess
import sys

import pytest

from llamita import cli, config, log
from llamita.checkpoint import store
from llamita.recipes import resume
from llamita.train.run import Run
from tests.test_cli import refused, run, train_words, world  # noqa: F401


def rates(folder):
    return {row["step"]: row["lr"] for row in log.read(folder / "metrics.jsonl") if row["kind"] == "train"}


def test_a_branch_off_the_plateau_falls_and_its_stem_stays(world, capsys, tmp_path):  # noqa: F811
    stem = tmp_path / "stem"
    words = [*train_words(world, stem), "--checkpoint.every", "5", "--checkpoint.keep-every", "5", "--log.every", "1"]
    assert run(capsys, *words)[0] == 0
    assert [step for step, _ in store.steps(stem / "checkpoints")] == [20, 15, 10, 5]
    before = (stem / "metrics.jsonl").read_bytes()
    branch = ["extend", stem, "--at", "10", "--steps", "24", "--decay-steps", "8", "--dir", tmp_path / "branch"]
    assert run(capsys, *branch)[0] == 0
    assert (stem / "metrics.jsonl").read_bytes() == before
    found = rates(tmp_path / "branch")
    assert min(found) == 11 and found[11] == found[16] == rates(stem)[10] and found[24] < 0.2 * found[16]
    assert config.load(Run, tmp_path / "branch/run.toml").steps == 24
    assert run(capsys, *branch)[0] == 0, "the same command again finds it finished"
    said = refused(capsys, "extend", stem, "--at", "7", "--steps", "9", "--decay-steps", "2", "--dir", tmp_path / "b")
    assert "no whole checkpoint of step 7, only of: 5, 10, 15, 20" in said and not (tmp_path / "b").exists()
    said = refused(
        capsys, "extend", tmp_path, "--at", "7", "--steps", "9", "--decay-steps", "2", "--dir", tmp_path / "b"
    )
    assert "has no run.toml" in said
    said = refused(capsys, "extend", stem, "--at", "20", "--steps", "30", "--decay-steps", "5", "--dir", tmp_path / "b")
    assert "falls from step 14 on, before step 20" in said and not (tmp_path / "b").exists()


def test_more_steps_in_the_same_folder_are_refused_once_the_rate_has_fallen(world, capsys):  # noqa: F811
    words = [*train_words(world, world / "run")]
    words[words.index("--steps") + 1] = "30"
    said = refused(capsys, *words)
    assert "cannot go on with other settings (steps)" in said and "`llamita extend` branches off" in said


@pytest.mark.slow
def test_the_certificate_holds_for_one_process_and_two(world, capsys, tmp_path):  # noqa: F811
    words = train_words(world, tmp_path / "run")
    for how in ([], ["--processes", "2"]):
        code, out, err = run(capsys, "verify-resume", "--steps", "6", "--then", "2", *how, "--", *words)
        assert code == 0 and "bit for bit: NO" not in out and out.count(": yes") == 5, (out, err)
        kept = json.loads((tmp_path / "run/verify-resume.json").read_text())
        assert kept["holds"] and kept["command"] == words and not (tmp_path / "run/.verify-resume").exists()


@pytest.mark.slow
def test_a_certificate_can_fail(world, capsys, tmp_path, monkeypatch):  # noqa: F811
    """Negative control: a resume from bytes that were not saved so."""
    real = resume._train

    def corrupted(command, folder, processes, kill_after=0):
        real(command, folder, processes, kill_after)
        if kill_after:
            path = folder / "checkpoints" / f"step_{kill_after:08d}" / "rank_00000.safetensors"
            content = bytearray(path.read_bytes())
            content[len(content) // 2 :: 4096] = bytes(len(content[len(content) // 2 :: 4096]))
            path.write_bytes(content)
            manifest = path.with_name(store.MANIFEST)
            listed = json.loads(manifest.read_text()) | {path.name: store.shards.describe(path)}
            manifest.write_text(json.dumps(listed))

    monkeypatch.setattr(resume, "_train", corrupted)
    with pytest.raises(SystemExit, match="1"):
        cli.main(["verify-resume", "--steps", "2", "--", *train_words(world, tmp_path / "run")])
    out = capsys.readouterr().out
    assert "random numbers bit for bit: NO" in out and "holds: NO" in out
    assert (tmp_path / "run/.verify-resume").exists()


def test_bad_words_are_refused(capsys, tmp_path):
    assert "name the run behind --" in refused(capsys, "verify-resume", "--", "sft", "--dir", tmp_path)
    assert "name the run behind --" in refused(capsys, "verify-resume")
    assert "an even number" in refused(capsys, "verify-resume", "--steps", "3", "--", "train", "--dir", tmp_path)
    said = refused(capsys, "verify-resume", "--", "train", "tiny", "--dir", tmp_path / "run")
    assert "the run fails: llamita: no corpus is named" in said


def test_a_layout_for_other_ranks_is_refused_before_anything_is_written(world, capsys, tmp_path):  # noqa: F811
    words = [*train_words(world, tmp_path / "run"), "--parallel.tp", "2"]
    assert "tp 2 makes 2 ranks, and 1 are running" in refused(capsys, *words)
    assert not (tmp_path / "run").exists()
    assert "optim.clip must be above 0" in refused(capsys, *train_words(world, tmp_path / "run"), "--optim.clip", "0")


def test_torchrun_trains_one_run_with_two_processes(world, tmp_path):  # noqa: F811
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "llamita"]
    words = [*train_words(world, tmp_path / "run"), "--log.every", "5", "--precision", "fp32"]
    done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("train 20/20 (100%)") == 1, "one of the ranks speaks"
    alone = [*train_words(world, tmp_path / "alone"), "--log.every", "5", "--precision", "fp32"]
    assert cli.main(alone) == 0
    for mine, theirs in zip(*(log.read(tmp_path / name / "metrics.jsonl") for name in ("run", "alone")), strict=True):
        assert mine["kind"] == theirs["kind"] and mine.get("step") == theirs.get("step")
        if mine["kind"] in ("train", "eval"):
            assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5)

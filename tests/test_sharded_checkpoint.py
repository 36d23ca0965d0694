"""Checkpoints of many ranks: any layout reads what any other wrote; killed at any instant, the newest whole stays."""

import errno
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from llamita.checkpoint import shards, store
from llamita.checkpoint.store import Keep
from llamita.checkpoint.weights import average, weights
from llamita.checkpoint.writer import Writer
from tests import worlds
from tests.training import model

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
EVERY = Keep(newest=100)
FILES = {"run.toml": lambda path: path.write_text("name = 'test'\n")}
# Forked from a server that has imported torch and runs no threads: a new process in a tenth of a second.
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload([__name__])


def state_of(seed: int, mesh=None) -> dict:
    """A model's weights and moments, cut by FSDP2 over `mesh`, and tensors of many kinds, dtypes and placements."""
    built = model(seed)
    if mesh:
        for layer in built.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(built, mesh=mesh)
    named = {name: weight.detach() for name, weight in built.named_parameters()}
    drawn = torch.randn(5, 7, generator=torch.Generator().manual_seed(seed))

    def cut(tensor, placement):
        return distribute_tensor(tensor, mesh, [placement], src_data_rank=None) if mesh else tensor

    return {
        "model": named,
        "optimizer": {n: {"exp_avg": w * 0.5, "step": torch.tensor(3.0 + seed)} for n, w in named.items()},
        "odd": {
            "rows": cut(drawn.clone(), Shard(0)),
            "columns": cut(drawn.bfloat16(), Shard(1)),
            "one row": cut(drawn[:1].clone(), Shard(0)),
            "everywhere": cut(drawn.double(), Replicate()),
            "empty": torch.zeros(0, 3),
            "bytes": torch.arange(9, dtype=torch.uint8) + seed,
            "transposed": drawn.clone().t(),
        },
        "counters": {
            "step": 7 + seed,
            "loss": 0.1 * seed,
            "name": "a",
            "betas": (0.9, 0.95 - seed),
            "groups": [{"n": seed}],
        },
    }


def whole(state: dict) -> dict:
    """Every leaf by name: tensors gathered from all ranks, as bytes."""
    flat, _ = torch.distributed.checkpoint._nested_dict.flatten_state_dict(state)
    leaves = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in flat.items()}
    return {
        k: (v.dtype, v.contiguous().view(-1).view(torch.uint8).numpy().tobytes()) if isinstance(v, torch.Tensor) else v
        for k, v in leaves.items()
    }


def loaded(folder, mesh=None) -> dict:
    other = state_of(5, mesh)
    store.load(folder, other)
    return whole(other)


def failure(work) -> str:
    with pytest.raises((OSError, ValueError, RuntimeError)) as caught:
        work()
    return f"{type(caught.value).__name__}: {caught.value}"


def two_ranks(rank, root):
    mesh, found = init_device_mesh("cpu", (2,)), {}
    found["of one"] = loaded(root / "one/step_00000001", mesh)
    state = state_of(0, mesh)
    store.save(root / "two", 1, state, FILES, keep=EVERY)
    store.save(root / "copies", 1, state_of(0), FILES, keep=EVERY)
    writer = Writer()
    for step in (1, 2):
        writer.save(root / "async", step, state, FILES, keep=EVERY)
        for tensor in state["model"].values():  # training goes on under the write
            tensor.mul_(3)
    found["committed"] = writer.wait()
    found["of two"] = loaded(root / "two/step_00000001", mesh)
    found["async"] = loaded(root / "async/step_00000001", mesh)

    # One rank fails: in what it gives, in its write, in what it asks for.
    bad = {**state, "mine": object() if rank == 1 else 1}
    found["no value"] = failure(lambda: store.save(root / "two", 2, bad, FILES, keep=EVERY))
    real = shards.write

    def full(path, *args):
        if rank == 1:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return real(path, *args)

    shards.write = full
    found["full"] = failure(lambda: store.save(root / "two", 2, state, FILES, keep=EVERY))
    writer.save(root / "two", 2, state, FILES, keep=EVERY)
    found["full async"] = failure(lambda: writer.save(root / "two", 3, state, FILES, keep=EVERY))
    shards.write = real
    wrong = {"odd": {"rows": torch.zeros(5, 7 + rank)}}
    found["wrong size"] = failure(lambda: store.load(root / "two/step_00000001", wrong))
    found["no name"] = failure(lambda: store.load(root / "two/step_00000001", {"x" * rank: 1} if rank else {}))
    names = sorted(state_of(0)["model"])
    mine = {"model": {name: weight for name, weight in state_of(5)["model"].items() if name in names[rank::2]}}
    store.load(root / "two/step_00000001", mine)
    found["stage"] = all(torch.equal(weight, state_of(0)["model"][name]) for name, weight in mine["model"].items())
    if rank == 1:
        mine["model"].popitem()
    found["stage lost"] = failure(lambda: store.load(root / "two/step_00000001", mine))
    found["left"] = sorted(path.name for path in (root / "two").iterdir())

    said = []
    found["newest"] = store.newest(root / "damaged", said.append)
    found["said"] = said
    return found


def three_ranks(rank, root):
    mesh = init_device_mesh("cpu", (3,))
    found = {name: loaded(root / name / "step_00000001", mesh) for name in ("one", "two")}
    store.save(root / "three", 1, state_of(0, mesh), FILES, keep=EVERY)
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """one, two, three, copies, async: the same state, saved by as many ranks; and what the ranks saw."""
    root = tmp_path_factory.mktemp("saved")
    store.save(root / "one", 1, state_of(0), FILES, keep=EVERY)
    for step in (1, 2, 3, 4):
        store.save(root / "damaged", step, state_of(0), FILES, keep=EVERY)
    os.truncate(root / "damaged/step_00000002/run.toml", 3)
    os.truncate(root / "damaged/step_00000003/state.json", 3)
    (root / "damaged/step_00000004/rank_00000.safetensors").unlink()
    return root, worlds.run(two_ranks, 2, root), worlds.run(three_ranks, 3, root)


def test_what_any_number_of_ranks_wrote_any_other_reads_bit_for_bit(saved):
    root, two, three = saved
    wanted = whole(state_of(0))
    assert wanted != whole(state_of(1)), "control: another state is told apart"
    for rank in two:
        assert rank["of one"] == rank["of two"] == rank["async"] == wanted
    for rank in three:
        assert rank["one"] == rank["two"] == wanted
    for name in ("one", "two", "three", "copies", "async"):
        assert loaded(root / name / "step_00000001") == wanted, name


def test_every_rank_writes_its_share_and_what_all_have_is_written_once(saved):
    root, _, _ = saved
    sizes = {
        name: [path.stat().st_size for path in sorted((root / name / "step_00000001").glob("rank_*.safetensors"))]
        for name in ("one", "two", "three", "copies")
    }
    assert [len(sizes[name]) for name in ("one", "two", "three", "copies")] == [1, 2, 3, 2]
    for name in ("two", "three", "copies"):
        assert sum(sizes[name]) < 1.1 * sum(sizes["one"]) and max(sizes[name]) < 1.2 * min(sizes[name])


def test_an_asynchronous_save_has_the_state_of_its_instant(saved):
    root, two, _ = saved
    first, second = (weights(root / f"async/step_0000000{step}") for step in (1, 2))
    for name, weight in model(0).named_parameters():
        assert torch.equal(first[name], weight) and torch.equal(second[name], weight * 3)
    assert [rank["committed"] for rank in two] == [root / "async/step_00000002"] * 2


def test_a_rank_that_fails_makes_all_fail_in_the_same_line_and_nothing_is_left(saved):
    _, two, _ = saved
    for name, said in {
        "no value": "ValueError: the checkpoint of step 2 failed on rank 1: mine is neither tensor nor plain value",
        "full": "OSError: [Errno 28] the checkpoint of step 2 failed on rank 1: No space left on device",
        "full async": "OSError: [Errno 28] the checkpoint of step 2 failed on rank 1: No space left on device",
        "wrong size": "failed on rank 1: Size mismatch",
        "stage lost": "which no rank has a place for",
        "no name": "failed on rank 1: the checkpoint holds no x",
    }.items():
        assert said in two[0][name] and two[0][name] == two[1][name] and "\n" not in two[0][name]
    assert two[0]["left"] == ["step_00000001"]
    assert two[0]["stage"] and two[1]["stage"], "stages of a pipeline each read their own part"


def test_all_ranks_fall_back_to_the_same_checkpoint_and_one_says_why(saved):
    root, two, _ = saved
    assert [rank["newest"] for rank in two] == [root / "damaged/step_00000001"] * 2
    assert two[1]["said"] == []
    faults = ("rank_00000.safetensors is missing", "state.json has 3 bytes instead of", "run.toml has 3 bytes instead")
    for step, line, fault in zip((4, 3, 2), two[0]["said"], faults, strict=True):
        assert f"checkpoint of step {step} is damaged ({fault}" in line and "\n" not in line


def test_weights_of_any_ranks_come_whole_one_at_a_time(saved):
    root, _, _ = saved
    for name in ("one", "two", "three"):
        found = weights(root / name / "step_00000001")
        wanted = dict(model(0).named_parameters())
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_an_average_is_the_mean_of_what_any_ranks_wrote_and_a_whole_checkpoint(saved, tmp_path):
    root, _, _ = saved
    store.save(tmp_path, 1, state_of(1), FILES, keep=EVERY)
    members = [root / "two/step_00000001", root / "three/step_00000001", tmp_path / "step_00000001"]
    out = average(members, tmp_path / "mean")
    assert store.damage(out) is None and (out / "run.toml").is_file()
    found, zero, one = weights(out), dict(model(0).named_parameters()), dict(model(1).named_parameters())
    for name in zero:
        torch.testing.assert_close(found[name], (2 * zero[name] + one[name]).detach() / 3)
    ours = {"model": state_of(5)["model"]}
    store.load(out, ours)
    assert all(torch.equal(ours["model"][name], found[name]) for name in found)
    with pytest.raises(ValueError, match="exists already"):
        average(members, out)
    store.save(tmp_path, 2, {"model": {"w": torch.ones(2)}}, FILES, keep=EVERY)
    with pytest.raises(ValueError, match="does not hold the weights"):
        average([*members, tmp_path / "step_00000002"], tmp_path / "other")


def test_an_average_of_bf16_weights_is_summed_in_fp32(tmp_path):
    folders = [
        store.save(tmp_path, step, {"model": {"w": torch.full((2,), value, dtype=torch.bfloat16)}}, FILES, keep=EVERY)
        for step, value in enumerate([256.0] + [1.0] * 8)
    ]
    found = weights(average(folders, tmp_path / "mean"))["w"]
    assert found.dtype == torch.bfloat16 and found[0] == torch.tensor(264 / 9).bfloat16()


# Kills. The state of step n is n everywhere, so that a mixture of two steps would show.


def filled(step: int) -> dict:
    return {"model": {name: torch.full((2000, 25), float(step)) for name in "ab"}, "step": step}


def save_for_ever(root, way, rank=0, world=1):
    """Saves step after step; after each that returned, says so in a file."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{root}.ranks", rank=rank, world_size=world)
    writer = Writer() if way == "async" else None
    for step in range(1, 10**6):
        if writer:
            done = writer.wait()
            writer.save(root, step, filled(step), FILES, keep=Keep(newest=1))
        else:
            done = store.save(root, step, filled(step), FILES, keep=Keep(newest=1))
        if done and rank == 0:
            (root.parent / "said.new").write_text(done.name)
            os.replace(root.parent / "said.new", root.parent / "said")


def assert_newest_is_whole(root, at_least: int) -> None:
    found = store.newest(root, lambda line: None)
    assert found is not None
    state = filled(0)
    store.load(found, state)
    assert state["step"] >= at_least and f"step_{state['step']:08d}" in found.name
    assert all((tensor == state["step"]).all() for tensor in state["model"].values())


@pytest.mark.parametrize(
    ("way", "world", "kills"), [("sync", 1, 10), ("async", 1, 10), ("sync", 2, 3), ("async", 2, 3)]
)
def test_killed_at_any_instant_the_newest_whole_checkpoint_is_found(way, world, kills, tmp_path):
    draw = random.Random(world)
    for number in range(kills):
        root = tmp_path / f"{number}/checkpoints"
        root.parent.mkdir()
        ranks = [server.Process(target=save_for_ever, args=(root, way, rank, world)) for rank in range(world)]
        for process in ranks:
            process.start()
        while not (root.parent / "said").exists():
            time.sleep(0.001)
            assert all(process.is_alive() for process in ranks)
        time.sleep(draw.uniform(0, 0.1))
        ranks[number % world].kill()
        for process in ranks:  # the others fail by themselves
            process.join()
            assert process.exitcode not in (0, None)
        said = int((root.parent / "said").read_text().removeprefix("step_"))
        assert_newest_is_whole(root, said)
        store.save(root, 10**6, filled(10**6), FILES, keep=Keep(newest=1))
        assert [path.name for path in root.iterdir()] == ["step_01000000"], "what was left aside is cleared"


CALLS = [(os, "fsync"), (os, "replace"), (os, "rename"), (os, "unlink"), (os, "rmdir"), (os, "mkdir"), (os, "open")]


def save_and_die(root, deadly: int):
    """Save step 1 a second time, and be killed before the call number `deadly` that changes the disk."""
    torch.set_num_threads(1)
    calls = iter(range(10**6))
    for owner, name in CALLS:
        real = getattr(owner, name)

        def counted(*args, _real=real, **kwargs):
            if next(calls) == deadly:
                os.kill(os.getpid(), signal.SIGKILL)
            return _real(*args, **kwargs)

        setattr(owner, name, counted)
    store.save(root, 1, filled(1), FILES, keep=Keep(newest=1))


def test_killed_before_each_call_of_a_commit_over_the_only_checkpoint_one_stays(tmp_path):
    whole_folder = tmp_path / "whole"
    store.save(whole_folder, 1, filled(1), FILES, keep=EVERY)
    for deadly in range(200):
        root = tmp_path / str(deadly)
        shutil.copytree(whole_folder, root)
        process = server.Process(target=save_and_die, args=(root, deadly))
        process.start()
        process.join()
        assert_newest_is_whole(root, 1)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert 10 < deadly < 200


def fill_the_disk(root, found):
    """A limit on the size of files stands for a full disk: writes fail as the kernel makes them fail."""
    torch.set_num_threads(1)
    writer = Writer()
    store.save(root, 1, filled(1), FILES, keep=EVERY)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    said = [failure(lambda: store.save(root, 2, filled(2), FILES, keep=EVERY))]
    writer.save(root, 3, filled(3), FILES, keep=EVERY)
    said.append(failure(writer.wait))
    left = [path.name for path in root.iterdir()]
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    writer.save(root, 4, filled(4), FILES, keep=EVERY)
    writer.wait()
    found.put((said, left))


def test_a_full_disk_is_one_line_and_saving_works_again_when_there_is_room(tmp_path):
    found = server.Queue()
    process = server.Process(target=fill_the_disk, args=(tmp_path / "c", found))
    process.start()
    said, left = found.get(timeout=60)
    process.join()
    assert "the checkpoint of step 2 failed: File too large" in said[0] and "\n" not in said[0]
    assert "the checkpoint of step 3 failed: File too large" in said[1]
    assert left == ["step_00000001"]
    assert_newest_is_whole(tmp_path / "c", 4)

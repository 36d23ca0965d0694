"""Optimizers and the average of weights: against torch's own, and cut over ranks against whole."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor

from llamita.kernels.attention import Causal
from llamita.parallel import mesh as meshes
from llamita.parallel.apply import parallelize
from llamita.parallel.layout import Layout
from llamita.train import average, muon
from llamita.train.average import EMA
from llamita.train.optim import Optimizer, local, named_weights
from llamita.train.run import Average, Optim
from tests import worlds
from tests.training import SHAPE, model

MUON = Optim(kind="muon", lr=1e-2, muon_lr=1e-2)
# Rows that do not divide by 4, and a matrix of fewer blocks than ranks: some shards are smaller, some empty.
UNEVEN = dataclasses.replace(SHAPE, dim=18, num_heads=3, num_kv_heads=1, ffn_dim=10, vocab_size=50, tied=False)
EVEN = dataclasses.replace(SHAPE, tied=False)


def gradient(name: str, weight: torch.Tensor, step: int) -> torch.Tensor:
    """The same for every layout: drawn by name and step."""
    seed = step * 1000 + sum(map(ord, name))
    return torch.randn(tuple(weight.shape), generator=torch.Generator().manual_seed(seed), dtype=weight.dtype)


def part_of(whole: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What a rank holds of `whole`, cut as `weight` is."""
    if not isinstance(weight, DTensor):
        return whole
    (chunk,) = weight.__create_chunk_list__()
    return whole[tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))].clone()


def like(whole: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if not isinstance(weight, DTensor):
        return whole
    part = part_of(whole, weight)
    return DTensor.from_local(
        part, weight.device_mesh, weight.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def moved(llama, optimizer, steps, ema=None):
    for step in steps:
        for name, weight in named_weights(llama).items():
            weight.grad = like(gradient(name, weight, step), weight)
        optimizer.step(1 / (1 + step))
        if ema:
            ema.update(0.75)
    return llama


def farthest(llama, whole) -> float:
    pairs = zip(llama.parameters(), whole.parameters(), strict=True)
    gaps = [(local(weight) - part_of(other.detach(), weight)).abs() for weight, other in pairs]
    return max(gap.max().item() for gap in gaps if gap.numel())


def cut_model(shape, layout):
    mesh = meshes.start(layout, "cpu")
    llama = model(dtype=torch.float64, shape=shape)
    parallelize(llama, layout, mesh, compute_dtype=torch.float64, reduce_dtype=torch.float64)
    return llama


def check_layout(shape, layout, optim) -> tuple[float, float]:
    """How far three steps and a mean of weights are from those of the whole model."""
    whole, llama = model(dtype=torch.float64, shape=shape), cut_model(shape, layout)
    both = []
    for each in (llama, whole):
        ema = EMA(each)
        moved(each, Optimizer(each, optim), range(3), ema)
        both.append(ema)
    gap = farthest(llama, whole)
    with both[0].applied(), both[1].applied():
        return gap, farthest(llama, whole)


def check_stale_weights(shape, layout) -> list[torch.Tensor]:
    """What an FSDP model computes before, inside and behind `applied`, and inside it without resharding."""
    llama = cut_model(shape, layout)
    ema = EMA(llama)
    moved(llama, Optimizer(llama, MUON), range(2), ema)
    tokens = torch.arange(8).view(1, 8)
    with torch.no_grad():
        found = [llama.hidden(tokens, Causal())]
        with ema.applied():
            found.append(llama.hidden(tokens, Causal()))
        found.append(llama.hidden(tokens, Causal()))
        known, average.FSDPModule = average.FSDPModule, type("Nothing", (), {})
        with ema.applied():
            found.append(llama.hidden(tokens, Causal()))
        average.FSDPModule = known
    return found


def two(rank):
    found = {f"fsdp {optim.kind}": check_layout(UNEVEN, Layout(fsdp=2), optim) for optim in (MUON, Optim(lr=1e-2))}
    right = muon.Cut._round
    muon.Cut._round = lambda self, names, updates: [(name, muon.orthogonalized(updates[name])) for name in names]
    found["each shard by itself"] = check_layout(UNEVEN, Layout(fsdp=2), MUON)
    muon.Cut._round = right
    return found, check_stale_weights(EVEN, Layout(fsdp=2))


def four(rank, folder):
    layouts = {"fsdp": (UNEVEN, Layout(fsdp=4)), "fsdp x tp": (EVEN, Layout(fsdp=2, tp=2)),
               "dp x fsdp": (UNEVEN, Layout(dp=2, fsdp=2)), "tp": (EVEN, Layout(fsdp=1, dp=2, tp=2))}  # fmt: skip
    found = {name: check_layout(*each, MUON) for name, each in layouts.items()}
    found["fsdp x tp adamw"] = check_layout(*layouts["fsdp x tp"], Optim(lr=1e-2))
    llama = cut_model(EVEN, Layout(fsdp=2, tp=2))
    Optimizer(llama, MUON)  # the next one finds the process group that this one made
    optimizer, ema = Optimizer(llama, MUON), EMA(llama)
    moved(llama, optimizer, range(2), ema)
    dcp.save({"optimizer": optimizer.state_dict(), "ema": ema.state_dict()}, checkpoint_id=folder)
    return found


def test_two_ranks_move_the_weights_as_one_does():
    whole = model(dtype=torch.float64, shape=EVEN)
    ema = EMA(whole)
    moved(whole, Optimizer(whole, MUON), range(2), ema)
    with ema.applied(), torch.no_grad():
        wanted = whole.hidden(torch.arange(8).view(1, 8), Causal())
    for found, hidden in worlds.run(two, 2):
        control = found.pop("each shard by itself")
        assert {name: gaps for name, gaps in found.items() if max(gaps) > 1e-10} == {}
        assert min(control) > 1e-3, "negative control: a shard orthogonalized by itself is another update"
        before, inside, behind, stale = hidden
        assert torch.equal(before, behind)
        assert torch.allclose(inside, wanted, rtol=0, atol=1e-10)
        assert (stale - wanted).abs().max() > 1e-3, "negative control: FSDP goes on with weights it gathered before"


def test_four_ranks_move_the_weights_as_one_does_and_their_state_opens_on_one(tmp_path):
    for found in worlds.run(four, 4, tmp_path / "state"):
        assert len(found) == 5
        assert {name: gaps for name, gaps in found.items() if max(gaps) > 1e-10} == {}
    whole, fresh = (model(dtype=torch.float64, shape=EVEN) for _ in range(2))
    ours, ema = Optimizer(whole, MUON), EMA(whole)
    moved(whole, ours, range(2), ema)
    theirs, read = Optimizer(fresh, MUON), EMA(fresh)
    dcp.load({"optimizer": theirs.state_dict(), "ema": read.state_dict()}, checkpoint_id=tmp_path / "state")
    for name, kinds in ours.state_dict().items():
        for kind, tensor in kinds.items():
            assert torch.allclose(tensor, theirs.state_dict()[name][kind], rtol=0, atol=1e-10), (name, kind)
    assert all(torch.allclose(mean, read.mean[name], rtol=0, atol=1e-10) for name, mean in ema.mean.items())
    assert ema.mass == read.mass > 1


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_torchs_own_optimizers_move_the_weights_alike(kind):
    """The slow twins: torch.optim.AdamW and torch.optim.Muon, whose orthogonalization is bf16 too."""
    optim = dataclasses.replace(MUON, kind=kind)
    ours, theirs = model(), model()
    moved(ours, Optimizer(ours, optim), range(4))
    named = named_weights(theirs)
    matrices = [w for name, w in named.items() if kind == "muon" and name.startswith("layers") and w.ndim == 2]
    norms = [w for w in named.values() if w.ndim == 1]
    rest = [w for w in named.values() if w.ndim == 2 and all(w is not each for each in matrices)]
    parts = [
        torch.optim.AdamW([{"params": rest}, {"params": norms, "weight_decay": 0.0}], lr=1e-2, betas=(0.9, 0.95),
                          eps=1e-8, weight_decay=0.1),
        *([torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")] if matrices else []),
    ]  # fmt: skip
    for step in range(4):
        for name, weight in named.items():
            weight.grad = gradient(name, weight, step)
        for part in parts:
            for group in part.param_groups:
                group["lr"] = 1e-2 / (1 + step)
            part.step()
    assert farthest(ours, theirs) < 1e-6
    moved(ours, Optimizer(ours, dataclasses.replace(optim, weight_decay=0.2)), [4])
    moved(theirs, Optimizer(theirs, optim), [4])
    assert farthest(ours, theirs) > 1e-5, "negative control: another decay is seen"


def test_orthogonalized_brings_every_singular_value_near_one():
    for size in ((20, 50), (50, 20), (32, 32)):
        x = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        values = torch.linalg.svdvals(muon.orthogonalized(x))
        assert values.min() > 0.5 and values.max() < 1.3
        assert torch.linalg.svdvals(x / x.norm()).min() < 0.2, "negative control: they were not before"
    assert torch.equal(muon.orthogonalized(torch.zeros(3, 4)), torch.zeros(3, 4))


def test_muons_updates_are_as_large_as_adamws():
    """arXiv 2502.16982, section 2.2: rms 0.2 to 0.4 of the rate, whatever the matrix's sides."""
    llama = model()
    before = {name: weight.detach().clone() for name, weight in named_weights(llama).items()}
    optimizer = Optimizer(llama, dataclasses.replace(MUON, weight_decay=0.0))
    moved(llama, optimizer, [0])
    sizes = [(before[name] - weight).square().mean().sqrt() / 1e-2 for name, weight in optimizer.weights.items()
             if name in optimizer.matrices]  # fmt: skip
    assert len(sizes) == 14 and all(0.1 < size < 0.3 for size in sizes)


def test_every_weight_has_one_rule_and_norms_never_decay():
    for kind in ("adamw", "muon"):
        optimizer = Optimizer(model(), Optim(kind=kind))
        assert sorted([*optimizer.matrices, *optimizer.decayed, *optimizer.norms]) == sorted(optimizer.weights)
        assert all(name.startswith("layers.") for name in optimizer.matrices)
        assert len(optimizer.norms) == 5 and ("tok_embeddings.weight" in optimizer.decayed)
    llama = model()
    optimizer = Optimizer(llama, Optim(lr=1e-2, weight_decay=10.0))
    for weight in llama.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step(1.0)
    assert torch.equal(llama.norm.weight, torch.ones(32))
    assert torch.allclose(llama.tok_embeddings.weight, 0.9 * model().tok_embeddings.weight)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_state_read_back_goes_on_bit_for_bit(kind, tmp_path: Path):
    optim = dataclasses.replace(MUON, kind=kind)
    straight, stopped, resumed = model(), model(), model(seed=1)
    moved(straight, Optimizer(straight, optim), range(6))
    optimizer = Optimizer(stopped, optim)
    moved(stopped, optimizer, range(3))
    torch.save((stopped.state_dict(), optimizer.state_dict()), tmp_path / "state.pt")
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(weights)
    again = Optimizer(resumed, optim)
    again.load_state_dict(dict(reversed(state.items())))
    moved(resumed, again, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))
    resumed.load_state_dict(weights)
    moved(resumed, Optimizer(resumed, optim), range(3, 6))
    assert farthest(resumed, straight) > 1e-5, "negative control: without its state it goes another way"


def test_the_state_of_another_optimizer_is_refused():
    with pytest.raises(ValueError, match=r"of another model or optim.kind: .* is only in the "):
        Optimizer(model(), MUON).load_state_dict(Optimizer(model(), Optim()).state_dict())


def test_the_average_is_the_weighted_mean_of_what_it_saw():
    llama = model(dtype=torch.float64)
    ema, seen = EMA(llama), []
    first = llama.norm.weight.detach().clone()
    with ema.applied():
        assert torch.equal(llama.norm.weight, first), "before the first step there is nothing to average"
    for step in range(5):
        with torch.no_grad():
            llama.norm.weight.copy_(torch.full((32,), float(step**2)))
        seen.append(step**2)
        ema.update(0.5)
    shares = [0.5 ** (4 - step) for step in range(5)]
    wanted = sum(share * value for share, value in zip(shares, seen, strict=True)) / sum(shares)
    with ema.applied():
        assert llama.norm.weight[0].item() == pytest.approx(wanted, rel=1e-14)
    assert llama.norm.weight[0].item() == 16, "its own weights are back"
    plain = first[0].item()
    for value in seen:
        plain = 0.5 * plain + 0.5 * value
    assert abs(plain - wanted) > 1e-2, "negative control: the plain recursion still holds the first weights"


def test_the_average_goes_on_from_its_state_and_refuses_another_models():
    llama = model()
    whole, half = EMA(llama), EMA(llama)
    optimizer = Optimizer(llama, MUON)
    moved(llama, optimizer, range(2), whole)
    half.load_state_dict(whole.state_dict())
    moved(llama, optimizer, range(2, 4), whole)
    assert not torch.equal(whole.mean["norm.weight"], half.mean["norm.weight"])
    with pytest.raises(ValueError, match=r"of another model: output\.weight is only in one of them"):
        half.load_state_dict(EMA(model(shape=EVEN)).state_dict())
    with pytest.raises(ValueError, match="bfloat16 cannot be averaged"):
        EMA(model(dtype=torch.bfloat16))


def test_half_lives_in_steps_and_tokens():
    assert average.kept(Average("10"), 512) ** 10 == pytest.approx(0.5)
    assert average.kept(Average("5_120t"), 512) ** 10 == pytest.approx(0.5)
    for wrong in ("0", "ten", "-3", "5k"):
        with pytest.raises(ValueError, match=r"average\.half_life"):
            Average(wrong)

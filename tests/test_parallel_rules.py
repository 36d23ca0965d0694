"""The arithmetic of layouts, without a process group: who holds what among 16,384 ranks, and what is refused."""

from itertools import product
from math import prod

import pytest

from llamita.data.sampler import shard_of
from llamita.model.llama import build
from llamita.model.shape import preset
from llamita.parallel import mesh, rules
from llamita.parallel.layout import Layout
from llamita.parallel.memory import memory
from tests.training import SHAPE

LLAMA = preset("llama3.1-405b")
CLUSTER = Layout(pp=16, tp=8, dp=4, recompute=True).resolved(16_384)  # Table 4 of arXiv 2407.21783, its 128 as 4 x 32
GIB = 2**30


@pytest.fixture(scope="module")
def weights():
    return rules.weights(build(LLAMA, device="meta"))


def refusal(layout, shape=SHAPE, seq_len=64, batch_size=8, micro_batch_size=1):
    with pytest.raises(ValueError) as refused:
        rules.check(layout, shape, seq_len=seq_len, batch_size=batch_size, micro_batch_size=micro_batch_size)
    return str(refused.value)


def test_every_rank_of_16384_has_a_place_of_its_own():
    assert CLUSTER.sizes == {"pp": 16, "dp": 4, "fsdp": 32, "cp": 1, "tp": 8}
    places = [CLUSTER.coordinates(rank) for rank in range(16_384)]
    assert [CLUSTER.rank_of(place) for place in places] == list(range(16_384))
    assert places[1] == {"pp": 0, "dp": 0, "fsdp": 0, "cp": 0, "tp": 1}, "tp ranks are neighbours"
    assert places[1024]["pp"] == 1, "pipeline stages are far apart"


def test_the_batch_of_16384_ranks_is_read_once():
    parts = {CLUSTER.data_rank(rank) for rank in range(16_384)}
    assert parts == set(range(128))
    samples = [k for part in parts for k in shard_of(range(5 * 2048, 6 * 2048), part, 128)]
    assert sorted(samples) == list(range(5 * 2048, 6 * 2048))


@pytest.mark.parametrize("name", ["tok_embeddings.weight", "layers.7.attention.wk.weight",
                                  "layers.7.feed_forward.w2.weight", "layers.7.ffn_norm.weight"])  # fmt: skip
def test_the_pieces_of_a_weight_are_the_whole_and_overlap_nowhere(weights, name):
    _, size, axes = next(weight for weight in weights if weight[0] == name)
    ranks = [CLUSTER.rank_of({"pp": 0, "dp": 1, "fsdp": f, "cp": 0, "tp": t}) for f, t in product(range(32), range(8))]
    pieces = {rules.local_slices(size, axes, CLUSTER, rank) for rank in ranks}
    assert sum(prod(map(len, piece)) for piece in pieces) == prod(size)
    cut = rules.cut_dim(axes)
    assert len(pieces) == (32 if cut is None else 256)
    if cut == 1:
        assert pieces == {
            (range(f * size[0] // 32, (f + 1) * size[0] // 32), range(t * size[1] // 8, (t + 1) * size[1] // 8))
            for f, t in product(range(32), range(8))
        }


def test_uneven_rows_leave_the_last_ranks_less():
    layout = Layout(fsdp=4)
    assert [rules.local_slices((9,), ("embed",), layout, rank)[0] for rank in range(4)] == [
        range(0, 3), range(3, 6), range(6, 9), range(9, 9)
    ]  # fmt: skip


def test_the_405b_fits_80_gib_with_recomputation_and_not_without(weights):
    def total(rank, **changes):
        layout = Layout(pp=16, tp=8, **changes).resolved(16_384)
        return memory(weights, LLAMA, layout, rank, seq_len=8192, micro_batch_size=1, micro_batches=16)

    ranks = range(0, 16_384, 1024)  # one of each stage
    with_it = [total(rank, recompute=True) for rank in ranks]
    without = [total(rank) for rank in ranks]
    assert max(each.total for each in with_it) < 12 * GIB
    assert max(each.total for each in without) > 80 * GIB
    assert max(without, key=lambda each: each.activations) is without[1], "the first full stage keeps most"
    whole = sum(each.weights for each in with_it) * 128 * 8 / 4
    assert whole == pytest.approx(LLAMA.num_params, rel=2e-4), "but for norms, and 126 of 125.25 rows of the vocabulary"


def test_more_shards_need_less_of_each_kept_thing(weights):
    few, many = (
        memory(weights, LLAMA, Layout(fsdp=size, tp=8), 0, seq_len=8192, micro_batch_size=1) for size in (128, 256)
    )
    assert few.weights == pytest.approx(2 * many.weights, rel=0.02)
    assert few.optimizer == 2 * few.weights and few.activations == many.activations


def test_a_possible_layout_is_let_through(weights):
    rules.check(CLUSTER, LLAMA, seq_len=8192, batch_size=2048, micro_batch_size=1)
    rules.check(Layout(pp=16, cp=16, tp=8).resolved(16_384), LLAMA, seq_len=131_072, batch_size=128, micro_batch_size=1)
    rules.check(Layout(fsdp=1), SHAPE, seq_len=63, batch_size=3, micro_batch_size=1)


@pytest.mark.parametrize(
    ("layout", "how", "told"),
    [
        (Layout(fsdp=1, tp=4), {}, "num_kv_heads 2: use tp 2; possible are 1, 2, since every rank needs"),
        (Layout(fsdp=1, tp=16), {"shape": LLAMA}, "num_kv_heads 8: use tp 8; possible are 1, 2, 4, 8"),
        (Layout(fsdp=1, tp=3), {}, "num_kv_heads 2 and shape.num_heads 4 and shape.ffn_dim 64 and"),
        (Layout(fsdp=1, pp=2), {}, "shape.tied makes them one weight: use pp 1, or shape.tied false"),
        (Layout(fsdp=1, pp=127), {"shape": LLAMA}, "127 stages of 126 layers: use pp 126 or less"),
        (Layout(fsdp=1, pp=64, schedule="interleaved"), {"shape": LLAMA}, "of 126 layers: use pp 63 or less"),
        (Layout(fsdp=1, tp=2), {"seq_len": 63}, "data.seq_len 63 is cut into tp = 2 equal pieces: use 62 or 64"),
        (Layout(fsdp=1, cp=2, tp=2), {"seq_len": 60}, "2 x cp x tp = 8 equal pieces: use 56 or 64"),
        (Layout(fsdp=4, pp=2), {"shape": LLAMA, "batch_size": 6}, "dp x fsdp x micro_batch_size = 4: use 4 or 8"),
        (Layout(fsdp=2, cp=2, compile=True), {}, "not proven with cp"),
        (Layout(fsdp=4, dp=2), {"batch_size": 4}, "no row for each of dp x fsdp = 8 ranks: use 8"),
        (Layout(fsdp=2, pp=4), {"shape": LLAMA, "batch_size": 6}, "run 3 micro-batches a step through pp 4: use "
         "batch_size 8, which makes 4"),
        (Layout(fsdp=1, pp=4, schedule="zero-bubble"), {"shape": LLAMA, "batch_size": 9}, "use batch_size 10"),
        (Layout(fsdp=1, pp=4, schedule="interleaved"), {"shape": LLAMA, "batch_size": 9}, "use batch_size 10"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_what_can(layout, how, told):
    assert told in refusal(layout, **how)


def test_a_world_that_the_axes_do_not_fill_is_refused():
    with pytest.raises(ValueError, match="tp 3 makes 3 ranks, and 4 are running"):
        Layout(tp=3).resolved(4)


def test_a_process_alone_needs_no_mesh():
    assert mesh.start(Layout(), "cpu") is None
    with pytest.raises(ValueError, match="tp 2 makes 2 ranks, and 1 are running"):
        mesh.start(Layout(tp=2), "cpu")


def test_an_axis_without_a_rule_is_refused():
    with pytest.raises(ValueError, match="axis 'experts' is not in"):
        rules.cut_dim(("experts", "embed"))
    with pytest.raises(ValueError, match="tp would cut both axes"):
        rules.cut_dim(("vocab", "ffn"))

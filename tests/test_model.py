"""Layer: numerics of the model alone: who reaches whom, initialization, dtypes, building."""

import math

import pytest
import torch
from torch.nn import functional as F

from llamita.kernels.attention import Causal, Documents, Padded
from llamita.model.llama import build
from llamita.model.shape import preset


def fresh(name="tiny", seed=0, dtype=torch.float32, **changes):
    return build(preset(name, **changes), dtype=dtype).init_weights(seed)


def tokens(rows=2, seq_len=24, vocab_size=512):
    return torch.randint(vocab_size, (rows, seq_len), generator=torch.Generator().manual_seed(1))


def moved(model, attend, first_BT, second_BT):
    """How far each logit moves from one batch to the other, [B, T]."""
    with torch.no_grad():
        return (model(first_BT, attend) - model(second_BT, attend)).abs().amax(dim=-1)


@pytest.mark.parametrize("changed", [0, 11, 23])
def test_the_past_never_sees_the_future(changed):
    tokens_BT, other_BT = tokens(), tokens()
    other_BT[:, changed] = (other_BT[:, changed] + 1) % 512
    moved_BT = moved(fresh(dtype=torch.float64), Causal(), tokens_BT, other_BT)
    assert not moved_BT[:, :changed].any()
    assert (moved_BT[:, changed:] > 0).all(), "what comes after must see the change"


STARTS = [[0, 7, 15], [0, 12]]
A, B = slice(0, 7), slice(7, 15)


def leak(attend):
    """How far document B of row 0 moves when document A before it becomes another."""
    first_BT, second_BT = tokens(), tokens()
    second_BT[0, A] = (second_BT[0, A] + 3) % 512
    moved_BT = moved(fresh(dtype=torch.float64), attend, first_BT, second_BT)
    assert (moved_BT[0, A] > 1e-6).all(), "document A itself must move"
    assert not moved_BT[1].any(), "another row must not move"
    return float(moved_BT[0, B].max()), float(moved_BT[0, 15:].max())


def test_documents_do_not_leak():
    assert leak(Documents(STARTS)) == (0.0, 0.0)
    assert min(leak(Causal())) > 1e-6, "without the mask this test must fail"


def test_documents_do_not_leak_backward():
    """The loss of document B has no gradient in the embeddings of document A."""
    model = fresh(dtype=torch.float64, tied=False)
    tokens_BT = torch.arange(24).unsqueeze(0)

    def reached(attend):
        model.zero_grad()
        model(tokens_BT, attend)[0, B].square().sum().backward()
        return model.tok_embeddings.weight.grad[:24].abs().amax(dim=-1) > 0

    assert reached(Documents(STARTS[:1])).nonzero().flatten().tolist() == list(range(7, 15))
    assert reached(Causal()).nonzero().flatten().tolist() == list(range(15))


def test_a_packed_document_reads_as_if_alone():
    model, tokens_BT = fresh(dtype=torch.float64), tokens()
    with torch.no_grad():
        alone_TV = model(tokens_BT[:1, B])[0]
        packed_TV = model(tokens_BT, Documents(STARTS))[0, B]
        unmasked_TV = model(tokens_BT)[0, B]
    torch.testing.assert_close(packed_TV, alone_TV, rtol=0, atol=1e-12)
    assert (unmasked_TV - alone_TV).abs().max() > 1e-6


def test_padding_changes_nothing():
    model, tokens_BT = fresh(dtype=torch.float64), tokens()
    valid_BT = torch.ones(2, 24, dtype=torch.bool)
    valid_BT[0, :9] = valid_BT[1, 20:] = False
    other_BT = tokens_BT.masked_fill(~valid_BT, 0)
    assert not moved(model, Padded(valid_BT), tokens_BT, other_BT)[valid_BT].any()
    assert moved(model, Causal(), tokens_BT, other_BT)[0, 9:].max() > 1e-6


@pytest.mark.parametrize("name", ["tiny", "demo"])
@pytest.mark.parametrize("seed", [0, 1])
def test_first_loss_is_the_logarithm_of_the_vocabulary(name, seed):
    model = fresh(name, seed)
    tokens_BT = tokens(4, 97, model.shape.vocab_size)

    def loss():
        with torch.no_grad():
            return float(F.cross_entropy(model(tokens_BT[:, :-1]).flatten(0, 1), tokens_BT[:, 1:].flatten()))

    uniform = math.log(model.shape.vocab_size)
    assert abs(loss() / uniform - 1) < 0.02
    with torch.no_grad():
        model.tok_embeddings.weight.mul_(10)
    assert abs(loss() / uniform - 1) > 0.02, "embeddings ten times as large must fail this test"


def test_initialization():
    model, again, other = fresh("demo"), fresh("demo"), fresh("demo", seed=1)
    weights, other_weights = dict(model.named_parameters()), dict(other.named_parameters())
    for name, weight in again.named_parameters():
        assert torch.equal(weight, weights[name]), name
        if weight.ndim == 1:
            assert (weight == 1).all(), name
            continue
        assert not torch.equal(weight, other_weights[name]), name
        scale = (2 * model.shape.num_layers) ** -0.5 if "wo" in name or "w2" in name else 1.0
        # A normal cut at 3 std keeps 98.7% of its std.
        assert math.isclose(float(weight.detach().std()), 0.02 * 0.987 * scale, rel_tol=0.02), name
        assert float(weight.detach().abs().max()) <= 0.06 * scale, name


def test_every_weight_has_axes():
    model = build(preset("tiny", tied=False), device="meta")
    sizes = dict(embed=256, heads=256, kv_heads=128, ffn=512, vocab=1024)
    for name, weight in model.named_parameters():
        *path, parent, leaf = ["", *name.split(".")]
        owner = model.get_submodule(".".join([*path, parent]).strip("."))
        if not hasattr(owner, "AXES"):
            owner, leaf = model.get_submodule(".".join(path).strip(".")), parent
        assert tuple(sizes[axis] for axis in owner.AXES[leaf]) == tuple(weight.shape), name


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_tied_head_is_one_tensor(device):
    tied, untied = (build(preset("tiny", tied=tied), device=device) for tied in (True, False))
    assert tied.output.weight is tied.tok_embeddings.weight
    assert untied.output.weight is not untied.tok_embeddings.weight
    assert len(list(untied.parameters())) == len(list(tied.parameters())) + 1
    assert {weight.device.type for weight in tied.parameters()} == {device}


def test_a_tied_head_takes_both_gradients():
    model, tokens_BT = fresh(tied=True), torch.tensor([[1, 2, 3]])
    F.cross_entropy(model(tokens_BT)[0, :-1], tokens_BT[0, 1:]).backward()
    gradient_VD = model.tok_embeddings.weight.grad
    assert gradient_VD[1].abs().max() > 0, "as input"
    assert gradient_VD[500].abs().max() > 0, "as a wrong answer"


def test_bfloat16_stays_near_float32():
    wide, narrow = fresh(), fresh()
    narrow.to(torch.bfloat16)
    with torch.no_grad():
        logits_BTV = narrow(tokens())
        assert logits_BTV.dtype == torch.bfloat16
        off = float((logits_BTV.float() - wide(tokens())).abs().max() / wide(tokens()).std())
    assert 1e-4 < off < 0.1


def test_hidden_and_output_make_the_logits():
    model = fresh()
    with torch.no_grad():
        hidden_BTD = model.hidden(tokens(), Causal())
        assert torch.equal(model.output(hidden_BTD), model(tokens()))
    assert hidden_BTD.shape == (2, 24, 256)

"""Layer: numerics against a plain twin. Every way to attend, both directions, beside attention in full."""

import pytest
import torch

from llamita.kernels import blocks
from llamita.kernels.attention import Causal, Documents, Padded, reference, sdpa

SEQ_LEN = 11
STARTS = [[0, 3, 4], [0], [0, 9]]
# Rows padded left, right, not at all.
VALID = torch.arange(SEQ_LEN) >= torch.tensor([[4], [0], [0]])
VALID[1, 7:] = False


def causal_mask():
    return torch.ones(3, SEQ_LEN, SEQ_LEN, dtype=torch.bool).tril()


def document_mask(starts=STARTS, seq_len=SEQ_LEN):
    document_BT = torch.zeros(len(starts), seq_len, dtype=torch.int64)
    for row, begins in enumerate(starts):
        for begin in begins[1:]:
            document_BT[row, begin:] += 1
    return (document_BT.unsqueeze(1) == document_BT.unsqueeze(2)).tril()


def inputs(num_heads, num_kv_heads, seq_len=SEQ_LEN):
    generator = torch.Generator().manual_seed(num_heads)
    sizes = [(3, seq_len, heads, 8) for heads in (num_heads, num_kv_heads, num_kv_heads)]
    return [torch.randn(s, dtype=torch.float64, generator=generator, requires_grad=True) for s in sizes]


def outputs_and_gradients(attend, tensors, seen_BT):
    """Output at seen tokens, and gradients of a fixed functional of it."""
    out_BTNH = attend(*tensors)
    weights = torch.randn(out_BTNH.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    gradients = torch.autograd.grad((out_BTNH * weights)[seen_BT].sum(), tensors)
    return [out_BTNH[seen_BT].detach(), *gradients]


def distance(first, second):
    return max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))


ALL = torch.ones(3, SEQ_LEN, dtype=torch.bool)
CASES = {
    "causal": (Causal(), causal_mask(), ALL),
    "documents": (Documents(STARTS), document_mask(), ALL),
    "one document a row": (Documents([[0]] * 3), causal_mask(), ALL),
    "padded": (Padded(VALID), causal_mask() & VALID.unsqueeze(1), VALID),
}


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_written_out_twin(case, heads):
    attend, mask_BTS, seen_BT = CASES[case]
    tensors = inputs(*heads)

    def twin(q, k, v):
        return reference(q, k, v, mask_BTS | torch.eye(SEQ_LEN, dtype=torch.bool))

    ours = outputs_and_gradients(lambda q, k, v: attend(0, q, k, v), tensors, seen_BT)
    assert distance(ours, outputs_and_gradients(twin, tensors, seen_BT)) < 1e-10

    def blind(q, k, v):
        return reference(q, k, v, torch.eye(SEQ_LEN, dtype=torch.bool).expand(3, -1, -1))

    assert distance(ours, outputs_and_gradients(blind, tensors, seen_BT)) > 1e-2


@pytest.mark.parametrize("seed", range(4))
def test_documents_of_many_lengths(seed):
    """1 to 75 tokens, so that documents fall into several classes of length."""
    generator, seq_len = torch.Generator().manual_seed(seed), 75
    cuts = (torch.randperm(seq_len - 1, generator=generator)[: 1 + 4 * seed] + 1 for _ in range(3))
    starts = [[0, *sorted(cut.tolist())] for cut in cuts]
    tensors, seen_BT = inputs(4, 2, seq_len), torch.ones(3, seq_len, dtype=torch.bool)

    def gap(mask_BTS):
        twin = outputs_and_gradients(lambda q, k, v: reference(q, k, v, mask_BTS), tensors, seen_BT)
        ours = outputs_and_gradients(lambda q, k, v: Documents(starts)(0, q, k, v), tensors, seen_BT)
        return distance(ours, twin)

    assert gap(document_mask(starts, seq_len)) < 1e-10
    late = [[0, *(start + 1 for start in row[1:] if start < 74)] for row in starts]
    assert gap(document_mask(late, seq_len)) > 1e-2, "borders off by one must fail this test"


def worst(function, tensors, twin):
    """How far outputs and gradients are from the twin's, the largest of their relative errors."""
    seen_BT = torch.ones(tensors[0].shape[:2], dtype=torch.bool)
    pairs = zip(outputs_and_gradients(function, tensors, seen_BT), twin, strict=True)
    return max(float((ours.double() - theirs).norm() / theirs.norm()) for ours, theirs in pairs)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("seq_len", [1, 16, 75])
def test_blocks_of_queries_equal_the_twin(monkeypatch, heads, seq_len):
    """In one block, and in several with a shorter last one."""
    monkeypatch.setattr(blocks, "BLOCK", 16)
    tensors, causal_TT = inputs(*heads, seq_len), torch.ones(seq_len, seq_len, dtype=torch.bool).tril()
    seen_BT = torch.ones(3, seq_len, dtype=torch.bool)
    ours = outputs_and_gradients(blocks.causal, tensors, seen_BT)
    twin = outputs_and_gradients(lambda q, k, v: reference(q, k, v, causal_TT.expand(3, -1, -1)), tensors, seen_BT)
    assert distance(ours, twin) < 1e-10
    if seq_len > 1:
        causal_TT[seq_len - 1, seq_len - 2] = False
        late = outputs_and_gradients(lambda q, k, v: reference(q, k, v, causal_TT.expand(3, -1, -1)), tensors, seen_BT)
        assert distance(ours, late) > 1e-3, "one pair of tokens hidden must fail this test"


@pytest.mark.parametrize("attend", [Causal(), Documents([[0, 60], [0], [0, 199]])], ids=["causal", "documents"])
def test_bfloat16_on_the_cpu_is_as_near_as_torchs_kernel(attend):
    """Of the exact result for the same bfloat16 inputs; float32 and float64 go to torch's kernel."""
    tensors = [x.detach().bfloat16().requires_grad_() for x in inputs(4, 2, 200)]
    exact = [x.detach().double().requires_grad_() for x in tensors]
    seen_BT = torch.ones(3, 200, dtype=torch.bool)
    mask_BTS = torch.ones(3, 200, 200, dtype=torch.bool).tril()
    if isinstance(attend, Documents):
        mask_BTS = document_mask(attend.starts, 200)
    twin = outputs_and_gradients(lambda q, k, v: reference(q, k, v, mask_BTS), exact, seen_BT)
    ours = worst(lambda q, k, v: attend(0, q, k, v), tensors, twin)
    theirs = worst(lambda q, k, v: sdpa(q, k, v, mask=mask_BTS.unsqueeze(1)), tensors, twin)
    assert ours < 2 * theirs < 0.02


def test_reference_is_the_formula():
    q, k, v = (x.detach() for x in inputs(4, 2))
    out_BTNH = reference(q, k, v, causal_mask())
    scores_S = torch.tensor([float(q[1, 5, 3] @ k[1, s, 1]) / 8**0.5 for s in range(6)], dtype=torch.float64)
    expected_H = (scores_S.exp() / scores_S.exp().sum()) @ v[1, :6, 1]
    torch.testing.assert_close(out_BTNH[1, 5, 3], expected_H, rtol=0, atol=1e-12)


@pytest.mark.parametrize("attend", [Causal(), Padded(VALID)], ids=["causal", "padded"])
def test_without_the_document_mask_the_twin_differs(attend):
    tensors = inputs(4, 2)
    whole = outputs_and_gradients(lambda q, k, v: attend(0, q, k, v), tensors, ALL)
    twin = outputs_and_gradients(lambda q, k, v: reference(q, k, v, document_mask()), tensors, ALL)
    assert distance(whole, twin) > 1e-2


def test_positions():
    tokens_BT = torch.zeros(3, SEQ_LEN, dtype=torch.int64)
    assert Causal().positions(tokens_BT).tolist() == [list(range(11))]
    assert Documents(STARTS).positions(tokens_BT).tolist() == [
        [0, 1, 2, 0, 0, 1, 2, 3, 4, 5, 6],
        list(range(11)),
        [*range(9), 0, 1],
    ]
    positions_BT = Padded(VALID).positions(tokens_BT)
    assert positions_BT[0, 4:].tolist() == list(range(7))
    assert positions_BT[1, :7].tolist() == list(range(7))
    assert positions_BT[2].tolist() == list(range(11))
    assert positions_BT.min() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_gives_no_nan(dtype):
    """Also where a whole row is padding, forward and backward."""
    valid_BT = VALID.clone()
    valid_BT[2] = False
    tensors = [x.detach().to(dtype).requires_grad_() for x in inputs(4, 2)]
    out_BTNH = Padded(valid_BT)(0, *tensors)
    assert out_BTNH.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out_BTNH.float().sum(), tensors))
    values_BTNH = tensors[2].repeat_interleave(2, dim=2)
    assert torch.equal(out_BTNH[2, 0], values_BTNH[2, 0]) and torch.equal(out_BTNH[0, 3], values_BTNH[0, 3])
    plain = reference(*tensors, causal_mask() & valid_BT.unsqueeze(1))
    assert plain.isnan().any(), "a mask that hides every key must fail this test"


def test_padded_keys_are_unseen():
    q, k, v = (x.detach() for x in inputs(4, 2))
    before = Padded(VALID)(0, q, k, v)
    k[~VALID], v[~VALID] = 100.0, -100.0
    assert torch.equal(Padded(VALID)(0, q, k, v)[VALID], before[VALID])
    assert not torch.equal(Causal()(0, q, k, v)[VALID], Causal()(0, *(x.detach() for x in inputs(4, 2)))[VALID])

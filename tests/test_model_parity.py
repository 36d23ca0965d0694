"""Layer: parity with transformers' LlamaForCausalLM of the same weights: whole, padded, packed and cached."""

import pytest
import torch
from torch import nn

from llamita.formats.names import hf_names, to_interleaved
from llamita.kernels.attention import Causal, Documents, Padded
from llamita.model import rope
from llamita.model.cache import KVCache
from llamita.model.llama import Llama, build
from llamita.model.shape import RopeScaling, Shape
from tests.weights import filled

transformers = pytest.importorskip("transformers")

SEQ_LEN = 48
# transformers takes rotary angles and norms in float32 even in a float64 model: over 8 variants, 3 seeds,
# 48 tokens it was 8.8e-7 to 4.0e-6 from ours. With both in float64 (`exact`) the two are within 6.7e-15.
STOCK_FP64, EXACT_FP64 = 1e-5, 1e-10
# Original context 16: scaling reaches pairs that turn within a row, so that leaving it out shows.
SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=16)
VARIANTS = [(kv, tied, scaled) for kv in (4, 2) for tied in (True, False) for scaled in (False, True)]
NAMES = [
    f"{'MHA' if kv == 4 else 'GQA'}-{'tied' if tied else 'untied'}-{'scaled' if scaled else 'plain'}"
    for kv, tied, scaled in VARIANTS
]


def random_model(shape: Shape, dtype: torch.dtype, seed: int = 0) -> Llama:
    return filled(build(shape, dtype=dtype), seed)


def shape_of(num_kv_heads: int, tied: bool, scaled: bool) -> Shape:
    return Shape(
        dim=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=num_kv_heads,
        ffn_dim=96,
        vocab_size=101,
        tied=tied,
        max_seq_len=256,
        rope_theta=10_000.0,
        rope_scaling=SCALING if scaled else None,
    )


def theirs_of(model: Llama):
    """transformers' model with the same weights; the config is spelled out here, not by formats/hf.py."""
    shape, dtype = model.shape, model.norm.weight.dtype
    rope = {"rope_type": "default", "rope_theta": shape.rope_theta}
    if shape.rope_scaling:
        rope |= {
            "rope_type": "llama3",
            "factor": shape.rope_scaling.factor,
            "low_freq_factor": shape.rope_scaling.low_freq_factor,
            "high_freq_factor": shape.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": shape.rope_scaling.original_max_seq_len,
        }
    config = transformers.LlamaConfig(
        hidden_size=shape.dim,
        intermediate_size=shape.ffn_dim,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        vocab_size=shape.vocab_size,
        max_position_embeddings=shape.max_seq_len,
        rms_norm_eps=shape.norm_eps,
        tie_word_embeddings=shape.tied,
        rope_parameters=rope,
        attn_implementation="sdpa",
    )
    theirs = transformers.LlamaForCausalLM(config).to(dtype).eval()
    weights = dict(model.named_parameters())
    names = hf_names(shape.num_layers, tied=shape.tied)
    loaded = theirs.load_state_dict({names[ours]: weight for ours, weight in weights.items()}, strict=False)
    assert not loaded.unexpected_keys and loaded.missing_keys in ([], ["lm_head.weight"])
    assert ("lm_head.weight" in loaded.missing_keys) == shape.tied
    return theirs


def tokens(rows: int = 2, seq_len: int = SEQ_LEN):
    return torch.randint(101, (rows, seq_len), generator=torch.Generator().manual_seed(1))


def distance(ours_BTV, theirs_BTV) -> float:
    return float((ours_BTV - theirs_BTV).abs().max())


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("variant", VARIANTS, ids=NAMES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.float64, STOCK_FP64)])
def test_logits(variant, dtype, bound):
    model = random_model(shape_of(*variant), dtype)
    theirs_BTV = theirs_of(model)(tokens()).logits
    ours_BTV = model(tokens())
    assert 0.5 < float(ours_BTV.std()) < 2
    assert distance(ours_BTV, theirs_BTV) < bound


def exact(theirs, model: Llama):
    """Make transformers take rotary angles and norms in float64, from their formulas."""

    def rotary(x, position_ids):
        angles_BTP = position_ids.unsqueeze(-1).double() * model.freqs_P
        angles_BTH = torch.cat((angles_BTP, angles_BTP), dim=-1)
        return angles_BTH.cos(), angles_BTH.sin()

    def norm_of(module: nn.Module):
        eps = module.variance_epsilon
        return lambda x_BTD: module.weight * (x_BTD / (x_BTD.square().mean(-1, keepdim=True) + eps).sqrt())

    theirs.model.rotary_emb.forward = rotary
    for module in theirs.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = norm_of(module)
    return theirs


@pytest.mark.parametrize("variant", VARIANTS, ids=NAMES)
def test_logits_to_the_last_digits(variant):
    model = random_model(shape_of(*variant), torch.float64)
    theirs = theirs_of(model)
    rough, fine = theirs(tokens()).logits, exact(theirs, model)(tokens()).logits
    assert distance(model(tokens()), fine) < EXACT_FP64
    assert distance(model(tokens()), rough) > EXACT_FP64, "float32 inside must fail this bound"


def spoil_rows(model):
    for block in model.layers:
        block.attention.wq.weight.copy_(to_interleaved(block.attention.wq.weight, 4))
        block.attention.wk.weight.copy_(to_interleaved(block.attention.wk.weight, model.shape.num_kv_heads))


def spoil_gate(model):
    ffn = model.layers[0].feed_forward
    ffn.w1, ffn.w3 = ffn.w3, ffn.w1


def spoil_scaling(model):
    model.freqs_P = rope.frequencies(shape_of(2, True, False))


def spoil_groups(model):
    """Query heads paired with the other KV head."""
    attention = model.layers[1].attention
    attention.wk.weight.copy_(attention.wk.weight.roll(16, dims=0))
    attention.wv.weight.copy_(attention.wv.weight.roll(16, dims=0))


def spoil_eps(model):
    model.layers[0].attention_norm.eps = 1e-2


def spoil_norm(model):
    block = model.layers[0]
    block.attention_norm, block.ffn_norm = block.ffn_norm, block.attention_norm


@pytest.mark.parametrize(
    "spoil",
    [spoil_rows, spoil_gate, spoil_scaling, spoil_groups, spoil_eps, spoil_norm],
    ids=lambda f: f.__name__,
)
def test_a_spoiled_model_is_told_apart(spoil):
    model = random_model(shape_of(2, True, True), torch.float64)
    theirs_BTV = exact(theirs_of(model), model)(tokens()).logits
    assert distance(model(tokens()), theirs_BTV) < EXACT_FP64
    spoil(model)
    assert distance(model(tokens()), theirs_BTV) > 1e-3


PAIR = pytest.mark.parametrize("variant", [(4, False, False), (2, True, True)], ids=["MHA-plain", "GQA-scaled"])


@PAIR
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches(variant, side):
    model = random_model(shape_of(*variant), torch.float64)
    theirs = exact(theirs_of(model), model)
    lengths_B1 = torch.tensor([[SEQ_LEN], [17], [1]])
    slots_T = torch.arange(SEQ_LEN)
    valid_BT = (slots_T < lengths_B1) if side == "right" else (slots_T >= SEQ_LEN - lengths_B1)
    attend, tokens_BT = Padded(valid_BT), tokens(rows=3)
    ours_BTV = model(tokens_BT, attend)
    positions_BT = attend.positions(tokens_BT)
    theirs_BTV = theirs(tokens_BT, attention_mask=valid_BT.long(), position_ids=positions_BT).logits
    assert ours_BTV.isfinite().all()
    assert distance(ours_BTV[valid_BT], theirs_BTV[valid_BT]) < EXACT_FP64
    for row, length in enumerate(lengths_B1.flatten().tolist()):
        alone_TV = model(tokens_BT[row][valid_BT[row]].unsqueeze(0))[0]
        assert distance(ours_BTV[row][valid_BT[row]], alone_TV) < EXACT_FP64, f"a row of {length} tokens, alone"
    if side == "left":
        assert distance(model(tokens_BT)[valid_BT], theirs_BTV[valid_BT]) > 1e-2, "padding must be hidden"


@PAIR
def test_packed_documents(variant):
    model = random_model(shape_of(*variant), torch.float64)
    starts = [[0, 5, 6, 30], [0, 24]]
    attend, tokens_BT = Documents(starts), tokens()
    document_BT = torch.zeros_like(tokens_BT)
    for row, begins in enumerate(starts):
        for begin in begins[1:]:
            document_BT[row, begin:] += 1
    same_BTT = document_BT.unsqueeze(1) == document_BT.unsqueeze(2)
    mask_B1TT = (same_BTT & torch.ones(SEQ_LEN, SEQ_LEN, dtype=torch.bool).tril()).unsqueeze(1)
    theirs = exact(theirs_of(model), model)
    positions_BT = torch.stack(
        [torch.cat([torch.arange(e - b) for b, e in zip(s, [*s[1:], SEQ_LEN], strict=True)]) for s in starts]
    )
    theirs_BTV = theirs(tokens_BT, attention_mask=mask_B1TT, position_ids=positions_BT).logits
    assert distance(model(tokens_BT, attend), theirs_BTV) < EXACT_FP64
    assert distance(model(tokens_BT, Causal()), theirs_BTV) > 1e-2, "documents must be kept apart"


def cached(model, tokens_BT, chunks, spoil=lambda cache: None):
    """Logits of a row read in chunks through a cache."""
    rows, seq_len = tokens_BT.shape
    cache = KVCache(model.shape, rows, seq_len, model.norm.weight.dtype, "cpu")
    parts = []
    for chunk_BT in tokens_BT.split(chunks, dim=1):
        parts.append(model(chunk_BT, cache))
        cache.advance([chunk_BT.shape[1]] * rows)
        spoil(cache)
    return torch.cat(parts, dim=1)


@PAIR
@pytest.mark.parametrize("chunks", [[1] * SEQ_LEN, [SEQ_LEN], [7, 1, 1, 20, 19]], ids=["tokens", "whole", "chunks"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.float64, EXACT_FP64)])
def test_cached(variant, chunks, dtype, bound):
    model = random_model(shape_of(*variant), dtype)
    theirs = theirs_of(model)
    theirs_BTV = (exact(theirs, model) if dtype == torch.float64 else theirs)(tokens()).logits
    assert distance(cached(model, tokens(), chunks), theirs_BTV) < bound

    def forget(cache):
        cache.values[0][:, 0] = 0

    if len(chunks) > 1:
        assert distance(cached(model, tokens(), chunks, forget), theirs_BTV) > 1e-2
        assert distance(cached(model, tokens(), chunks), model(tokens())) < bound


def test_cached_like_their_cache():
    """Token by token on both sides."""
    model = random_model(shape_of(2, False, True), torch.float64)
    theirs, past, parts = exact(theirs_of(model), model), None, []
    for token_B1 in tokens(seq_len=20).split(1, dim=1):
        answer = theirs(token_B1, past_key_values=past, use_cache=True)
        past = answer.past_key_values
        parts.append(answer.logits)
    ours_BTV = cached(model, tokens(seq_len=20), [1] * 20)
    assert distance(ours_BTV, torch.cat(parts, dim=1)) < EXACT_FP64
    assert distance(ours_BTV[:, 1:], parts[0]) > 1e-2


def test_loss_and_gradients():
    model = random_model(shape_of(2, True, True), torch.float64)
    theirs = exact(theirs_of(model), model)
    with torch.enable_grad():
        logits_BTV = model(tokens())
        loss = nn.functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten())
        loss.backward()
        their_loss = theirs(tokens(), labels=tokens()).loss
        their_loss.backward()
    assert abs(float(loss - their_loss)) < 1e-6
    their_weights = dict(theirs.named_parameters())
    for ours, name in hf_names(2, tied=True).items():
        gradient, their_gradient = model.get_parameter(ours).grad, their_weights[name].grad
        assert distance(gradient, their_gradient) < 1e-7, ours  # their loss is taken in float32
        assert float(gradient.abs().max()) > 1e-4, ours

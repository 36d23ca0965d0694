"""Layer: parity. Operations on whole models, by the logits that must not move; each beside one that must."""

import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import save_file

from llamita.formats import surgery
from llamita.formats.names import hf_names
from llamita.formats.surgery import logits_kept
from llamita.formats.weights import Weights, sizes
from llamita.model.llama import build
from llamita.model.shape import RopeScaling, Shape
from llamita.tokenizer import Tokenizer
from tests.weights import filled

WORDS = [b"th", b"he", b" th", b" the", b"er", b"in", b"and", b" and"]
TOKENIZER = Tokenizer([*(bytes([byte]) for byte in range(256)), *WORDS], "llama3.1")
SHAPE = Shape(
    dim=64, num_layers=3, num_heads=4, num_kv_heads=2, ffn_dim=96, vocab_size=TOKENIZER.vocab_size + 5, tied=False,
    max_seq_len=96,
)  # fmt: skip
SCALING = RopeScaling(factor=4.0, original_max_seq_len=16)
TEXT = "the weather in there and here, then \N{SNOWMAN}"


def random_model(seed=0, dtype=torch.float32, **changes):
    return filled(build(dataclasses.replace(SHAPE, **changes)), seed).to(dtype)


def random_weights(seed=0, **changes):
    return Weights.of(random_model(seed, **changes))


def blocks(weights):
    """The same weights as a GGUF file's reader gives quantized ones."""
    kinds = {name: kind if "norm" in name else "Q4_K" for name, kind in weights.kinds.items()}
    return dataclasses.replace(weights, kinds=kinds)


def same(one, other):
    """Both give the same bits under the same kinds, and these fit the shape and the tensors."""
    assert one.shape == other.shape and dict(one.kinds) == dict(other.kinds)
    for name in sizes(one.shape):
        assert torch.equal(bits(one.load(name)), bits(other.load(name))), name


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def whole(weights):
    """Every tensor has the size that the shape says and the dtype that the kind says."""
    assert set(weights.kinds) == set(sizes(weights.shape))
    dtypes = {"BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
    for name, size in sizes(weights.shape).items():
        tensor = weights.load(name)
        assert tuple(tensor.shape) == size and tensor.dtype == dtypes.get(weights.kinds[name], torch.float32), name
    return weights


def refused(call, *words):
    with pytest.raises(ValueError) as error:
        call()
    assert "\n" not in str(error.value)
    for word in words:
        assert str(word) in str(error.value)


def rolled(weights, name, ids):
    """A fault to detect: the rows of a tensor in another order."""
    return dataclasses.replace(weights, load=lambda n: weights.load(n)[ids] if n == name else weights.load(n))


# Vocabularies.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_are_the_mean_and_old_logits_stay(tied, dtype):
    before = random_weights(tied=tied, dtype=dtype)
    after, tokenizer = surgery.resize_vocab(before, TOKENIZER, SHAPE.vocab_size + 40)
    assert tokenizer is TOKENIZER and whole(after).shape.vocab_size == SHAPE.vocab_size + 40
    for name in ["tok_embeddings.weight"] + ["output.weight"] * (not tied):
        old, new = before.load(name), after.load(name)
        assert torch.equal(new[: len(old)], old)
        assert torch.equal(new[-1], old.double().mean(0).to(dtype)) and torch.equal(new[len(old)], new[-1])
    assert logits_kept(before, after) == 0
    assert logits_kept(before, rolled(after, "tok_embeddings.weight", torch.arange(len(old) + 40).roll(1))) > 0.1


def test_new_tokens_take_no_more_than_their_share():
    before = random_weights()
    after = surgery.pad_vocab(before, SHAPE.vocab_size + 60)
    tokens = torch.randint(SHAPE.vocab_size, (2, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        share = after.model()(tokens).softmax(-1)[..., SHAPE.vocab_size :].sum(-1)
    assert share.min() > 0 and share.max() <= 60 / (SHAPE.vocab_size + 60)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("num_ranks", [256, 259, 263])
def test_a_trimmed_llama3_keeps_ranks_and_specials(tmp_path, tied, num_ranks):
    before = random_weights(tied=tied)
    size = num_ranks + 256
    after, tokenizer = surgery.resize_vocab(before, TOKENIZER, size)
    assert whole(after).shape.vocab_size == tokenizer.vocab_size == size
    assert tokenizer.tokens == TOKENIZER.tokens[:num_ranks] and tokenizer.chat_format == "llama3.1"
    ids = surgery.kept_ids(before.shape, TOKENIZER, size)
    assert ids[tokenizer.eot_id] == TOKENIZER.eot_id and ids[-1] == TOKENIZER.vocab_size - 1
    assert logits_kept(before, after, ids) == 0
    wrong = [*ids[:-2], ids[-1], ids[-2]]
    assert logits_kept(before, after, wrong) > 0.1, "two specials exchanged are seen"
    tokenizer.save(tmp_path)
    assert Tokenizer.load(tmp_path).fingerprint == tokenizer.fingerprint

    new = tokenizer.encode(TEXT, bos=True, eos=True)
    old = [ids[token] for token in new]
    assert TOKENIZER.decode(old) == tokenizer.decode(new), "the text is the same text"
    with torch.no_grad():
        kept = before.model()(torch.tensor([old]))[..., ids]
        torch.testing.assert_close(after.model()(torch.tensor([new])), kept, atol=1e-5, rtol=0)


def test_padding_goes_first():
    before = random_weights()
    after, tokenizer = surgery.resize_vocab(before, TOKENIZER, TOKENIZER.vocab_size)
    assert tokenizer is TOKENIZER and whole(after).shape.vocab_size == TOKENIZER.vocab_size
    assert logits_kept(before, after) == 0
    same(after, surgery.trim_vocab(surgery.pad_vocab(after, 900), TOKENIZER, TOKENIZER.vocab_size)[0])


class Carried:
    vocab_size = TOKENIZER.vocab_size


def test_another_tokenizer_loses_padding_alone():
    before, carried = random_weights(), Carried()
    after, tokenizer = surgery.resize_vocab(before, carried, Carried.vocab_size + 2)
    assert tokenizer is carried and logits_kept(before, after) == 0
    refused(lambda: surgery.resize_vocab(before, carried, Carried.vocab_size - 1), "only a Llama 3", Carried.vocab_size)


def test_sizes_that_cannot_be():
    before = random_weights()
    for size in (-1, 0, 256, 511):
        refused(lambda size=size: surgery.resize_vocab(before, TOKENIZER, size), "at least 512", size)
    refused(lambda: surgery.resize_vocab(before, TOKENIZER, SHAPE.vocab_size), "another size")
    refused(lambda: surgery.pad_vocab(before, SHAPE.vocab_size), "larger size")
    refused(lambda: surgery.resize_vocab(before, TOKENIZER, 10**12), "vocab_size", 10**12)
    small = random_weights(vocab_size=514)
    refused(lambda: surgery.trim_vocab(small, TOKENIZER, 513), "520 tokens", "514")
    refused(lambda: surgery.resize_vocab(small, TOKENIZER, 519), "520 tokens", "519")
    assert surgery.resize_vocab(small, TOKENIZER, 520)[0].shape.vocab_size == 520, "rows that the tokenizer lacked"


# The head.


def test_untied_and_tied_again():
    before = random_weights(tied=True)
    after = surgery.untie(before)
    assert whole(after).shape.tied is False and logits_kept(before, after) == 0
    same(surgery.tie(after), before)
    refused(lambda: surgery.untie(after), "not tied")
    refused(lambda: surgery.tie(before), "tied already")


def test_unequal_heads_are_tied_on_purpose_only():
    before = random_weights(dtype=torch.bfloat16)
    one, other = before.load("tok_embeddings.weight"), before.load("output.weight")
    refused(lambda: surgery.tie(before), f"{(one.double() - other.double()).abs().max():.3g}", "logits would move")
    refused(lambda: surgery.tie(before, "output"), "'output'", "embeddings, head, mean")
    wanted = {"embeddings": one, "head": other, "mean": ((one.double() + other.double()) / 2).bfloat16()}
    for keep, rows in wanted.items():
        after = whole(surgery.tie(before, keep))
        assert torch.equal(after.load("tok_embeddings.weight"), rows) and after.shape.tied
        assert logits_kept(before, after) > 0.1
    nudged = surgery.untie(random_weights(tied=True))
    head = nudged.load("output.weight").clone()
    head[7, 3] = math.nan
    both = {"output.weight": head, "tok_embeddings.weight": nudged.load("output.weight")}
    spoiled = dataclasses.replace(nudged, load=both.get)
    refused(lambda: surgery.tie(spoiled), "nan")


# Averages.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shares", [None, (0.3, 0.3, 0.4), (1, 5, 7)])
def test_the_average_of_copies_is_the_copy(dtype, shares):
    model = random_model(dtype=dtype)
    with torch.no_grad():
        model.norm.weight[0], model.norm.weight[1] = -0.0, 2.0**-24
    copy = Weights.of(model)
    same(surgery.average([copy] * 3, shares), copy)


def test_averages_are_weighed():
    models = [random_weights(seed) for seed in range(3)]
    after = whole(surgery.average(models, (1, 2, 5)))
    for name in sizes(SHAPE):
        one, two, three = (model.load(name).double() for model in models)
        assert torch.equal(after.load(name), ((one + 2 * two + 5 * three) / 8).float()), name
    assert logits_kept(surgery.average(models), after) > 0.1
    first = surgery.average([random_weights(0, dtype=torch.bfloat16), models[1]])
    assert set(whole(first).kinds.values()) == {"BF16"}, "the kinds of the first"


def test_what_has_no_average():
    one = random_weights()
    refused(lambda: surgery.average([one]), "two models or more", 1)
    refused(lambda: surgery.average([one, random_weights(ffn_dim=64)]), "ffn_dim", 96, 64, "model 2")
    refused(lambda: surgery.average([one, one, random_weights(tied=True)]), "tied", "model 3")
    refused(lambda: surgery.average([one, random_weights(rope_theta=1e4)]), "rope_theta")
    for shares in ((1,), (1, 0), (1, -1), (1, math.nan), (1, math.inf), (1, 1, 1)):
        refused(lambda shares=shares: surgery.average([one, one], shares), "share above 0")


# Layers.


def test_layers_that_add_nothing_can_go():
    model = random_model(num_layers=5)
    with torch.no_grad():
        for layer in (1, 3):
            model.layers[layer].attention.wo.weight.zero_()
            model.layers[layer].feed_forward.w2.weight.zero_()
    before = Weights.of(model)
    after = whole(surgery.slice_layers(before, [0, 2, 4]))
    assert after.shape == dataclasses.replace(before.shape, num_layers=3)
    assert torch.equal(after.load("layers.1.attention.wq.weight"), before.load("layers.2.attention.wq.weight"))
    assert logits_kept(before, after) == 0
    for others in ([0, 1, 4], [2, 4], [0, 2, 3, 4][:2]):
        assert logits_kept(before, surgery.slice_layers(before, others)) > 0.1
    same(surgery.slice_layers(before, range(5)), before)


@pytest.mark.parametrize("keep", [[], [0, 3], [-1, 0], [1, 0], [0, 0]])
def test_layers_that_are_not_there(keep):
    refused(lambda: surgery.slice_layers(random_weights(), keep), "from 0 to 2", keep)


# Rotary settings.


@pytest.mark.parametrize("changes", [dict(theta=10_000.0), dict(scaling=SCALING), dict(theta=1e6, scaling=SCALING)])
def test_rotary_settings_show_after_position_0(changes):
    before = random_weights()
    after = surgery.change_rope(before, **changes)
    assert after.shape.rope_theta == changes.get("theta", SHAPE.rope_theta)
    assert after.shape.rope_scaling == changes.get("scaling")
    assert logits_kept(before, after, length=1) == 0 and logits_kept(before, after) > 1e-3
    back = surgery.change_rope(after, theta=SHAPE.rope_theta, scaling=None)
    same(back, before)
    assert logits_kept(before, back) == 0


def test_a_longer_context_changes_nothing_within_the_old_one():
    before = random_weights(rope_scaling=SCALING)
    after = surgery.change_rope(before, max_seq_len=200)
    assert after.shape == dataclasses.replace(before.shape, max_seq_len=200)
    assert logits_kept(before, after) == 0


def test_rotary_settings_that_cannot_be():
    before = random_weights()
    for none in ({}, dict(theta=SHAPE.rope_theta), dict(scaling=None)):
        refused(lambda none=none: surgery.change_rope(before, **none), "already")
    refused(lambda: surgery.change_rope(before, theta=-1.0), "rope_theta")
    refused(lambda: surgery.change_rope(before, theta=math.inf), "rope_theta")
    for length in (0, 20_000_000):
        refused(lambda length=length: surgery.change_rope(before, max_seq_len=length), "max_seq_len", length)


# LoRA. The peer is an adapter that stays beside its matrix, as peft runs it: y + scale * B(A x).

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapter(folder, targets=TARGETS, ranks=None, dtype=torch.float32, shape=SHAPE, **config):
    """An adapter as peft saves one; returns module -> (A [r, in], B [out, r])."""
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(3)
    config = dict(peft_type="LORA", r=4, lora_alpha=8, target_modules=targets, bias="none") | config
    pairs = {}
    modules = {theirs.removesuffix(".weight"): ours for ours, theirs in hf_names(shape.num_layers, tied=False).items()}
    for module, ours in modules.items():
        if module.rpartition(".")[2] in targets:
            rows, columns = sizes(dataclasses.replace(shape, tied=False))[ours]
            rank = (ranks or {}).get(module.rpartition(".")[2], config["r"])
            pairs[module] = (
                torch.randn(rank, columns, generator=generator).to(dtype) * columns**-0.5,
                torch.randn(rows, rank, generator=generator).to(dtype) * 0.05 * rank**-0.5,
            )
    write(folder, pairs, config)
    return pairs


def write(folder, pairs, config=None, **more):
    tensors = dict(more)
    for module, pair in pairs.items():
        for half, tensor in zip("AB", pair, strict=True):
            tensors[f"base_model.model.{module}.lora_{half}.weight"] = tensor.clone()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))


def beside(weights, pairs, scale):
    """Logits of the base model with its adapters unmerged; `scale(module)` is what each is multiplied with."""
    model = weights.model(dtype=None)
    theirs = hf_names(weights.shape.num_layers, tied=False)
    modules = dict(model.named_modules())
    for ours, name in theirs.items():
        if pair := pairs.get(name.removesuffix(".weight")):
            a, b = (half.to(model.norm.weight.dtype) for half in pair)
            factor = scale(name.removesuffix(".weight"))
            modules[ours.removesuffix(".weight")].register_forward_hook(
                lambda _, x, y, a=a, b=b, factor=factor: y + factor * torch.nn.functional.linear(x[0] @ a.T, b)
            )
    return logits(model)


@torch.no_grad()
def logits(model):
    return model(torch.randint(500, (2, 16), generator=torch.Generator().manual_seed(5)))


CASES = {
    "all": (dict(), lambda m: 2.0),
    "queries and values": (dict(targets=["q_proj", "v_proj"], lora_alpha=3), lambda m: 0.75),
    "rslora": (dict(use_rslora=True, r=9), lambda m: 8 / 3),
    "bfloat16": (dict(dtype=torch.bfloat16), lambda m: 2.0),
    "the head too": (dict(targets=["down_proj", "lm_head"]), lambda m: 2.0),
    "ranks": (
        dict(ranks={"q_proj": 2, "up_proj": 6}, rank_pattern={"q_proj": 2, "^model.layers.\\d.mlp.up_proj$": 6}),
        lambda m: 8 / {"q_proj": 2, "up_proj": 6}.get(m.rpartition(".")[2], 4),
    ),
    "alphas": (
        dict(
            alpha_pattern={"model.layers.1.self_attn.q_proj": 2, "q_proj": 20, "^self_attn.k_proj": 99, "n.k_proj": 9}
        ),
        lambda m: 0.5 if "1.self_attn.q_proj" in m else 5.0 if "q_proj" in m else 2.0,
    ),
    "pattern of targets": (dict(target_modules="all-linear"), lambda m: 2.0),
}


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("case", CASES)
def test_a_merged_adapter_computes_what_it_did_beside(tmp_path, case, dtype, bound):
    config, scale = CASES[case]
    before = random_weights(dtype=dtype)
    pairs = adapter(tmp_path, **config)
    after = whole(surgery.merge_lora(before, tmp_path))
    expected, found = beside(before, pairs, scale), logits(after.model(dtype=None))
    assert (found - expected).abs().max() <= bound
    assert (found - beside(before, pairs, lambda m: 1 / scale(m))).abs().max() > 1e-2, "alpha and r exchanged"
    backwards = {m: (b.T, a.T) for m, (a, b) in pairs.items() if a.shape[1] == b.shape[0]}
    assert (found - beside(before, pairs | backwards, scale)).abs().max() > 1e-2 or not backwards, "A and B exchanged"
    assert logits_kept(before, after) > 1e-2


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-15), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_merged_weights_keep_their_kind(tmp_path, dtype, bound):
    before = random_weights(dtype=dtype)
    pairs = adapter(tmp_path, targets=["up_proj"])
    after = whole(surgery.merge_lora(before, tmp_path))
    assert after.kinds == before.kinds
    a, b = pairs["model.layers.1.mlp.up_proj"]
    name = "layers.1.feed_forward.w3.weight"
    exact = before.load(name).double() + 2.0 * b.double() @ a.double()
    error = (after.load(name).double() - exact).abs() / exact.abs().clamp(min=0.01)
    assert error.max() <= bound
    assert torch.equal(after.load("layers.1.feed_forward.w1.weight"), before.load("layers.1.feed_forward.w1.weight"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(peft_type="IA3"), ["peft_type", "IA3"]),
        (dict(use_dora=True), ["use_dora"]),
        (dict(bias="all"), ["bias", "all"]),
        (dict(lora_bias=True), ["lora_bias"]),
        (dict(modules_to_save=["lm_head"]), ["modules_to_save"]),
        (dict(fan_in_fan_out=True), ["fan_in_fan_out"]),
        (dict(init_lora_weights="pissa_niter_4"), ["init_lora_weights", "pissa"]),
        (dict(layer_replication=[[0, 2]]), ["layer_replication"]),
        (dict(r=0), ["r must be a whole number"]),
        (dict(r=5), ["lora_A", "[4, 64]", "rank"]),
        (dict(lora_alpha=None), ["lora_alpha", "None"]),
        (dict(lora_alpha=math.inf), ["lora_alpha"]),
        (dict(rank_pattern=[4]), ["rank_pattern", "object"]),
        (dict(rank_pattern={"q_proj": "4"}), ["q_proj", "whole number"]),
        (dict(alpha_pattern={"(a+)+b": 4}), ["alpha_pattern", "(a+)+b"]),
        (dict(alpha_pattern={"q_proj": "x"}), ["q_proj", "number above 0"]),
        (dict(target_modules=["q_proj", "c_attn"]), ["c_attn", "target_modules"]),
        (dict(target_modules=["embed_tokens"]), ["embed_tokens"]),
        (dict(target_modules=[*TARGETS, "lm_head"]), ["lm_head.lora_A.weight", "missing"]),
    ],
)
def test_adapters_that_are_not_plain(tmp_path, changes, words):
    pairs = adapter(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    write(tmp_path, pairs, config)
    surgery.merge_lora(random_weights(), tmp_path)
    write(tmp_path, pairs, config | changes)
    refused(lambda: surgery.merge_lora(random_weights(), tmp_path), *words)


def test_adapters_with_other_tensors(tmp_path):
    before, pairs = random_weights(), adapter(tmp_path, targets=["q_proj"])
    merge = lambda: surgery.merge_lora(before, tmp_path)  # noqa: E731
    q = "base_model.model.model.layers.1.self_attn.q_proj"
    module = q.removeprefix("base_model.model.")
    a, b = pairs[module]
    others = ("lora_magnitude_vector", "lora_B.bias", "lora_embedding_A", "lora_A.default.weight")
    for name in (
        *(f"{q}.{part}" for part in others),
        f"{q.replace('1', '3')}.lora_A.weight",
        f"{module}.lora_A.weight",
    ):
        write(tmp_path, pairs, **{name: torch.ones(4, 64)})
        refused(merge, name, "lora_A or lora_B")
    for spoiled in ((a[:, :63], b), (a, b[:63]), (a, b[:, :3]), (a[0], b), (a.long(), b), (torch.ones(()), b)):
        write(tmp_path, pairs | {module: tuple(half.contiguous() for half in spoiled)})
        refused(merge, module, "must be floats")
    write(tmp_path, pairs | {module: (a,) * 2})
    refused(merge, module, "lora_B", "[4, 64]")
    others = {name: pair for name, pair in pairs.items() if name != module}
    write(tmp_path, others)
    refused(merge, module, "missing")
    write(tmp_path, others, **{f"{q}.lora_B.weight": b})
    refused(merge, f"{q}.lora_A.weight", "missing")
    plain = dict(peft_type="LORA", r=4, lora_alpha=8, target_modules=["q_proj"])
    write(tmp_path, others, plain | dict(layers_to_transform=[0, 2]))
    assert logits_kept(before, merge()) > 1e-2, "some layers alone are adapted"
    write(tmp_path, {}, plain | dict(target_modules="q_proj"), other=torch.ones(1))
    refused(merge, "other")
    write(tmp_path, {})
    refused(merge, "no adapter")


def test_adapters_of_a_tied_head(tmp_path):
    adapter(tmp_path, targets=["lm_head"])
    before = random_weights(tied=True)
    refused(lambda: surgery.merge_lora(before, tmp_path), "lm_head", "untie it first")
    assert logits_kept(before, surgery.merge_lora(surgery.untie(before), tmp_path)) > 1e-2


def test_folders_without_an_adapter(tmp_path):
    before = random_weights()
    merge = lambda: surgery.merge_lora(before, tmp_path)  # noqa: E731
    refused(merge, "adapter_model.safetensors", "folder of a peft adapter")
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04.")
    refused(merge, "pickle", "safetensors")
    adapter(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(merge, "damaged")
    adapter(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    refused(merge, "adapter_config.json")


# All of them: lazy, leaving what they were given alone, block formats made float32 where computed.

ALL = {
    "pad": lambda w, _: surgery.pad_vocab(w, 600),
    "trim": lambda w, _: surgery.trim_vocab(w, TOKENIZER, 514)[0],
    "tie": lambda w, _: surgery.tie(w, "mean"),
    "untie": lambda w, _: surgery.untie(surgery.tie(w, "head")),
    "average": lambda w, _: surgery.average([w, w]),
    "lora": surgery.merge_lora,
    "layers": lambda w, _: surgery.slice_layers(w, [0, 2]),
    "rope": lambda w, _: surgery.change_rope(w, theta=1e4),
}
COMPUTED = {"pad": ["tok_embeddings", "output"], "tie": ["tok_embeddings"], "average": [""], "lora": ["wq"]}


@pytest.mark.parametrize("operation", ALL)
def test_tensor_by_tensor_with_inputs_left_alone(tmp_path, operation):
    adapter(tmp_path, targets=["q_proj"])
    before, asked = blocks(random_weights()), []
    kept = {name: before.load(name).clone() for name in sizes(SHAPE)}
    watched = dataclasses.replace(before, load=lambda name: asked.append(name) or before.load(name))
    after = ALL[operation](watched, tmp_path)
    assert asked == [], "nothing is read before it is asked for"
    for name in sizes(whole(after).shape):
        computed = any(word in name for word in COMPUTED.get(operation, ()))
        assert after.kinds[name] == ("F32" if computed or "norm" in name else "Q4_K"), name
        asked.clear()
        after.load(name)
        assert len(asked) <= 2
    assert all(torch.equal(before.load(name), tensor) for name, tensor in kept.items())

"""Layer: parity with others. An export's proof holds for a whole folder and fails for every spoiled one."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from llamita.formats import hf, names, proof
from llamita.formats.names import to_interleaved
from llamita.model.llama import build
from llamita.model.shape import RopeScaling, Shape
from llamita.tokenizer import Tokenizer

# Every byte, then pairs that join to words, so that merges are tested too.
TOKENIZER = Tokenizer([*(bytes([byte]) for byte in range(256)), b"th", b" th", b"he", b" the", b"12", b"123", b"  "])
SHAPE = Shape(
    dim=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    ffn_dim=96,
    vocab_size=TOKENIZER.vocab_size + 1,
    tied=False,
    max_seq_len=128,
    rope_scaling=RopeScaling(original_max_seq_len=16),
)
W1, Q = "model.layers.0.mlp.gate_proj.weight", "model.layers.1.self_attn.q_proj.weight"


def random_model(**changes):
    generator = torch.Generator().manual_seed(0)
    model = build(Shape(**(SHAPE.__dict__ | changes)))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.copy_(0.8 + 0.4 * torch.rand(weight.shape, generator=generator))
            else:
                weight.copy_(torch.randn(weight.shape, generator=generator) * weight.shape[1] ** -0.5)
    return model


MODEL = random_model()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "model"
    hf.write(MODEL, TOKENIZER, folder)
    return folder


@pytest.fixture
def folder(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "model")


def needs_transformers():
    pytest.importorskip("transformers")


def fails(folder, *words, model=MODEL):
    (folder / "proof.json").write_text("an older proof")
    with pytest.raises(ValueError) as error:
        proof.prove(model, TOKENIZER, folder)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)
    assert not (folder / "proof.json").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, dict(tied=True, rope_scaling=None), dict(num_kv_heads=4)])
def test_a_whole_folder_is_proved(tmp_path, dtype, changes):
    needs_transformers()
    model = random_model(**changes)
    hf.write(model, TOKENIZER, tmp_path / "model", dtype=dtype)
    result = proof.prove(model, TOKENIZER, tmp_path / "model")
    assert json.loads((tmp_path / "model/proof.json").read_text()) == result
    assert result["dtype"] == str(dtype).removeprefix("torch.")
    assert result["readers"]["llamita"]["max_logit_diff"] == 0
    theirs = result["readers"]["transformers"]
    assert 0 < theirs["max_logit_diff"] <= 1e-4 and theirs["mean_kl"] <= 1e-8
    assert result["readers"]["transformers"]["version"]
    assert theirs["reply_tokens"] == 16 and theirs["equal_facts"] > 2 * len(proof.STRINGS)
    assert len(result["sha256"]["model.safetensors"]) == 64


def test_without_transformers_the_proof_says_so(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    result = proof.prove(MODEL, TOKENIZER, folder)
    assert result["readers"]["transformers"] == "not installed"
    assert result["readers"]["llamita"]["reply_tokens"] == 16


def swap(tensors):
    up = W1.replace("gate", "up")
    tensors[W1], tensors[up] = tensors[up], tensors[W1]


def permute(tensors):
    tensors[Q] = to_interleaved(tensors[Q], 4)


def nudge(tensors):
    tensors[Q][3, 5] = torch.nextafter(tensors[Q][3, 5], torch.tensor(9.0))


def drop_head(tensors):
    del tensors["lm_head.weight"]


@pytest.mark.parametrize(
    ("mutant", "words"),
    [
        (swap, ["layers.0.feed_forward.w1.weight"]),
        (permute, ["layers.1.attention.wq.weight"]),
        (nudge, ["layers.1.attention.wq.weight", "1 values"]),
        (drop_head, ["lm_head.weight", "missing"]),
    ],
    ids=lambda mutant: getattr(mutant, "__name__", ""),
)
def test_mutants_of_the_weights(folder, mutant, words):
    tensors = load_file(folder / "model.safetensors")
    mutant(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    fails(folder, *words)


def test_weights_that_are_not_finite(tmp_path):
    model = random_model()
    with torch.no_grad():
        model.norm.weight[0] = 1e6
    hf.write(model, TOKENIZER, tmp_path / "model", dtype=torch.float16)
    fails(tmp_path / "model", "norm.weight", "not finite", model=model)


def edit(folder, file, **changes):
    data = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(data | changes))


PLAIN = {"rope_type": "default", "rope_theta": 500_000.0}


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("config.json", dict(rope_theta=10_000.0), ["rope_theta", "10000.0"]),
        ("config.json", dict(rope_scaling=None, rope_parameters=PLAIN), ["rope_scaling", "None"]),
        ("config.json", dict(rope_parameters=PLAIN), ["rope_scaling"]),
        ("config.json", dict(rms_norm_eps=1e-6), ["norm_eps", "1e-06"]),
        ("config.json", dict(max_position_embeddings=64), ["max_seq_len", "64"]),
        ("config.json", dict(eos_token_id=0), ["config.json", "[0]"]),
        ("config.json", dict(bos_token_id=None), ["config.json", "None"]),
        ("generation_config.json", dict(eos_token_id=[0]), ["generation_config.json", "[0]"]),
        ("generation_config.json", dict(eos_token_id=TOKENIZER.eos_id), ["generation_config.json"]),
    ],
)
def test_mutants_of_the_configs(folder, file, changes, words):
    edit(folder, file, **changes)
    fails(folder, *words)


def test_theta_wrong_under_both_generations_of_keys(folder):
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    edit(folder, "config.json", rope_theta=10_000.0, rope_parameters=rope | {"rope_theta": 10_000.0})
    fails(folder, "rope_theta", "10000.0", "500000.0")


@pytest.mark.parametrize("count", [0, 2])
def test_a_dialog_begins_with_one_bos(folder, monkeypatch, count):
    render = proof.render

    def spoiled(*arguments, **named):
        ids, mask = render(*arguments, **named)
        return [TOKENIZER.bos_id] * count + ids[1:], mask

    monkeypatch.setattr(proof, "render", spoiled)
    fails(folder, "ids of a dialog", f"{count} BOS")


def test_a_tokenizer_with_another_order_of_ranks(folder):
    swapped = [*TOKENIZER.tokens[:-2], TOKENIZER.tokens[-1], TOKENIZER.tokens[-2]]
    Tokenizer(swapped).save(folder)
    fails(folder, "llamita reads ids of")


# From here on our own reader sees nothing wrong: only transformers can tell.


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(eos_token="<|eot_id|>"), ["bos, eos, pad"]),
        (dict(bos_token="<|end_of_text|>"), ["bos, eos, pad"]),
        (dict(pad_token="<|end_of_text|>"), ["bos, eos, pad"]),
        (dict(chat_template="{{ bos_token }}{{ messages[0]['content'] }}"), ["ids of a dialog"]),
        (dict(chat_template=None), ["chat_template"]),
    ],
)
def test_mutants_of_the_tokenizer_config(folder, changes, words):
    needs_transformers()
    edit(folder, "tokenizer_config.json", **changes)
    fails(folder, "transformers", *words)


def test_two_bos_in_their_tokenizer(folder):
    needs_transformers()
    data = json.loads((folder / "tokenizer.json").read_text())
    single = data["post_processor"]["processors"][1]["single"]
    single.insert(0, single[0])
    (folder / "tokenizer.json").write_text(json.dumps(data))
    fails(folder, "transformers", "ids with BOS")


def test_another_split_in_their_tokenizer(folder):
    needs_transformers()
    data = json.loads((folder / "tokenizer.json").read_text())
    pattern = data["pre_tokenizer"]["pretokenizers"][0]["pattern"]
    pattern["Regex"] = pattern["Regex"].replace("{1,3}", "{1,2}")
    (folder / "tokenizer.json").write_text(json.dumps(data))
    fails(folder, "transformers", "ids of '1 12 123")


def wrong_on_both_ways(monkeypatch, tmp_path, rows=None, table=None):
    """Write and read with the same fault: our reader undoes what our writer did wrong."""
    if table:
        monkeypatch.setattr(names, "TO_HF", names.TO_HF | table)
    if rows:
        tensors_of, read = hf._tensors, hf.read

        def spoiled(model, dtype):
            tensors = tensors_of(model, dtype)
            return tensors | {name: rows(t) for name, t in tensors.items() if "q_proj" in name}

        def undone(folder, **named):
            model = read(folder, **named)
            with torch.no_grad():
                for block in model.layers:
                    block.attention.wq.weight.copy_(names.to_half_split(block.attention.wq.weight, 4))
            return model

        monkeypatch.setattr(hf, "_tensors", spoiled)
        monkeypatch.setattr(hf, "read", undone)
    hf.write(MODEL, TOKENIZER, tmp_path / "model")
    fails(tmp_path / "model", "transformers computes other logits", "bound")


def test_gate_and_up_exchanged_in_writer_and_reader(monkeypatch, tmp_path):
    needs_transformers()
    w1, w3 = "layers.{}.feed_forward.w1.weight", "layers.{}.feed_forward.w3.weight"
    wrong_on_both_ways(monkeypatch, tmp_path, table={w1: names.TO_HF[w3], w3: names.TO_HF[w1]})


def test_a_name_that_only_we_know(monkeypatch, tmp_path):
    needs_transformers()
    monkeypatch.setattr(names, "TO_HF", names.TO_HF | {"norm.weight": "model.last_norm.weight"})
    hf.write(MODEL, TOKENIZER, tmp_path / "model")
    fails(tmp_path / "model", "transformers cannot read", "norm.weight")


def test_a_file_that_only_they_read_is_broken(folder):
    needs_transformers()
    (folder / "tokenizer.json").write_text("{")
    fails(folder, "transformers cannot read")


def test_query_rows_permuted_in_writer_and_reader(monkeypatch, tmp_path):
    needs_transformers()
    wrong_on_both_ways(monkeypatch, tmp_path, rows=lambda weight: to_interleaved(weight, 4))


def test_scaling_forgotten_in_our_model(monkeypatch, folder):
    """Both our model and our reader leave rotary scaling out; config.json is right."""
    needs_transformers()
    from llamita.model import rope

    monkeypatch.setattr(rope, "scale", lambda freqs_P, scaling: freqs_P)
    fails(folder, "transformers computes other logits", model=random_model())


def reading(logits=None, reply=(5, 6, 7), margins=(1.0, 1.0, 1.0)):
    logits_BTV = torch.zeros(1, 2, 4) if logits is None else logits
    return proof.Reading(logits_BTV, list(reply), {"fact": 1}, list(margins))


def test_bounds_of_the_comparison():
    def compare(found, expected=None):
        return proof._compare("other", expected or reading(), found)

    off = torch.zeros(1, 2, 4)
    off[0, 1, 2] = 9e-5
    assert compare(reading(off))["max_logit_diff"] == pytest.approx(9e-5)
    for wrong in (2e-4, float("nan"), float("inf")):
        off[0, 1, 2] = wrong
        with pytest.raises(ValueError, match="other computes other logits"):
            compare(reading(off))
    with pytest.raises(ValueError, match="token 9 at step 1, not 6"):
        compare(reading(reply=(5, 9, 7)))
    with pytest.raises(ValueError, match="token None at step 2, not 7"):
        compare(reading(reply=(5, 6)))
    with pytest.raises(ValueError, match="token 8 at step 3, not None"):
        compare(reading(reply=(5, 6, 7, 8)))
    compare(reading(reply=(5, 9, 1)), reading(margins=(1.0, 1e-5, 1.0)))  # a tie


def test_a_greedy_reply_ends_at_a_stop():
    """A stop in the prompt ends nothing."""
    tokenizer = Tokenizer(TOKENIZER.tokens)
    tokens_BT = torch.full((1, 16), tokenizer.eos_id)
    tokenizer.stop_ids = frozenset([tokenizer.eos_id])
    whole = proof._of_llamita(MODEL, tokenizer, {}, tokens_BT).reply
    assert len(whole) == 16
    tokenizer.stop_ids = frozenset([whole[0]])
    assert proof._of_llamita(MODEL, tokenizer, {}, tokens_BT).reply == whole[:1]

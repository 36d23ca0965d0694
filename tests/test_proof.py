"""Layer: parity with others. An export's proof holds for whole exports in every format and fails for spoiled ones."""

import dataclasses
import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from llamita import cli
from llamita.formats import gguf, hf, llama_cpp, names, proof, readers
from llamita.formats.files import replacing, sha256
from llamita.formats.names import to_interleaved
from llamita.formats.weights import Weights, sizes
from llamita.model.llama import build
from llamita.model.shape import RopeScaling, Shape
from llamita.recipes import convert
from llamita.tokenizer import Tokenizer
from tests.folders import save
from tests.weights import filled

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
PLENTY = 2.0**40


def random_model(**changes):
    return filled(build(Shape(**(SHAPE.__dict__ | changes))))


MODEL = random_model()
WEIGHTS = Weights.of(MODEL)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "model"
    save(MODEL, TOKENIZER, folder)
    return folder


@pytest.fixture
def folder(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "model")


def needs_transformers():
    pytest.importorskip("transformers")


def proved(weights, folder, form="hf", kind="F32", max_memory=PLENTY):
    with replacing(folder) as new:
        convert.FORMATS[form].write(weights, TOKENIZER, new, kind)
        result = proof.prove(weights, TOKENIZER, new, form, kind, max_memory=max_memory)
        proof.seal(new, result)
        return result


def fails(folder, *words, weights=WEIGHTS, kind="F32", form="hf"):
    with pytest.raises(ValueError) as error:
        proof.prove(weights, TOKENIZER, folder, form, kind, max_memory=PLENTY)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("changes", [{}, dict(tied=True, rope_scaling=None), dict(num_kv_heads=4)])
def test_a_whole_folder_is_proved(tmp_path, dtype, changes):
    needs_transformers()
    result = proved(Weights.of(random_model(**changes)), tmp_path / "model", kind=dtype)
    written = json.loads((tmp_path / "model/proof.json").read_text())
    assert written == result | {"sha256": written["sha256"]}
    assert written["sha256"].keys() == {path.name for path in (tmp_path / "model").iterdir()} - {"proof.json"}
    assert result["kinds"] == [dtype]
    ours, theirs = result["readers"]["llamita"], result["readers"]["transformers"]
    assert (ours["max_logit_diff"] == 0) == (dtype == "F32")
    assert ours["equal_tensors"] == len(sizes(SHAPE)) - changes.get("tied", False)
    assert 0 < theirs["max_logit_diff"] <= 1e-4 and theirs["mean_kl"] <= 1e-8
    assert theirs["version"]
    assert theirs["reply_tokens"] == 16 and theirs["equal_facts"] > 2 * len(readers.STRINGS)
    assert written["sha256"]["model.safetensors"] == sha256(tmp_path / "model/model.safetensors")


@pytest.mark.parametrize("form", ["meta", "gguf"])
def test_the_other_formats_are_proved_too(tmp_path, form):
    result = proved(WEIGHTS, tmp_path / "model", form)
    assert result["format"] == form and result["readers"]["llamita"]["max_logit_diff"] == 0
    assert len(result["readers"]) == 3 - (form == "gguf"), "a reader that was not at hand is named"


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_what_rounding_costs_is_told(tmp_path, kind):
    ours = proved(WEIGHTS, tmp_path / "model", "gguf", kind)["readers"]["llamita"]
    assert 0 < ours["mean_kl"] < {"F16": 1e-4, "BF16": 1e-3, "Q8_0": 1e-2, "Q4_0": 1.0}[kind]


def test_without_another_reader_the_proof_says_so(folder, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    result = proof.prove(WEIGHTS, TOKENIZER, folder, "hf", "F32", max_memory=PLENTY)
    assert result["readers"]["transformers"] == "not installed"
    assert result["readers"]["llamita"]["max_logit_diff"] == 0
    monkeypatch.setattr(llama_cpp, "version", lambda: None)
    assert proved(WEIGHTS, tmp_path / "g", "gguf")["readers"]["llama.cpp"] == "not installed"


def test_a_model_too_large_for_memory_is_compared_tensor_by_tensor_and_says_so(tmp_path):
    result = proved(WEIGHTS, tmp_path / "model", max_memory=1000.0)
    assert "not computed" in result["logits"] and result["readers"]["llamita"]["equal_tensors"] == len(sizes(SHAPE))
    assert result["readers"]["transformers"] == "not asked, see logits"


# Mutants of the writers, through the command line: each must be caught, named, exit with 2, and leave nothing.


def swap_gate_and_up(weights):
    other = {"w1": "w3", "w3": "w1"}

    def load(name):
        part = name.split(".")[-2]
        return weights.load(name.replace(part, other.get(part, part)))

    return dataclasses.replace(weights, load=load)


def changed(name, change):
    return lambda weights: dataclasses.replace(
        weights, load=lambda asked: change(weights.load(asked)) if asked == name else weights.load(asked)
    )


def shaped(**changes):
    return lambda weights: dataclasses.replace(weights, shape=dataclasses.replace(weights.shape, **changes))


def without_head(weights):
    kinds = {name: kind for name, kind in weights.kinds.items() if name != "output.weight"}
    return dataclasses.replace(shaped(tied=True)(weights), kinds=kinds)


MUTANTS = {
    "permuted q": (changed("layers.1.attention.wq.weight", lambda w: to_interleaved(w, 4)), "layers.1.attention.wq"),
    "permuted k": (changed("layers.0.attention.wk.weight", lambda w: to_interleaved(w, 2)), "layers.0.attention.wk"),
    "swapped w1 and w3": (swap_gate_and_up, "layers.0.feed_forward.w1.weight"),
    "dropped head": (without_head, "tied"),
    "vocabulary off by one": (changed("tok_embeddings.weight", lambda w: w.roll(1, 0)), "tok_embeddings.weight"),
    "wrong theta": (shaped(rope_theta=10_000.0), "rope_theta"),
    "missing scaling": (shaped(rope_scaling=None), "rope_scaling"),
    "other scaling": (shaped(rope_scaling=RopeScaling(original_max_seq_len=32)), "rope_scaling"),
    "wrong norm_eps": (shaped(norm_eps=1e-6), "norm_eps"),
    "transposed wo": (changed("layers.0.attention.wo.weight", lambda w: w.T), "layers.0.attention.wo.weight"),
    "one value nudged": (changed("norm.weight", lambda w: torch.nextafter(w, torch.full((64,), 9.0))), "norm.weight"),
}


def through_the_command_line(monkeypatch, capsys, exported, tmp_path, form, write):
    monkeypatch.setattr(convert.FORMATS[form], "write", write)
    code = cli.main(["export", str(exported), "--out", str(tmp_path / "out"), "--format", form])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("llamita:")]
    assert code == 2 and len(said) == 1, said
    assert list(tmp_path.iterdir()) == []
    return said[0]


@pytest.mark.parametrize("form", ["hf", "meta", "gguf"])
@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_of_the_writers(exported, tmp_path, monkeypatch, capsys, form, mutant):
    change, word = MUTANTS[mutant]
    real = convert.FORMATS[form].write
    said = through_the_command_line(
        monkeypatch, capsys, exported, tmp_path, form, lambda weights, *rest: real(change(weights), *rest)
    )
    assert word in said


class WrongStops(Tokenizer):
    """Knows no <|eot_id|> as a stop, which is the field's commonest fault: replies never end."""

    def __init__(self):
        super().__init__(TOKENIZER.tokens)
        self.stop_ids = frozenset([self.eos_id])


def test_a_wrong_stop_in_the_configs(exported, tmp_path, monkeypatch, capsys):
    real = hf.write
    said = through_the_command_line(
        monkeypatch, capsys, exported, tmp_path, "hf",
        lambda weights, tokenizer, *rest: real(weights, WrongStops(), *rest),
    )  # fmt: skip
    assert "config.json" in said


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [
        ("tokenizer.ggml.eos_token_id", 0, "eos"),
        ("tokenizer.ggml.bos_token_id", 1, "bos"),
        ("tokenizer.ggml.add_bos_token", False, "bos"),
        ("tokenizer.chat_template", "{{ bos_token }}{{ bos_token }}", "chat template"),
    ],
)
def test_wrong_control_tokens_in_a_gguf_file(exported, tmp_path, monkeypatch, capsys, field, value, word):
    real = gguf.emit.gguf_fields
    monkeypatch.setattr(gguf.emit, "gguf_fields", lambda tokenizer: real(tokenizer) | {field: value})
    said = through_the_command_line(monkeypatch, capsys, exported, tmp_path, "gguf", gguf.write)
    assert word in said


# Spoiled files.


def nudge(tensors):
    tensors[Q][3, 5] = torch.nextafter(tensors[Q][3, 5], torch.tensor(9.0))


def drop_head(tensors):
    del tensors["lm_head.weight"]


@pytest.mark.parametrize(
    ("mutant", "words"),
    [(nudge, ["layers.1.attention.wq.weight", "1 values"]), (drop_head, ["lm_head.weight", "missing"])],
    ids=lambda mutant: getattr(mutant, "__name__", ""),
)
def test_mutants_of_the_file(folder, mutant, words):
    tensors = load_file(folder / "model.safetensors")
    mutant(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    fails(folder, *words)


def test_a_zero_of_the_other_sign(tmp_path):
    model = random_model()
    with torch.no_grad():
        model.norm.weight[0] = 0.0
    with replacing(tmp_path / "model") as new:
        hf.write(changed("norm.weight", lambda w: torch.where(w == 0, -w, w))(Weights.of(model)), TOKENIZER, new, "F32")
    fails(tmp_path / "model", "norm.weight", "1 values", weights=Weights.of(model))


def test_weights_that_are_not_finite(tmp_path):
    model = random_model()
    with torch.no_grad():
        model.norm.weight[0] = 1e6
    save(model, TOKENIZER, tmp_path / "model", dtype=torch.float16)
    fails(tmp_path / "model", "norm.weight", "not finite", weights=Weights.of(model), kind="F16")


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
        ("generation_config.json", dict(pad_token_id=7), ["generation settings"]),
        ("config.json", dict(dtype="bfloat16"), ["dtype"]),
        ("tokenizer_config.json", dict(chat_template=None), ["chat template"]),
    ],
)
def test_mutants_of_the_configs(folder, file, changes, words):
    edit(folder, file, **changes)
    fails(folder, *words)


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


@pytest.mark.parametrize("form", ["hf", "meta"])
def test_a_template_that_got_lost(tmp_path, form):
    with replacing(tmp_path / "m") as new:
        convert.FORMATS[form].write(WEIGHTS, TOKENIZER, new, "F32")
    edit(tmp_path / "m", "tokenizer_config.json", chat_template=None)
    fails(tmp_path / "m", "chat template", form=form)


@pytest.mark.parametrize(
    ("form", "kind"), [("hf", "BF16"), ("hf", "F16"), ("meta", "BF16"), ("gguf", "Q4_0"), ("gguf", "F16")]
)
def test_another_kind_than_was_asked_for(exported, tmp_path, monkeypatch, capsys, form, kind):
    real = convert.FORMATS[form].write
    said = through_the_command_line(
        monkeypatch,
        capsys,
        exported,
        tmp_path,
        form,
        lambda weights, tokenizer, new, _: real(weights, tokenizer, new, kind),
    )
    assert f"stored as {kind}, not as F32" in said or "dtype" in said


def test_a_huge_vocabulary_of_a_narrow_model_is_not_computed():
    wide = Shape(**(SHAPE.__dict__ | dict(dim=4, num_heads=2, num_kv_heads=1, vocab_size=1 << 21)))
    assert proof.memory_needed(wide) > 50 * 4.5 * wide.num_params


# From here on our own reader sees nothing wrong: only others can tell.


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(eos_token="<|eot_id|>"), ["bos, eos, pad"]),
        (dict(bos_token="<|end_of_text|>"), ["bos, eos, pad"]),
        (dict(pad_token="<|end_of_text|>"), ["bos, eos, pad"]),
    ],
)
def test_mutants_of_the_tokenizer_config(folder, changes, words):
    needs_transformers()
    edit(folder, "tokenizer_config.json", **changes)
    fails(folder, *words)


def test_two_bos_in_their_tokenizer(folder):
    needs_transformers()
    data = json.loads((folder / "tokenizer.json").read_text())
    single = data["post_processor"]["processors"][1]["single"]
    single.insert(0, single[0])
    (folder / "tokenizer.json").write_text(json.dumps(data))
    fails(folder, "tokenizers", "ids with BOS")


def test_another_split_in_their_tokenizer(folder):
    needs_transformers()
    data = json.loads((folder / "tokenizer.json").read_text())
    pattern = data["pre_tokenizer"]["pretokenizers"][0]["pattern"]
    pattern["Regex"] = pattern["Regex"].replace("{1,3}", "{1,2}")
    (folder / "tokenizer.json").write_text(json.dumps(data))
    fails(folder, "tokenizers", "ids of '1 12 123")


def test_a_template_of_another_dialog(folder, monkeypatch):
    """What is stated is spoiled on both sides, so that only the dialog itself can tell."""
    wrong = "{{ bos_token }}{{ messages[0]['content'] }}"
    edit(folder, "tokenizer_config.json", chat_template=wrong)
    monkeypatch.setattr(Tokenizer, "chat_template", wrong)
    fails(folder, "ids of a dialog")


def wrong_on_both_ways(monkeypatch, tmp_path, rows=None, table=None):
    """Write and read with the same fault: our reader undoes what our writer did wrong."""
    if table:
        monkeypatch.setattr(names, "TO_HF", names.TO_HF | table)
    weights = changed("layers.1.attention.wq.weight", rows)(WEIGHTS) if rows else WEIGHTS
    save_as = tmp_path / "model"
    with replacing(save_as) as new:
        hf.write(weights, TOKENIZER, new, "F32")
    if rows:
        read = hf.read
        undo = changed("layers.1.attention.wq.weight", lambda w: names.to_half_split(w, 4))
        monkeypatch.setattr(hf, "read", lambda folder: undo(read(folder)))
    fails(save_as, "transformers computes other logits", "bound")


def test_gate_and_up_exchanged_in_writer_and_reader(monkeypatch, tmp_path):
    needs_transformers()
    w1, w3 = "layers.{}.feed_forward.w1.weight", "layers.{}.feed_forward.w3.weight"
    wrong_on_both_ways(monkeypatch, tmp_path, table={w1: names.TO_HF[w3], w3: names.TO_HF[w1]})


def test_query_rows_permuted_in_writer_and_reader(monkeypatch, tmp_path):
    needs_transformers()
    wrong_on_both_ways(monkeypatch, tmp_path, rows=lambda weight: to_interleaved(weight, 4))


def test_a_name_that_only_we_know(monkeypatch, tmp_path):
    needs_transformers()
    monkeypatch.setattr(names, "TO_HF", names.TO_HF | {"norm.weight": "model.last_norm.weight"})
    save(MODEL, TOKENIZER, tmp_path / "model")
    fails(tmp_path / "model", "transformers cannot read", "norm.weight")


def test_a_file_that_only_they_read_is_broken(folder):
    needs_transformers()
    (folder / "tokenizer.json").write_text("{")
    fails(folder, "tokenizers cannot read tokenizer.json")


def test_scaling_forgotten_in_our_model(monkeypatch, folder):
    """Both our model and our reader leave rotary scaling out; config.json is right."""
    needs_transformers()
    from llamita.model import rope

    monkeypatch.setattr(rope, "scale", lambda freqs_P, scaling: freqs_P)
    fails(folder, "transformers computes other logits", weights=Weights.of(random_model()))


def reading(logits=None, reply=(5, 6, 7), margins=(1.0, 1.0, 1.0)):
    logits_BTV = torch.zeros(1, 2, 4) if logits is None else logits
    return readers.Reading(logits_BTV, list(reply), {"fact": 1}, list(margins))


def test_bounds_of_the_comparison():
    def compare(found, expected=None):
        return proof.compare("other", expected or reading(), found, 1e-4, 1e-8)

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
    tokens_BT = torch.full((1, 16), TOKENIZER.eos_id)
    whole = proof._of_llamita(MODEL, frozenset([TOKENIZER.eos_id]), tokens_BT).reply
    assert len(whole) == 16
    assert proof._of_llamita(MODEL, frozenset([whole[0]]), tokens_BT).reply == whole[:1]

"""Layer: files. Hugging Face folders written, read back, damaged, and refused."""

import errno
import json
import os
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llamita.formats import hf, meta, open
from llamita.formats.config_json import read_shape
from llamita.formats.names import hf_names
from llamita.formats.weights import Weights
from llamita.model.llama import build
from llamita.model.shape import RopeScaling, Shape
from llamita.tokenizer import Tokenizer
from tests.folders import save

TOKENIZER = Tokenizer([bytes([byte]) for byte in range(256)])
SCALING = RopeScaling(factor=4.0, original_max_seq_len=32)


def small(tied=True, scaling=None, seed=0, **changes):
    fields = dict(dim=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=48, vocab_size=512, max_seq_len=64)
    shape = Shape(**(fields | dict(tied=tied, rope_scaling=scaling) | changes))
    return build(shape).init_weights(seed)


@pytest.fixture
def folder(tmp_path):
    save(small(), TOKENIZER, tmp_path / "model")
    return tmp_path / "model"


def edit(folder, **changes):
    """Set config keys; None deletes."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(folder, *words, read=hf.read):
    with pytest.raises(ValueError) as error:
        read(folder)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [True, False])
def test_comes_back_bit_by_bit(tmp_path, tied, dtype):
    model = small(tied, SCALING)
    save(model, TOKENIZER, tmp_path / "model", dtype=dtype)
    loaded = hf.read(tmp_path / "model").model(dtype=None)
    assert loaded.shape == model.shape
    weights = dict(model.named_parameters())
    assert loaded.norm.weight.dtype == dtype
    for name, weight in loaded.named_parameters():
        assert torch.equal(weight, weights[name].to(dtype)), name
    assert (loaded.output.weight is loaded.tok_embeddings.weight) == tied
    assert hf.read(tmp_path / "model").model().norm.weight.dtype == torch.float32
    assert Tokenizer.load(tmp_path / "model").fingerprint == TOKENIZER.fingerprint


def test_what_lies_in_the_folder(tmp_path):
    save(small(scaling=SCALING), TOKENIZER, tmp_path / "model", dtype=torch.bfloat16)
    folder = tmp_path / "model"
    config = json.loads((folder / "config.json").read_text())
    scaling = dict(
        rope_type="llama3",
        factor=4.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=32,
    )
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["rope_theta"], config["rope_scaling"], config["torch_dtype"]) == (
        500_000.0,
        scaling,
        "bfloat16",
    )
    assert (config["rope_parameters"], config["dtype"]) == (scaling | {"rope_theta": 500_000.0}, "bfloat16")
    assert (config["head_dim"], config["max_position_embeddings"], config["tie_word_embeddings"]) == (
        8,
        64,
        True,
    )
    generation = json.loads((folder / "generation_config.json").read_text())
    assert config["bos_token_id"] == generation["bos_token_id"] == TOKENIZER.bos_id
    assert config["eos_token_id"] == generation["eos_token_id"] == sorted(TOKENIZER.stop_ids)
    assert len(generation["eos_token_id"]) == 3
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(hf_names(2, tied=True).values())
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    modes = {path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert len(modes) == 1, "whoever may read one file may read all"
    save(small(tied=False), TOKENIZER, folder)
    assert "lm_head.weight" in load_file(folder / "model.safetensors")
    assert json.loads((folder / "config.json").read_text())["rope_scaling"] is None


@pytest.mark.parametrize("scaling", [None, SCALING])
@pytest.mark.parametrize("dropped", ["version 5", "version 4", "nothing"])
def test_both_generations_of_keys(tmp_path, scaling, dropped):
    model = small(scaling=scaling, rope_theta=123_456.0)
    save(model, TOKENIZER, tmp_path / "model")
    keys = {
        "version 5": ("rope_parameters", "dtype"),
        "version 4": ("rope_theta", "rope_scaling", "torch_dtype"),
    }
    edit(tmp_path / "model", **dict.fromkeys(keys.get(dropped, ())))
    assert read_shape(tmp_path / "model") == model.shape
    edit(tmp_path / "model", rope_theta=10_000.0)
    if dropped == "nothing":
        refused(tmp_path / "model", "rope_parameters", "123456.0", "10000.0", read=read_shape)
    elif dropped == "version 5":
        assert read_shape(tmp_path / "model").rope_theta == 10_000.0


@pytest.mark.parametrize("scaling", [None, SCALING])
def test_null_states_nothing(tmp_path, scaling):
    model = small(scaling=scaling)
    save(model, TOKENIZER, tmp_path / "model")
    path = tmp_path / "model/config.json"
    config = json.loads(path.read_text()) | {"rope_scaling": None}
    path.write_text(json.dumps(config | {"rope_theta": None}))
    assert read_shape(tmp_path / "model") == model.shape
    path.write_text(json.dumps(config | {"rope_theta": 10_000.0}))
    refused(tmp_path / "model", "10000.0", "500000.0", read=read_shape)


def test_the_two_generations_must_agree_on_scaling(tmp_path):
    save(small(scaling=SCALING), TOKENIZER, tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    edit(tmp_path / "model", rope_scaling=config["rope_scaling"] | {"factor": 5.0})
    refused(tmp_path / "model", "rope_parameters", "factor=5.0")


def test_defaults_of_older_folders(folder):
    edit(folder, rope_theta=None, rope_scaling=None, rope_parameters=None, rms_norm_eps=None)
    edit(
        folder,
        num_key_value_heads=None,
        head_dim=None,
        tie_word_embeddings=None,
        max_position_embeddings=None,
    )
    shape = read_shape(folder)
    assert (shape.rope_theta, shape.rope_scaling, shape.norm_eps) == (10_000.0, None, 1e-6)
    assert (shape.num_kv_heads, shape.tied, shape.max_seq_len) == (4, False, 2048)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(architectures=["MistralForCausalLM"]), ["MistralForCausalLM"]),
        (dict(model_type="qwen3"), ["qwen3"]),
        (dict(attention_bias=True), ["attention_bias"]),
        (dict(mlp_bias=True), ["mlp_bias"]),
        (dict(hidden_act="gelu"), ["hidden_act", "gelu"]),
        (dict(quantization_config={"bits": 4}), ["quantization_config"]),
        (dict(head_dim=16), ["head_dim", "16", "8"]),
        (
            dict(rope_scaling={"rope_type": "yarn", "factor": 2.0}, rope_parameters=None),
            ["yarn", "rope_type"],
        ),
        (dict(rope_scaling={"type": "linear", "factor": 2.0}, rope_parameters=None), ["linear"]),
        (dict(rope_scaling={"rope_type": "llama3"}, rope_parameters=None), ["factor"]),
        (
            dict(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}),
            ["partial_rotary_factor"],
        ),
        (dict(rope_parameters="llama3"), ["rope_parameters"]),
        (dict(rope_theta=float("nan"), rope_parameters=None), ["rope_theta", "nan"]),
        (dict(hidden_size="32"), ["hidden_size", "'32'"]),
        (dict(hidden_size=True), ["hidden_size", "True"]),
        (dict(hidden_size=-32), ["hidden_size"]),
        (dict(vocab_size=1 << 60), ["vocab_size"]),
        (dict(num_hidden_layers=10**9), ["num_hidden_layers"]),
        (dict(intermediate_size=None), ["intermediate_size"]),
        (dict(num_key_value_heads=3), ["num_kv_heads"]),
    ],
)
def test_other_models_are_refused_with_the_reason(folder, changes, words):
    read_shape(folder)
    edit(folder, **changes)
    refused(folder, *words, read=read_shape)
    refused(folder, *words)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_a_config_that_is_none(folder, text):
    (folder / "config.json").write_bytes(text)
    refused(folder, "config.json")
    (folder / "config.json").unlink()
    refused(folder, "config.json")


def change_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


Q = "model.layers.1.self_attn.q_proj.weight"


def test_wrong_tensors_are_named(folder):
    change_weights(folder, lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.ones(48, 32)}))
    refused(folder, "model.layers.2.mlp.up_proj.weight")
    change_weights(folder, lambda t: t.pop("model.layers.2.mlp.up_proj.weight"))
    hf.read(folder)
    change_weights(folder, lambda t: t.update({Q: t[Q][:-1].contiguous()}))
    refused(folder, Q, "[31, 32]", "[32, 32]")
    change_weights(folder, lambda t: t.update({Q: torch.ones(32, 32, dtype=torch.int8)}))
    refused(folder, Q, "I8")
    change_weights(folder, lambda t: t.pop(Q))
    refused(folder, Q, "missing")


def test_an_untied_model_needs_its_head(tmp_path):
    save(small(tied=False), TOKENIZER, tmp_path / "model")
    edit(tmp_path / "model", tie_word_embeddings=True)
    refused(tmp_path / "model", "lm_head.weight")
    edit(tmp_path / "model", tie_word_embeddings=False)
    change_weights(tmp_path / "model", lambda t: t.pop("lm_head.weight"))
    refused(tmp_path / "model", "lm_head.weight", "missing")


@pytest.mark.parametrize("in_shards", [True, False])
def test_a_tied_head_may_be_stored_if_it_is_the_embeddings(folder, monkeypatch, in_shards):
    monkeypatch.setattr(hf, "ROWS", 100)
    before = hf.read(folder).load("tok_embeddings.weight")
    head = {"lm_head.weight": before.clone()}
    whole = (folder / "model.safetensors").read_bytes()

    def store():
        (folder / "model.safetensors").write_bytes(whole)
        change_weights(folder, lambda tensors: tensors.update(head))
        if in_shards:
            shard(folder, lambda name: "a" if "lm_head" in name else "b")

    store()
    weights = hf.read(folder)
    assert weights.shape.tied and "output.weight" not in weights.kinds
    for spoiled in (before.bfloat16(), before[:-1].clone(), before.clone()):
        head["lm_head.weight"] = spoiled
        spoiled[-3, 5] += 1
        store()
        refused(folder, "lm_head.weight", "tie_word_embeddings")


def test_rotary_buffers_of_older_folders_are_passed_over(folder):
    change_weights(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    hf.read(folder)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_file_cut_short(folder, kept):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    refused(folder, "model.safetensors", "cut short or damaged")


def shard(folder, place=lambda name: "a" if "layers.0" in name else "b"):
    tensors = load_file(folder / "model.safetensors")
    names = {name: f"{place(name)}.safetensors" for name in tensors}
    for file in set(names.values()):
        save_file({n: t for n, t in tensors.items() if names[n] == file}, folder / file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return names


def test_shards(folder):
    whole = hf.read(folder).model()
    names = shard(folder)
    for (name, weight), loaded in zip(whole.named_parameters(), hf.read(folder).model().parameters(), strict=True):
        assert torch.equal(weight, loaded), name
    shutil.copy(folder / "a.safetensors", folder / "c.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names | {"x": "c.safetensors"}}))
    refused(folder, "two shards")
    index.write_text(json.dumps({"weight_map": names}))
    (folder / "a.safetensors").unlink()
    refused(folder, "a.safetensors", "missing")


@pytest.mark.parametrize("name", ["../a.safetensors", "/etc/passwd", "sub/a.safetensors", "a.bin", "..", "", 3, None])
def test_shards_stay_in_the_folder(folder, name):
    names = shard(folder)
    shutil.copy(folder / "a.safetensors", folder.parent / "a.safetensors")
    names[Q] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    refused(folder, "same folder")


@pytest.mark.parametrize("name", [hf.WEIGHTS, hf.INDEX])
def test_a_folder_in_place_of_a_file(folder, name):
    (folder / "model.safetensors").unlink()
    (folder / name).mkdir()
    refused(folder, "holds neither")
    with pytest.raises(ValueError, match="cannot be read"), hf.opened(folder / name):
        pass


def test_a_config_beside_another_format(folder):
    """As in the original/ of Meta's repositories, and beside GGUF files on the hub."""
    config = (folder / "config.json").read_bytes()
    others = folder.parent / "others"
    others.mkdir()
    (others / "config.json").write_bytes(config)
    assert open.locate(others) == ("hf", others)
    refused(others, "holds neither", read=open.read)
    (others / "pytorch_model.bin").write_bytes(b"")
    refused(others, "pickled", read=open.read)
    (others / "model.gguf").write_bytes(b"GGUF")
    assert open.locate(others) == ("gguf", others / "model.gguf")
    meta.write(Weights.of(small()), TOKENIZER, others, "F32")
    assert open.locate(others) == ("meta", others) and open.read(others).shape == small().shape
    shutil.copy(folder / "model.safetensors", others)
    assert open.locate(others) == ("hf", others)
    (others / "config.json").unlink()
    assert open.locate(others) == ("meta", others)


def test_pickles_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "pickled")
    (folder / "pytorch_model.bin").unlink()
    refused(folder, "holds neither")


def fail_at(monkeypatch, owner, name, call=1):
    """The `call`-th use of a function meets a full disk."""
    real, calls = getattr(owner, name), []

    def failing(*arguments, **named):
        calls.append(name)
        if len(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments, **named)

    monkeypatch.setattr(owner, name, failing)


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (hf, "write_safetensors", 1),
        (hf, "write_json", 1),
        (hf, "write_json", 2),
        (Tokenizer, "save", 1),
        (os, "fsync", 3),
        (os, "replace", 5),  # three are the tokenizer's own files, one the proof; this moves the older folder away
        (os, "replace", 6),  # the new one does not come in
    ],
)
def test_a_full_disk_leaves_the_older_folder(folder, monkeypatch, owner, name, call):
    before = contents(folder)
    with monkeypatch.context() as broken, pytest.raises(OSError, match="No space"):
        fail_at(broken, owner, name, call)
        save(small(seed=1), TOKENIZER, folder)
    assert contents(folder) == before
    assert os.listdir(folder.parent) == ["model"], "nothing half-written stays"
    save(small(seed=1), TOKENIZER, folder)
    assert contents(folder) != before
    assert os.listdir(folder.parent) == ["model"]


def test_leftovers_of_a_killed_run_are_swept(folder):
    for name in (".model.tmp", ".model.old"):
        (folder.parent / name).mkdir()
        (folder.parent / name / "config.json").write_text("half")
    save(small(seed=1), TOKENIZER, folder)
    assert os.listdir(folder.parent) == ["model"]


def test_other_peoples_files_are_not_deleted(folder):
    save(small(seed=1), TOKENIZER, folder)
    (folder / "thesis.tex").write_text("years of work")
    before = contents(folder)
    with pytest.raises(ValueError, match=r"thesis\.tex"):
        save(small(seed=2), TOKENIZER, folder)
    assert contents(folder) == before and os.listdir(folder.parent) == ["model"]


def test_what_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match=r"512 tokens.*300"):
        save(small(vocab_size=300), TOKENIZER, tmp_path / "model")
    adapted = small()
    adapted.layers[0].attention.wq.register_parameter("lora_A", torch.nn.Parameter(torch.ones(1)))
    with pytest.raises(ValueError, match="lora_A"):
        save(adapted, TOKENIZER, tmp_path / "model")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file"):
        save(small(), TOKENIZER, tmp_path / "file")
    assert os.listdir(tmp_path) == ["file"]

"""Layer: files, parity. Meta's folders written, read by an independent forward pass, sharded, damaged, and refused."""

import dataclasses
import json
import os
import pickle
import random
import zipfile
import zlib

import pytest
import torch

from llamita.formats import meta, pth
from llamita.formats.weights import KINDS, Weights
from llamita.model.llama import build
from llamita.model.shape import PRESETS, RopeScaling, Shape
from llamita.tokenizer import Tokenizer, emit
from llamita.tokenizer.carried import CarriedTokenizer
from llamita.tokenizer.opened import open_tokenizer
from tests import meta_reference
from tests.weights import filled

TOKENIZER = Tokenizer([bytes([byte]) for byte in range(256)])
SHAPE = Shape(dim=64, num_layers=2, num_heads=8, num_kv_heads=4, ffn_dim=256, vocab_size=512, tied=False,
              rope_scaling=RopeScaling(), max_seq_len=131_072)  # fmt: skip
TOKENS = torch.arange(120) * 37 % 512
Q, K, W1, W3 = (f"layers.1.{name}.weight" for name in ("attention.wq", "attention.wk", "feed_forward.w1",
                                                       "feed_forward.w3"))  # fmt: skip
FILE = "consolidated.00.pth"


def model_of(shape=SHAPE):
    return filled(build(shape))


def written(folder, model, dtype=torch.float32, tokenizer=TOKENIZER):
    folder.mkdir()
    return meta.write(Weights.of(model), tokenizer, folder, KINDS[dtype])


@pytest.fixture
def folder(tmp_path):
    written(tmp_path / "model", model_of())
    return tmp_path / "model"


def state_of(folder):
    return torch.load(folder / FILE, weights_only=True)


def params_of(folder):
    return json.loads((folder / "params.json").read_text())


def edit(folder, file="params.json", **changes):
    """Set keys; None deletes."""
    data = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def same(weights, model, dtype=torch.float32):
    assert weights.kinds.keys() == dict(model.named_parameters()).keys()
    for name, weight in model.named_parameters():
        loaded = weights.load(name)
        assert loaded.dtype == dtype and torch.equal(loaded, weight.to(dtype)), name


def refused(folder, *words):
    with pytest.raises(ValueError) as error:
        meta.read(folder)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("changes", [{}, dict(tied=True, rope_scaling=None), dict(num_kv_heads=8, norm_eps=1e-6)])
def test_comes_back_bit_by_bit(tmp_path, changes, dtype):
    model = model_of(dataclasses.replace(SHAPE, **changes))
    written(tmp_path / "model", model, dtype)
    weights = meta.read(tmp_path / "model")
    assert weights.shape == model.shape and set(weights.kinds.values()) == {KINDS[dtype]}
    same(weights, model, dtype)
    assert Tokenizer.load(tmp_path / "model").fingerprint == TOKENIZER.fingerprint


@torch.no_grad()
@pytest.mark.parametrize(
    "changes", [{}, dict(tied=True), dict(rope_scaling=None, rope_theta=1e4), dict(num_kv_heads=1)]
)
def test_meta_s_own_forward_pass_gives_our_logits(tmp_path, changes):
    model = model_of(dataclasses.replace(SHAPE, **changes))
    written(tmp_path / "model", model)
    state, params = state_of(tmp_path / "model"), params_of(tmp_path / "model")
    ours = model(TOKENS[None])[0]
    assert (meta_reference.logits(state, params, TOKENS) - ours).abs().max() < 1e-4
    for mutant in (dict(rope_theta=2e4), dict(use_scaled_rope=not params["use_scaled_rope"])):
        assert (meta_reference.logits(state, params | mutant, TOKENS) - ours).abs().max() > 1e-3
    for name in (Q, K):  # as in our own order of rows
        heads = params["n_heads"] if name == Q else params["n_kv_heads"]
        spoiled = state | {name: meta.to_half_split(state[name], heads)}
        assert (meta_reference.logits(spoiled, params, TOKENS) - ours).abs().max() > 1e-3
    spoiled = state | {W1: state[W3], W3: state[W1]}
    assert (meta_reference.logits(spoiled, params, TOKENS) - ours).abs().max() > 1e-3


def test_other_readers_find_a_whole_zip(folder):
    """Converters read the zip on their own, and check its sums."""
    assert zipfile.ZipFile(folder / FILE).testzip() is None
    data, place = bytearray((folder / FILE).read_bytes()), pth.layout(folder / FILE)[Q]
    end = place.start + place.num_bytes
    assert data[end : end + 8] == b"PK\7\x08" + zlib.crc32(data[place.start : end]).to_bytes(4, "little")
    data[place.start] ^= 1
    (folder / FILE).write_bytes(data)
    assert zipfile.ZipFile(folder / FILE).testzip()
    assert list(state_of(folder)) == [*dict(model_of().named_parameters())]


def test_a_tied_head_is_written_for_meta_s_loader(tmp_path):
    written(tmp_path / "model", model_of(dataclasses.replace(SHAPE, tied=True)))
    state = state_of(tmp_path / "model")
    assert torch.equal(state["output.weight"], state["tok_embeddings.weight"])
    for sidecar in (True, False):
        if not sidecar:
            (tmp_path / "model/llamita.json").unlink()
        assert meta.read(tmp_path / "model").shape.tied
    state["output.weight"][-1, -1] += 1
    torch.save(state, tmp_path / "model" / FILE)
    assert not meta.read(tmp_path / "model").shape.tied
    del state["output.weight"]
    torch.save(state, tmp_path / "model" / FILE)
    assert meta.read(tmp_path / "model").shape.tied


def test_a_head_that_only_looks_tied_is_left_alone(tmp_path):
    model = model_of()
    with torch.no_grad():
        model.output.weight.copy_(model.tok_embeddings.weight)
    written(tmp_path / "model", model)
    assert not meta.read(tmp_path / "model").shape.tied  # llamita.json says so
    (tmp_path / "model/llamita.json").unlink()
    assert meta.read(tmp_path / "model").shape.tied


# Model-parallel shards


def split(folder, num_shards, llama2=False, spoil=lambda shards: None):
    """Cut the one shard as Meta's training did."""
    state, num_kv_heads = state_of(folder), params_of(folder)["n_kv_heads"]
    shards = [{} for _ in range(num_shards)]
    for name, tensor in state.items():
        which = name.split(".")[-2]
        axis = 1 if which in ("wo", "w2") or (llama2 and which == "tok_embeddings") else 0
        pieces = [tensor] * num_shards
        if "norm" not in which:
            pieces = tensor.chunk(num_shards, axis)
        if which in ("wk", "wv") and num_shards > num_kv_heads:
            heads = tensor.chunk(num_kv_heads)
            pieces = [heads[shard * num_kv_heads // num_shards] for shard in range(num_shards)]
        for shard, piece in zip(shards, pieces, strict=True):
            shard[name] = piece.clone()
    spoil(shards)
    for number, shard in enumerate(shards):
        torch.save(shard, folder / f"consolidated.{number:02}.pth")


@pytest.mark.parametrize("llama2", [True, False])
@pytest.mark.parametrize("num_shards", [2, 4, 8])
@pytest.mark.parametrize("tied", [True, False])
def test_shards_are_joined_bit_by_bit(tmp_path, tied, num_shards, llama2):
    model = model_of(dataclasses.replace(SHAPE, tied=tied))
    written(tmp_path / "model", model)
    split(tmp_path / "model", num_shards, llama2)
    (tmp_path / "model/llamita.json").unlink()
    edit(tmp_path / "model", vocab_size=-1)
    weights = meta.read(tmp_path / "model")
    assert weights.shape == model.shape
    same(weights, model)


def test_a_shard_that_is_missing_or_in_another_s_place(folder):
    split(folder, 4)
    model, paths = model_of(), [folder / f"consolidated.{shard:02}.pth" for shard in range(4)]
    paths[3].rename(folder / "kept")
    refused(folder, "3 shards", "missing")
    (folder / "kept").rename(paths[3])
    paths[1].rename(folder / "kept")
    refused(folder, "consolidated.01.pth")
    paths[2].rename(paths[1])
    (folder / "kept").rename(paths[2])
    with pytest.raises(AssertionError):
        same(meta.read(folder), model)


def nudge(name):
    def spoil(shards):
        shards[1][name].view(-1)[0] += 1

    return spoil


@pytest.mark.parametrize("name", ["layers.1.attention_norm.weight", "norm.weight", K, "layers.0.attention.wv.weight"])
def test_copies_that_differ_are_refused(folder, name):
    split(folder, 8, spoil=nudge(name))
    weights = meta.read(folder)
    with pytest.raises(ValueError, match=rf"consolidated\.01\.pth: tensor {name} is not the copy"):
        weights.load(name)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda shards: shards[1].pop(Q), ["consolidated.01.pth", Q, "missing"]),
        (lambda shards: shards[1].update(strange=torch.ones(3)), ["consolidated.01.pth", "strange"]),
        (lambda shards: shards[1].update({Q: shards[1][Q].half()}), ["consolidated.01.pth", Q, "float16"]),
        (lambda shards: shards[1].update({Q: shards[1][Q][:-1].clone()}), ["consolidated.01.pth", Q, "[31, 64]"]),
        (lambda shards: shards[0].update({Q: shards[0][Q].to(torch.int8)}), [Q, "int8"]),
        (lambda shards: shards[0].pop("tok_embeddings.weight"), ["tok_embeddings.weight", "missing"]),
        (lambda shards: shards[0].pop("output.weight"), ["consolidated.01.pth", "output.weight"]),
    ],
)
def test_shards_at_odds_are_refused(folder, spoil, words):
    split(folder, 2, spoil=spoil)
    refused(folder, *words)


def test_one_storage_for_many_tensors_and_old_rotary_tables(folder):
    """So Meta's shards are: views of a common storage, and in old files the rotary frequencies."""
    state = state_of(folder)
    store = torch.cat([tensor.flatten() for tensor in state.values()])
    ends = torch.tensor([tensor.numel() for tensor in state.values()]).cumsum(0)
    views = zip(state.items(), ends, strict=True)
    state = {name: store[end - tensor.numel() : end].view(tensor.shape) for (name, tensor), end in views}
    torch.save(state | {"rope.freqs": torch.ones(4)}, folder / FILE)
    same(meta.read(folder), model_of())


# params.json and llamita.json


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(quantization_args={"scheme": "int8"}), ["quantization_args"]),
        (dict(lora_args={"rank": 16}), ["lora_args"]),
        (dict(moe={"num_experts": 8}), ["moe"]),
        (dict(vision_chunk_size=448), ["vision_chunk_size"]),
        (dict(dim=None), ["dim"]),
        (dict(dim=10**12), ["dim"]),
        (dict(n_layers=10**6), ["n_layers"]),
        (dict(n_layers=4096), ["n_layers", "from 1 to 21"]),  # as many as there are tensors
        (dict(n_layers=3), ["layers.2.", "missing"]),
        (dict(n_layers=1), ["layers.1."]),
        (dict(n_heads=7), ["num_heads"]),
        (dict(n_kv_heads=2), ["layers.0.attention.wk.weight"]),
        (dict(vocab_size=511), ["vocab_size", "512"]),
        (dict(vocab_size="many"), ["vocab_size"]),
        (dict(multiple_of=512), ["multiple_of", "512", "256"]),
        (dict(ffn_dim_multiplier=1.9), ["ffn_dim_multiplier"]),
        (dict(ffn_dim_multiplier=1e308), ["ffn_dim_multiplier"]),
        (dict(norm_eps=0), ["norm_eps"]),
        (dict(rope_theta=float("inf")), ["rope_theta"]),
        (dict(use_scaled_rope=1), ["use_scaled_rope"]),
        (dict(use_scaled_rope=False), ["rope_scaling", "llamita.json"]),
        (dict(rope_theta=1e4), ["rope_theta", "llamita.json"]),
        (dict(norm_eps=1e-6), ["norm_eps", "llamita.json"]),
    ],
)
def test_params_that_are_none_of_a_plain_llama(folder, changes, words):
    edit(folder, **changes)
    refused(folder, *words)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        (dict(num_layers=3), "num_layers"),
        (dict(tied=True), "tied"),
        (dict(max_seq_len=0), "max_seq_len"),
        (dict(rope_scaling=None), "rope_scaling"),
        (dict(rope_scaling="llama3"), "rope_scaling"),
        (dict(rope_scaling=dict(factor=8.0)), "low_freq_factor"),
        (dict(strange=1), "strange"),
    ],
)
def test_a_sidecar_at_odds(folder, changes, word):
    edit(folder, "llamita.json", **changes)
    refused(folder, "llamita.json", word)


def test_the_sidecar_has_the_last_word(tmp_path):
    scaling = RopeScaling(factor=32.0, original_max_seq_len=64)
    model = model_of(dataclasses.replace(SHAPE, rope_scaling=scaling, max_seq_len=2048))
    warnings = written(tmp_path / "model", model)
    assert meta.read(tmp_path / "model").shape == model.shape
    assert "RopeScaling(factor=32.0" in warnings[0] and "2048 tokens" in warnings[1] and len(warnings) == 2
    (tmp_path / "model/llamita.json").unlink()
    assert meta.read(tmp_path / "model").shape == SHAPE


def test_what_is_usual_where_nothing_is_said():
    def usual(**changes):
        shape = meta._usual(dataclasses.replace(SHAPE, max_seq_len=1, **changes))
        return shape.rope_scaling, shape.max_seq_len

    assert usual() == (RopeScaling(), 131_072)
    assert usual(rope_scaling=None) == (None, 8192)
    assert usual(rope_scaling=None, rope_theta=1e4) == (None, 4096)
    assert usual(rope_scaling=None, rope_theta=1e4, norm_eps=1e-6) == (None, 2048)
    for name in ("llama3-8b", "llama3.1-8b", "llama3.1-405b", "llama3.2-1b", "llama3.2-3b"):
        told = PRESETS[name].rope_scaling and RopeScaling()  # all that params.json says
        assert meta._usual(dataclasses.replace(PRESETS[name], rope_scaling=told, max_seq_len=1)) == PRESETS[name]


def test_old_params_have_old_defaults(tmp_path):
    shape = dataclasses.replace(SHAPE, num_kv_heads=8, rope_theta=1e4, rope_scaling=None, max_seq_len=4096)
    written(tmp_path / "model", model_of(shape))
    (tmp_path / "model/llamita.json").unlink()
    old = {"dim": 64, "multiple_of": 256, "n_heads": 8, "n_layers": 2, "norm_eps": 1e-5, "vocab_size": -1}
    (tmp_path / "model/params.json").write_text(json.dumps(old))
    assert meta.read(tmp_path / "model").shape == shape


def test_meta_s_rule_gives_every_ffn_dim():
    def hidden(dim, multiple_of, multiplier):  # in Meta's own order of roundings
        size = int(multiplier * int(2 * (4 * dim) / 3))
        return multiple_of * ((size + multiple_of - 1) // multiple_of)

    shapes = [*PRESETS.values(), *(dataclasses.replace(SHAPE, dim=dim, ffn_dim=ffn_dim)
                                   for dim in (16, 64, 576, 4096) for ffn_dim in range(1, 3 * dim, 7))]  # fmt: skip
    for shape in shapes:
        params = meta._params(shape)
        assert hidden(shape.dim, params["multiple_of"], params["ffn_dim_multiplier"]) == shape.ffn_dim, shape
    assert hidden(4096, 1024, 1.3) == 14_336 and hidden(8192, 4096, 1.3) == 28_672  # as Meta's own 8B and 70B say


def test_what_meta_s_code_cannot_read_is_said(tmp_path):
    class Foreign:
        vocab_size, bos_id, pad_id, stop_ids = 300, None, None, frozenset([2])

        def save(self, folder):
            (folder / "tokenizer.json").write_text("{}")

    assert written(tmp_path / "own", model_of()) == []
    warnings = written(tmp_path / "foreign", model_of(), tokenizer=Foreign())
    assert "tokenizer.model" in warnings[0] and "300 tokens and 512 rows" in warnings[1] and len(warnings) == 2
    assert (tmp_path / "foreign/tokenizer.json").exists()


def test_a_carried_tokenizer_keeps_its_stop_ids(tmp_path):
    content = emit.tokenizer_json(TOKENIZER)
    content["added_tokens"][-1]["content"] = "<|strange|>"  # so that it is no Llama 3 vocabulary
    eos_id, other = TOKENIZER.eos_id, TOKENIZER.vocab_size - 1
    carried = CarriedTokenizer(content, bos_id=TOKENIZER.bos_id, eos_id=eos_id, stop_ids=[eos_id, other], adds_bos=True)
    written(tmp_path / "model", model_of(), tokenizer=carried)
    assert other in carried.stop_ids and open_tokenizer(tmp_path / "model").stop_ids == carried.stop_ids
    (tmp_path / "model/generation_config.json").unlink()
    assert other not in open_tokenizer(tmp_path / "model").stop_ids


# Files of strangers


class Malicious:
    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return os.mkdir, (self.canary,)


class Huge:
    def __reduce__(self):
        return bytearray, (1 << 44,)


def test_no_pickle_runs_code(folder, tmp_path):
    canary, path = tmp_path / "canary", folder / FILE
    torch.save({"norm.weight": torch.ones(64), "x": Malicious(canary)}, path)
    refused(folder, FILE, "posix mkdir")
    path.write_bytes(pickle.dumps({"x": Malicious(canary)}))
    refused(folder, FILE, "no .pth file")
    torch.save({"x": Malicious(canary)}, path, _use_new_zipfile_serialization=False)
    refused(folder, FILE, "no .pth file")
    assert not canary.exists()
    torch.load(path, weights_only=False)
    assert canary.exists()  # the control: so it would have run
    torch.save({"x": Huge()}, path)
    refused(folder, FILE, "bytearray")


def rezipped(path, drop=(), how=zipfile.ZIP_STORED, **entries):
    """The archive written again by Python, with other contents under some names."""
    with zipfile.ZipFile(path) as archive:
        data = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, content in data.items():
            if (short := name.partition("/")[2]) not in drop:
                archive.writestr(name, entries.get(short, content))


def test_archives_of_other_makes(folder):
    again = folder.parent / "again"
    rezipped(folder / FILE)  # without the gaps that torch.save leaves
    refused(folder, "packed anew", Q.replace("1", "0"))
    written(again, model_of())
    rezipped(again / FILE, drop=[".format_version", ".storage_alignment"])  # which older PyTorch does not write
    same(meta.read(again), model_of())
    for spoil, word in (dict(byteorder=b"big"), "little-endian"), (dict(how=zipfile.ZIP_DEFLATED), "compressed"):
        rezipped(again / FILE, **spoil)
        refused(again, word)


def test_no_file_promises_more_than_it_holds(folder):
    state = state_of(folder)
    for promise, word in (
        ({Q: torch.zeros(1).expand(64, 64)}, "one behind the other"),
        ({Q: state[Q].T}, "one behind the other"),
        (dict.fromkeys(state, torch.ones(512, 64)), "share their values"),
        ({Q: [1, 2]}, "no tensor"),
    ):
        torch.save(state | promise, folder / FILE)
        refused(folder, word)
    torch.save([1], folder / FILE)
    refused(folder, "no state dict")


@pytest.mark.parametrize("file", [FILE, "params.json", "llamita.json"])
def test_any_damage_is_read_or_refused_in_one_line(folder, file):
    path, draw = folder / file, random.Random(0)
    whole = path.read_bytes()
    tail = 30 * len(state_of(folder)) if file == FILE else len(whole)
    for _ in range(150):
        data = bytearray(whole)
        if draw.random() < 0.2:
            del data[draw.randrange(len(data)) :]
        else:
            place = draw.choice((draw.randrange(min(len(data), 4000)), len(data) - 1 - draw.randrange(tail)))
            data[place] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        try:
            weights = meta.read(folder)
            [weights.load(name) for name in weights.kinds]
        except ValueError as error:
            assert "\n" not in str(error)


def test_folders_without_weights_or_params(folder):
    (folder / "params.json").rename(folder / "kept")
    refused(folder, "params.json")
    (folder / "kept").rename(folder / "params.json")
    (folder / FILE).unlink()
    refused(folder, FILE)

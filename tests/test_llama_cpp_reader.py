"""Layer: parity with others. llama.cpp reads a file as we do, tells a spoiled one by its logits, and quantizes."""

import subprocess
from pathlib import Path

import gguf as gguf_py
import pytest
import torch

from llamita.formats import gguf, llama_cpp
from llamita.formats.gguf_header import read_header
from llamita.formats.names import to_interleaved
from llamita.model import rope
from llamita.model.llama import build
from llamita.model.shape import RopeScaling, Shape
from llamita.tokenizer import Tokenizer, emit
from llamita.tokenizer.chat import render
from tests.weights import filled

peer = pytest.mark.peer
TOKENIZER = Tokenizer([*(bytes([byte]) for byte in range(256)), b"th", b" th", b"he", b" the", b"12", b"123", b"  "])
SCALING = RopeScaling(original_max_seq_len=16)
TEXTS = ["the  123 <|eot_id|>\n", " ", "", "naïve 👍\x00"]
MESSAGES = [{"role": "user", "content": "the 12?"}]
SMOLLM2 = Path(__file__).parents[1] / ".venv/smollm2"
BOUND = 5e-4
FIELDS = emit.gguf_fields(TOKENIZER)


@pytest.fixture(autouse=True)
def installed(request):
    if request.node.get_closest_marker("peer") and not llama_cpp.version():
        pytest.skip("llama-cpp-python is not installed: run `make .venv/peers`")


def random_model(**changes):
    """Weights large enough that the logits' std is near 1, and a mistake is seen in them."""
    shape = dict(
        dim=64, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=96, vocab_size=TOKENIZER.vocab_size, tied=False,
        max_seq_len=128, rope_scaling=SCALING,
    )  # fmt: skip
    return filled(build(Shape(**(shape | changes))))


def written(path, model, permuted=True, scaled=True, fields=FIELDS):
    """A GGUF file by the gguf library alone, F32."""
    shape, names = model.shape, gguf_py.get_tensor_name_map(gguf_py.MODEL_ARCH.LLAMA, model.shape.num_layers)
    writer = gguf_py.GGUFWriter(path, "llama")
    writer.add_vocab_size(shape.vocab_size)
    writer.add_context_length(shape.max_seq_len)
    writer.add_embedding_length(shape.dim)
    writer.add_block_count(shape.num_layers)
    writer.add_feed_forward_length(shape.ffn_dim)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_rope_freq_base(shape.rope_theta)
    for key, value in fields.items():
        add = {list: "array", bool: "bool", int: "uint32", str: "string"}[type(value)]
        getattr(writer, f"add_{add}")(key, value)
    if scaled and shape.rope_scaling:
        plain = rope.frequencies(Shape(**(shape.__dict__ | dict(rope_scaling=None))))
        writer.add_tensor("rope_freqs.weight", (plain / rope.frequencies(shape)).float().numpy())
    heads = {"wq": shape.num_heads, "wk": shape.num_kv_heads}
    for name, weight in model.named_parameters():
        count = heads.get(name.split(".")[-2]) if permuted else None
        data = to_interleaved(weight.detach(), count) if count else weight.detach()
        writer.add_tensor(names.get_name(name, (".weight",)), data.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def rows(model, length=64):
    return torch.randint(model.shape.vocab_size, (2, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def distance(model, answer):
    """Of the exact logits from ours, and the mean KL divergence of those that the file gives as it is."""
    ours = model(rows(model))
    log_p, log_q = (x.double().log_softmax(-1) for x in (ours, answer.logits_BTV))
    return float((ours - answer.exact_BTV).abs().max()), float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def ask(path, model):
    return llama_cpp.ask(path, rows(model), 8, 16, TEXTS, MESSAGES)


@peer
@pytest.mark.parametrize("changes", [{}, dict(tied=True, rope_scaling=None, rope_theta=10_000.0)])
def test_a_file_of_the_gguf_library(tmp_path, changes):
    model = random_model(**changes)
    found = ask(written(tmp_path / "a.gguf", model), model)
    assert 0 < distance(model, found)[0] <= BOUND and torch.equal(found.exact_BTV, found.logits_BTV)
    row = rows(model)[:1, :8]
    for token in found.reply:
        with torch.no_grad():
            assert token == int(model(row)[0, -1].argmax())
        row = torch.cat((row, torch.tensor([[token]])), dim=1)
    assert len(found.reply) == 16
    assert found.ids == [TOKENIZER.encode(text) for text in TEXTS]
    assert found.ids_with_bos == [TOKENIZER.encode(text, bos=True) for text in TEXTS]
    assert found.texts == TEXTS
    assert found.dialog == render(TOKENIZER, MESSAGES, reply=True)[0] and found.dialog.count(found.bos_id) == 1
    assert found.chat_template == TOKENIZER.chat_template
    assert (found.bos_id, found.eos_id, found.adds_bos) == (TOKENIZER.bos_id, TOKENIZER.eos_id, True)
    assert found.stop_ids == sorted(TOKENIZER.stop_ids) and {found.eot_id, found.eos_id} <= TOKENIZER.stop_ids
    assert found.num_tokens == model.shape.vocab_size and found.max_seq_len == 128
    assert found.rope_theta == model.shape.rope_theta
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


@peer
@pytest.mark.parametrize("fault", [dict(permuted=False), dict(scaled=False)])
def test_a_spoiled_file_gives_other_logits(tmp_path, fault):
    model = random_model()
    assert distance(model, ask(written(tmp_path / "a.gguf", model, **fault), model))[0] > 0.1


@peer
def test_a_reply_ends_at_a_stop(tmp_path):
    model = random_model()
    first, second = ask(written(tmp_path / "a.gguf", model), model).reply[:2]
    found = ask(written(tmp_path / "b.gguf", model, fields=FIELDS | {"tokenizer.ggml.eot_token_id": second}), model)
    assert found.reply == [first, second] and second in found.stop_ids


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


def other_end(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def many_tokens(path):
    data = bytearray(path.read_bytes())
    at = data.index(b"tokenizer.ggml.merges") + len(b"tokenizer.ggml.merges") + 8
    data[at : at + 8] = (1 << 60).to_bytes(8, "little")
    path.write_bytes(data)


@peer
@pytest.mark.parametrize("damage", [cut, other_end, many_tokens])
def test_a_damaged_file_is_one_line(tmp_path, damage):
    """Past our reader, which refuses it before."""
    path = written(tmp_path / "a.gguf", random_model())
    damage(path)
    with pytest.raises(ValueError) as error:
        llama_cpp.quantize(path, tmp_path / "b.gguf", "Q4_K_M")
    assert str(error.value).startswith(f"llama.cpp fails on {path} -> ") and "\n" not in str(error.value)


@peer
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokenizer.ggml.model": "nonsense"}, "unknown tokenizer"),
        ({"tokenizer.ggml.tokens": ["a", "b"]}, "wrong shape"),
        ({"tokenizer.chat_template": "{% if %}"}, "Expected an expression"),
    ],
)
def test_what_llama_cpp_refuses(tmp_path, changes, words):
    model = random_model()
    path = written(tmp_path / "a.gguf", model, fields=FIELDS | changes)
    with pytest.raises(ValueError, match=words) as error:
        ask(path, model)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        (b"error: first\nerror: second\nTraceback\nValueError: last\n", "first"),
        (b"ggml.c:12: GGML_ASSERT(n > 0) failed\n\n", "ggml.c:12: GGML_ASSERT(n > 0) failed"),
        (b"", "it ended with -6"),
    ],
)
def test_an_end_by_abort_is_one_line(tmp_path, monkeypatch, stderr, reason):
    monkeypatch.setattr(llama_cpp, "version", lambda: "1")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], -6, b"", stderr))
    with pytest.raises(ValueError) as error:
        llama_cpp.quantize(tmp_path / "a.gguf", tmp_path / "b.gguf", "Q4_K_M")
    assert str(error.value) == f"llama.cpp fails on {tmp_path / 'a.gguf'} -> {tmp_path / 'b.gguf'}: {reason}"


@peer
@pytest.mark.parametrize("kind", list(llama_cpp.QUANTIZERS))
def test_quantizing(tmp_path, kind):
    """A model with every width a multiple of 256: llama.cpp unpacks the blocks to the floats that we read."""
    model = random_model(dim=256, ffn_dim=512, rope_scaling=None)
    assert llama_cpp.quantize(written(tmp_path / "a.gguf", model), tmp_path / "b.gguf", kind) == []
    weights = gguf.read(tmp_path / "b.gguf")
    kinds = {stored for name, stored in weights.kinds.items() if "norm" not in name}
    assert kind[:4] in kinds and kinds <= {"Q4_K", "Q5_K", "Q6_K"}
    found = ask(tmp_path / "b.gguf", model)
    exact, kl = distance(weights.model(), found)
    assert 0 < exact <= BOUND and 1e-8 < kl < 0.01
    assert distance(model, found)[0] > 0.1


@peer
def test_rows_of_other_widths_are_told(tmp_path):
    source = written(tmp_path / "a.gguf", random_model(dim=64, ffn_dim=96))
    told = llama_cpp.quantize(source, tmp_path / "b.gguf", "Q4_K_M")
    assert len(told) > 1 and all("multiple of 256" in line and "\n" not in line for line in told)


@peer
def test_smollm2():
    """The file of someone else, SmolLM2 135M as Q4_1: llama.cpp's logits within rounding of ours."""
    if not (files := sorted(SMOLLM2.glob("**/*.gguf"))):
        pytest.skip("SmolLM2 does not lie in .venv/smollm2: run `make .venv/peers`")
    model = gguf.read(files[0]).model()
    exact, kl = distance(model, ask(files[0], model))
    assert exact <= BOUND and 1e-4 < kl < 0.02


@peer
def test_a_sentencepiece_vocabulary(tmp_path, shared_data):
    """Its texts begin with a blank of the vocabulary's own, which is no text."""
    fields, _ = read_header(shared_data / "tokenizers/ggml-vocab-llama-spm.gguf")
    fields = {key: value for key, value in fields.items() if key.startswith("tokenizer.")}
    model = random_model(vocab_size=len(fields["tokenizer.ggml.tokens"]))
    found = ask(written(tmp_path / "a.gguf", model, fields=fields), model)
    assert found.texts == TEXTS and found.dialog is None
    assert found.adds_bos and all(row[0] == 1 for row in found.ids_with_bos)


def test_without_llama_cpp(tmp_path, monkeypatch):
    monkeypatch.setattr(llama_cpp, "version", lambda: None)
    monkeypatch.setattr(subprocess, "run", None)
    with pytest.raises(ValueError, match="pip install llama-cpp-python"):
        llama_cpp.quantize(tmp_path / "a.gguf", tmp_path / "b.gguf", "Q4_K_M")

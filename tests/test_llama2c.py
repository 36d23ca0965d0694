"""Layer: parity with others. The 260K model of llama2.c says what llama2.c's own test expects, byte for byte."""

import struct
from types import SimpleNamespace

import pytest
import torch

from llamita.formats import llama2c
from llamita.formats.names import to_interleaved
from llamita.model.llama import build
from llamita.model.shape import Shape
from llamita.serve.engine import Engine, Sampling

BOS, NUM_STEPS = 1, 200


@pytest.fixture(scope="module")
def weights(shared_data):
    return shared_data / "weights"


@pytest.fixture(scope="module")
def vocab(weights):
    return llama2c.read_vocab(weights / "tok512.bin", 512)


@pytest.fixture(scope="module")
def expected(weights):
    return (weights / "stories260K_expected_greedy.txt").read_bytes()


def engine(model, vocab) -> Engine:
    """llama2.c's decoder as an engine's tokenizer: BOS alone ends the text."""
    tokenizer = SimpleNamespace(
        vocab_size=len(vocab),
        bos_id=BOS,
        stop_ids=frozenset([BOS]),
        specials={},
        decode_bytes=lambda tokens: b"".join(vocab[token] for token in tokens),
    )
    return Engine(model, tokenizer)


def greedy(model, vocab) -> tuple[bytes, list[int]]:
    [completion] = engine(model, vocab).complete([[]], Sampling(temperature=0, max_tokens=NUM_STEPS))
    return completion.text.encode().removeprefix(b" "), completion.tokens


def test_stories_through_the_engine(weights, vocab, expected):
    assert greedy(llama2c.read(weights / "stories260K.bin"), vocab)[0] == expected


@torch.no_grad()
def test_stories_without_a_cache(weights, vocab, expected):
    model, tokens = llama2c.read(weights / "stories260K.bin"), [BOS]
    for _ in range(NUM_STEPS):
        tokens.append(model(torch.tensor([tokens]))[0, -1].argmax().item())
    text = b"".join(vocab[token] for token in tokens[1:])
    assert text.removeprefix(b" ") == expected
    assert greedy(model, vocab)[1] == tokens[1:]


def test_negative_control_unpermuted_rows_say_something_else(weights, vocab, expected, monkeypatch):
    monkeypatch.setattr(llama2c, "to_half_split", lambda weight, num_heads: weight)
    assert greedy(llama2c.read(weights / "stories260K.bin"), vocab)[0] != expected


def test_stories_shape(weights):
    shape = llama2c.read(weights / "stories260K.bin").shape
    assert (shape.dim, shape.num_layers, shape.num_heads, shape.num_kv_heads) == (64, 5, 8, 4)
    assert (shape.ffn_dim, shape.vocab_size, shape.max_seq_len, shape.tied) == (172, 512, 512, True)
    assert shape.rope_theta == 10_000


def file_of(model) -> bytes:
    """The model as llama2.c's version 0 writes it."""
    shape, state = model.shape, model.state_dict()
    vocab_size = shape.vocab_size if shape.tied else -shape.vocab_size
    sizes = (shape.dim, shape.ffn_dim, shape.num_layers, shape.num_heads, shape.num_kv_heads)
    kinds = ["attention_norm", *(f"attention.w{which}" for which in "qkvo")]
    kinds += ["ffn_norm", *(f"feed_forward.w{which}" for which in "123")]
    parts = [state["tok_embeddings.weight"]]
    for kind in kinds:
        heads = {"attention.wq": shape.num_heads, "attention.wk": shape.num_kv_heads}.get(kind)
        for layer in range(shape.num_layers):
            weight = state[f"layers.{layer}.{kind}.weight"]
            parts.append(to_interleaved(weight, heads) if heads else weight)
    parts += [state["norm.weight"], torch.full((shape.max_seq_len * shape.head_dim,), 7.0)]
    parts += [] if shape.tied else [state["output.weight"]]
    header = struct.pack("<7i", *sizes, vocab_size, shape.max_seq_len)
    return header + b"".join(part.numpy().astype("<f4").tobytes() for part in parts)


def small(tied: bool):
    shape = Shape(
        dim=16,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        ffn_dim=24,
        vocab_size=20,
        max_seq_len=8,
        tied=tied,
        rope_theta=1e4,
    )
    return build(shape).init_weights(torch.Generator().manual_seed(0))


@pytest.mark.parametrize("tied", [True, False])
def test_every_weight_comes_back(tied, tmp_path):
    model = small(tied)
    (tmp_path / "model.bin").write_bytes(file_of(model))
    again = llama2c.read(tmp_path / "model.bin")
    assert again.shape == model.shape
    assert (again.output.weight is again.tok_embeddings.weight) == tied
    state = again.state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(state[name], weight), name


def header(*changes: tuple[int, int]) -> bytes:
    data = bytearray(file_of(small(tied=True)))
    for place, value in changes:
        struct.pack_into("<i", data, 4 * place, value)
    return bytes(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        header()[:27],
        header()[:28],
        header()[:-1],
        header() + b"\0",
        header((0, 0)),
        header((0, -16)),
        header((2, 2**31 - 1)),
        header((5, -20)),
        header((5, -(2**31))),
        header((3, 3)),
        header((4, 3)),
        header((6, 0)),
        header((0, 0x616B3432)),
        b"GGUF" + bytes(100),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(data, tmp_path):
    (tmp_path / "model.bin").write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.bin is no .*llama2\.c version 0 model") as error:
        llama2c.read(tmp_path / "model.bin")
    assert "\n" not in str(error.value)


def vocab_file(*pieces: bytes) -> bytes:
    return struct.pack("<i", 6) + b"".join(struct.pack("<fi", 0.0, len(piece)) + piece for piece in pieces)


def test_vocab_pieces_and_bytes(tmp_path):
    path = tmp_path / "tokenizer.bin"
    path.write_bytes(vocab_file(b" a", b"<0x0A>", b"", b"<0xZZ>", b"<0xFF>"))
    assert llama2c.read_vocab(path, 5) == [b" a", b"\n", b"", b"<0xZZ>", b"\xff"]
    with pytest.raises(ValueError, match="is the vocabulary larger"):
        llama2c.read_vocab(path, 4)


@pytest.mark.parametrize(
    "data", [b"", vocab_file(b"a")[:-1], vocab_file(b"a")[:9], vocab_file(b"a")[:8] + struct.pack("<i", -1)]
)
def test_a_damaged_vocab_is_refused(data, tmp_path):
    (tmp_path / "tokenizer.bin").write_bytes(data)
    with pytest.raises(ValueError, match="breaks at token 0"):
        llama2c.read_vocab(tmp_path / "tokenizer.bin", 1)

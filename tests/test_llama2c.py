"""Layer: parity with others. The 260K model of llama2.c says what llama2.c's own test expects, byte for byte."""

import random
import struct
from types import SimpleNamespace

import pytest
import torch

from llamita.formats import llama2c
from llamita.formats.names import to_interleaved
from llamita.model.llama import build
from llamita.model.shape import Shape
from llamita.serve.engine import Engine, Sampling
from llamita.tokenizer.pieces import from_llama2c

BOS, NUM_STEPS = 1, 200


@pytest.fixture(scope="module")
def weights(shared_data):
    return shared_data / "weights"


@pytest.fixture(scope="module")
def vocab(weights):
    tokenizer = from_llama2c(weights / "tok512.bin", 512)
    return [tokenizer.token_bytes(token) for token in range(512)]


@pytest.fixture(scope="module")
def expected(weights):
    return (weights / "stories260K_expected_greedy.txt").read_bytes()


def stories(weights):
    return llama2c.read(weights / "stories260K.bin").model()


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
    assert greedy(stories(weights), vocab)[0] == expected


@torch.no_grad()
def test_stories_without_a_cache(weights, vocab, expected):
    model, tokens = stories(weights), [BOS]
    for _ in range(NUM_STEPS):
        tokens.append(model(torch.tensor([tokens]))[0, -1].argmax().item())
    text = b"".join(vocab[token] for token in tokens[1:])
    assert text.removeprefix(b" ") == expected
    assert greedy(model, vocab)[1] == tokens[1:]


def test_negative_control_unpermuted_rows_say_something_else(weights, vocab, expected, monkeypatch):
    monkeypatch.setattr(llama2c, "to_half_split", lambda weight, num_heads: weight)
    assert greedy(stories(weights), vocab)[0] != expected


def test_stories_shape(weights):
    shape = llama2c.read(weights / "stories260K.bin").shape
    assert (shape.dim, shape.num_layers, shape.num_heads, shape.num_kv_heads) == (64, 5, 8, 4)
    assert (shape.ffn_dim, shape.vocab_size, shape.max_seq_len, shape.tied) == (172, 512, 512, True)
    assert shape.rope_theta == 10_000


GROUP = 8


def parts_of(model, order):
    """The weights of each kind, layer by layer, rotary rows in llama2.c's order."""
    shape, state = model.shape, model.state_dict()
    for kind in order:
        heads = {"attention.wq": shape.num_heads, "attention.wk": shape.num_kv_heads}.get(kind)
        if kind in ("tok_embeddings", "norm", "output"):
            yield state[f"{kind}.weight"]
        elif kind == "rotary":
            yield torch.full((shape.max_seq_len * shape.head_dim,), 7.0)
        else:
            for layer in range(shape.num_layers):
                weight = state[f"layers.{layer}.{kind}.weight"]
                yield to_interleaved(weight, heads) if heads else weight


def floats(tensor) -> bytes:
    return tensor.numpy().astype("<f4").tobytes()


def quantized(weight) -> tuple[torch.Tensor, torch.Tensor]:
    groups = weight.reshape(-1, GROUP)
    scales = groups.abs().amax(1) / 127
    return (groups / scales[:, None]).round().to(torch.int8), scales


def file_of(model, version=0) -> bytes:
    """The model as llama2.c's export.py writes it."""
    shape = model.shape
    attention, ffn = [f"attention.w{which}" for which in "qkvo"], [f"feed_forward.w{which}" for which in "123"]
    tail = [] if shape.tied else ["output"]
    vocab_size = -shape.vocab_size if tail and version == 0 else shape.vocab_size
    sizes = (shape.dim, shape.ffn_dim, shape.num_layers, shape.num_heads, shape.num_kv_heads, vocab_size)
    header = struct.pack("<7i", *sizes, shape.max_seq_len)
    order = ["attention_norm", "ffn_norm", "norm", "tok_embeddings", *attention, *ffn, *tail]
    if version == 0:
        order = ["tok_embeddings", "attention_norm", *attention, "ffn_norm", *ffn, "norm", "rotary", *tail]
    else:
        flags = struct.pack("<B", shape.tied) + (struct.pack("<i", GROUP) if version == 2 else b"")
        header = (struct.pack("<Ii", 0x616B3432, version) + header + flags).ljust(256, b"\0")
    data = header
    for part in parts_of(model, order):
        if version == 2 and part.ndim == 2:
            values, scales = quantized(part)
            data += values.numpy().tobytes() + floats(scales)
        else:
            data += floats(part)
    return data


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
    return build(shape).init_weights(0)


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("tied", [True, False])
def test_every_weight_comes_back(tied, version, tmp_path):
    model = small(tied)
    (tmp_path / "model.bin").write_bytes(file_of(model, version))
    weights = llama2c.read(tmp_path / "model.bin")
    assert weights.shape == model.shape and set(weights.kinds.values()) == {"F32"}
    again = weights.model()
    assert (again.output.weight is again.tok_embeddings.weight) == tied
    state = again.state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(state[name], weight), name


@pytest.mark.parametrize("tied", [True, False])
def test_version_2_is_as_near_as_its_groups_allow(tied, tmp_path):
    model = small(tied)
    (tmp_path / "model.bin").write_bytes(file_of(model, 2))
    weights = llama2c.read(tmp_path / "model.bin")
    assert weights.shape == model.shape and weights.dtype == torch.float32
    for name, weight in model.named_parameters():
        loaded = weights.load(name)
        assert loaded.dtype == torch.float32 and weights.kinds[name] == ("I8" if weight.ndim == 2 else "F32")
        heads = {"wq": 4, "wk": 2}.get(name.split(".")[-2])
        theirs = to_interleaved(weight, heads) if heads else weight
        if weight.ndim == 2:
            values, scales = quantized(theirs)
            theirs = (values * scales[:, None]).view(weight.shape)
        assert torch.equal(to_interleaved(loaded, heads) if heads else loaded, theirs), name
        assert weight.ndim == 1 or 0 < (loaded - weight).abs().max() < 0.001, name


def test_negative_control_groups_in_another_order(tmp_path):
    """A header that says half the group size, on a file padded to the size that it promises."""
    model, data = small(tied=True), bytearray(file_of(small(tied=True), 2))
    path = tmp_path / "model.bin"
    struct.pack_into("<i", data, 37, GROUP // 2)
    path.write_bytes(data + bytes(4 * sum(w.numel() for w in model.parameters() if w.ndim == 2) // GROUP))
    loaded = llama2c.read(path).load("tok_embeddings.weight")
    assert not torch.allclose(loaded, model.tok_embeddings.weight, atol=0.001)


def header(*changes: tuple[int, int], version=0) -> bytes:
    """A file whose int32 at each (place, value) is changed."""
    data = bytearray(file_of(small(tied=True), version))
    for place, value in changes:
        struct.pack_into("<i", data, 4 * place, value)
    return bytes(data)


def refused(path):
    with pytest.raises(ValueError, match=r"model\.bin is no whole llama2\.c model: ") as error:
        llama2c.read(path)
    assert "\n" not in str(error.value)


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
        *(header(version=version)[:255] for version in (1, 2)),
        *(header(version=version)[:-1] for version in (1, 2)),
        *(header((1, wrong), version=1) for wrong in (-1, 0, 2, 3)),
        header((7, -20), version=1),
        header((8, 2**31 - 1), version=1),  # max_seq_len, which no tensor's size checks
        header((9, 2), version=1),
        *(header((9, 1 + (group << 8)), version=2) for group in (0, 3, 4)),
        header((10, 255), version=2),  # the highest byte of group_size
    ],
)
def test_a_damaged_file_is_refused_in_one_line(data, tmp_path):
    (tmp_path / "model.bin").write_bytes(data)
    refused(tmp_path / "model.bin")


@pytest.mark.parametrize("version", [0, 1, 2])
def test_any_flipped_byte_of_a_header_is_read_or_refused(version, tmp_path):
    whole, draw = file_of(small(tied=True), version), random.Random(version)
    path = tmp_path / "model.bin"
    for _ in range(200):
        data = bytearray(whole)
        data[draw.randrange(28 + 16 * (version > 0))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        try:
            llama2c.read(path).model()
        except ValueError as error:
            assert "\n" not in str(error)

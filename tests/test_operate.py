"""Layer: the command line. Every verb of surgery, what it says was proved, and what it refuses."""

import json

import pytest
import torch
from safetensors.torch import save_file

from llamita import cli
from llamita.formats import hf, llama_cpp, surgery
from llamita.model.llama import build
from llamita.model.shape import RopeScaling, Shape
from llamita.recipes import operate
from llamita.tokenizer import Tokenizer
from tests.folders import save

TOKENIZER = Tokenizer([*(bytes([byte]) for byte in range(256)), b"th", b" th", b"he", b" the"])
SHAPE = Shape(dim=32, num_layers=3, num_heads=4, num_kv_heads=2, ffn_dim=48, vocab_size=520, tied=True, max_seq_len=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    home = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        model = build(SHAPE).init_weights(seed)
        save(model, TOKENIZER, home / f"m{seed}")
    return home


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    monkeypatch.setattr(llama_cpp, "version", lambda: None)


def run(capsys, *words):
    code = cli.main(["surgery", *map(str, words)])
    return code, capsys.readouterr().err


def refused(capsys, *words):
    code, said = run(capsys, *words)
    lines = [line for line in said.splitlines() if line.startswith("llamita:")]
    assert code == 2 and len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("words", "said", "changes"),
    [
        (("vocab", "--size", "640"), "tokens that stay are equal", dict(vocab_size=640)),
        (("vocab", "--size", "514"), "tokens that stay are equal", dict(vocab_size=514)),
        (("untie",), "tokens that stay are equal", dict(tied=False)),
        (("layers", "--keep", "0", "2"), "logits may move", dict(num_layers=2)),
        (("rope", "--factor", "4", "--original-max-seq-len", "32"), "at position 0 are equal",
         dict(rope_scaling=RopeScaling(4.0, original_max_seq_len=32))),
        (("rope", "--theta", "1000", "--max-seq-len", "128"), "at position 0", dict(rope_theta=1000, max_seq_len=128)),
    ],
)  # fmt: skip
def test_each_verb_writes_a_proved_model(folder, tmp_path, capsys, words, said, changes):
    code, text = run(capsys, words[0], folder / "m0", *words[1:], "--out", tmp_path / "out")
    assert code == 0 and said in text
    shape = hf.read(tmp_path / "out").shape
    assert shape == Shape(**(SHAPE.__dict__ | changes))
    assert json.loads((tmp_path / "out/proof.json").read_text())["readers"]["llamita"]["equal_tensors"] > 10
    done = next(line for line in text.splitlines() if said in line).partition(":")[0]
    assert f"- converted from `m0`\n- {done}\n" in (tmp_path / "out/README.md").read_text()


def test_tie_and_average_and_lora(folder, tmp_path, capsys):
    assert run(capsys, "untie", folder / "m0", "--out", tmp_path / "u")[0] == 0
    assert run(capsys, "tie", tmp_path / "u", "--out", tmp_path / "t")[0] == 0
    first, again = hf.read(folder / "m0").model(), hf.read(tmp_path / "t").model()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    code, _ = run(capsys, "average", folder / "m0", folder / "m1", "--shares", "3", "1", "--out", tmp_path / "a")
    second = hf.read(folder / "m1").model()
    mean = hf.read(tmp_path / "a").model().norm.weight
    assert code == 0 and torch.equal(mean, (3 * first.norm.weight + second.norm.weight) / 4)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["o_proj"], "layers_to_transform": [1]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    name = "base_model.model.model.layers.1.self_attn.o_proj.lora_{}.weight"
    a, b = torch.randn(2, 32), torch.randn(32, 2)
    save_file({name.format("A"): a, name.format("B"): b}, adapter / "adapter_model.safetensors")
    assert run(capsys, "lora", folder / "m0", adapter, "--out", tmp_path / "l")[0] == 0
    merged = hf.read(tmp_path / "l").load("layers.1.attention.wo.weight")
    torch.testing.assert_close(merged, first.layers[1].attention.wo.weight + 2 * b @ a)


def test_what_is_refused(folder, tmp_path, capsys):
    model, out = folder / "m0", ("--out", tmp_path / "out")
    assert "520 rows" in refused(capsys, "vocab", model, "--size", "520", *out)
    assert "at least 512" in refused(capsys, "vocab", model, "--size", "300", *out)
    assert "tied already" in refused(capsys, "tie", model, *out)
    assert "two models or more" in refused(capsys, "average", model, *out)
    assert "share above 0" in refused(capsys, "average", model, model, "--shares", "1", *out)
    assert "from 0 to 2" in refused(capsys, "layers", model, "--keep", "1-7", *out)
    assert "'x'" in refused(capsys, "layers", model, "--keep", "x", *out)
    assert "give one of them" in refused(capsys, "rope", model, "--plain", "--factor", "8", *out)
    assert "above 0" in refused(capsys, "rope", model, "--theta", "1000", "--factor", "0", *out)
    assert "--factor" in refused(capsys, "rope", model, "--low-freq-factor", "2", *out)
    assert "already" in refused(capsys, "rope", model, *out)
    assert "adapter_model.safetensors" in refused(capsys, "lora", model, tmp_path, *out)
    other = Tokenizer([*TOKENIZER.tokens[:-1], b"zz"])
    save(build(SHAPE).init_weights(1), other, tmp_path / "other")
    assert "another tokenizer" in refused(capsys, "average", model, tmp_path / "other", *out)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_logit_that_moved_is_named_and_nothing_is_written(folder, tmp_path, capsys, monkeypatch):
    """A mutant of the surgeon: the new head is not the embeddings."""
    real = surgery.untie

    def wrong(weights):
        after = real(weights)
        load = after.load
        object.__setattr__(after, "load", lambda name: load(name) * (1.01 if name == "output.weight" else 1))
        return after

    monkeypatch.setattr(surgery, "untie", wrong)
    assert "moved by up to" in refused(capsys, "untie", folder / "m0", "--out", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_spans_of_layers():
    assert operate.layers(["0-3", "6", "8-8"]) == [0, 1, 2, 3, 6, 8]

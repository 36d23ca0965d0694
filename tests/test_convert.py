"""Layer: the stages. Models in and out of every format, whole, through the functions and the command line."""

import json
import math
import re
import resource
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch

from llamita import cli
from llamita.formats import hf, llama_cpp, open
from llamita.formats.files import replacing
from llamita.formats.weights import Weights, sizes
from llamita.model.llama import build
from llamita.model.shape import PRESETS, RopeScaling, Shape
from llamita.recipes import card, convert, modelfile, shapes
from llamita.tokenizer import Tokenizer
from llamita.tokenizer.carried import CarriedTokenizer
from llamita.tokenizer.opened import open_tokenizer
from tests.folders import save

TOKENIZER = Tokenizer([*(bytes([byte]) for byte in range(256)), b"th", b" th", b"he", b" the"])
TINY = dict(dim=32, num_layers=2, num_heads=4, num_kv_heads=4, ffn_dim=48, vocab_size=TOKENIZER.vocab_size,
            tied=False, max_seq_len=64)  # fmt: skip
SCALING = RopeScaling(factor=4.0, original_max_seq_len=32)
MODELS = {
    "tiny": {},
    "tied": dict(tied=True),
    "GQA": dict(num_kv_heads=2),
    "scaled": dict(rope_scaling=SCALING),
    "Llama 3.1's scaling, a padded vocabulary": dict(rope_scaling=RopeScaling(), vocab_size=TOKENIZER.vocab_size + 3),
    "all at once": dict(tied=True, num_kv_heads=1, rope_scaling=SCALING, rope_theta=10_000.0, norm_eps=1e-6),
}


def model_of(**changes):
    return build(Shape(**(TINY | changes))).init_weights(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save(model_of(num_kv_heads=2), TOKENIZER, folder)
    return folder


@pytest.fixture
def alone(monkeypatch):
    """No independent reader, as on a bare machine: what they see is tested elsewhere."""
    monkeypatch.setattr(llama_cpp, "version", lambda: None)
    monkeypatch.setitem(sys.modules, "transformers", None)


def run(capsys, *words):
    code = cli.main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


def refused(capsys, *words):
    code, _, err = run(capsys, *words)
    said = [line for line in err.splitlines() if line.startswith("llamita:")]
    assert code == 2 and len(said) == 1 and "Traceback" not in err, err
    return said[0]


@pytest.mark.parametrize("name", MODELS)
def test_round_trips_are_bit_identical(tmp_path, alone, name):
    """Hugging Face -> ours -> Meta -> ours -> GGUF F32 -> ours -> Hugging Face."""
    model = model_of(**MODELS[name])
    save(model, TOKENIZER, tmp_path / "hf")
    convert.convert(tmp_path / "hf", tmp_path / "meta", form="meta")
    convert.convert(tmp_path / "meta", tmp_path / "gguf", form="gguf", kind="F32")
    convert.convert(tmp_path / "gguf", tmp_path / "again")
    first, last = hf.read(tmp_path / "hf"), hf.read(tmp_path / "again")
    assert first.shape == last.shape == model.shape
    for name in sizes(model.shape):
        assert torch.equal(first.load(name).view(torch.int32), last.load(name).view(torch.int32)), name
    for name in ("config.json", "model.safetensors", "tokenizer.model", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


@pytest.mark.parametrize("form", ["hf", "meta", "gguf"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_stay_as_they_are(tmp_path, alone, form, dtype):
    save(model_of(), TOKENIZER, tmp_path / "hf", dtype=dtype)
    convert.convert(tmp_path / "hf", tmp_path / "there", form=form)
    convert.convert(tmp_path / "there", tmp_path / "back")
    assert (tmp_path / "hf/model.safetensors").read_bytes() == (tmp_path / "back/model.safetensors").read_bytes()


def test_shards(tmp_path, alone, monkeypatch):
    monkeypatch.setattr(hf, "MAX_SHARD_BYTES", 30_000)
    save(model_of(), TOKENIZER, tmp_path / "hf")
    files = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * Shape(**TINY).num_params
    monkeypatch.undo()
    convert.convert(tmp_path / "hf", tmp_path / "one")
    assert [path.name for path in (tmp_path / "one").glob("*.safetensors")] == ["model.safetensors"]
    monkeypatch.setattr(hf, "MAX_SHARD_BYTES", 30_000)
    convert.convert(tmp_path / "one", tmp_path / "two")
    monkeypatch.undo()
    convert.convert(tmp_path / "one", tmp_path / "two")
    assert [path.name for path in (tmp_path / "two").glob("*.safetensors")] == ["model.safetensors"]


def test_transformers_reads_shards(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(hf, "MAX_SHARD_BYTES", 30_000)
    model = model_of()
    save(model, TOKENIZER, tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert torch.equal(theirs.lm_head.weight, model.output.weight)


def test_import_and_export_through_the_command_line(folder, tmp_path, capsys, alone):
    code, out, _ = run(capsys, "export", folder, "--out", tmp_path / "g", "--format", "gguf", "--dtype", "q8_0")
    assert code == 0 and "llama.cpp: not installed" in out
    assert {path.name for path in (tmp_path / "g").iterdir()} == {
        "model-q8_0.gguf", "Modelfile", "README.md", "proof.json"
    }  # fmt: skip
    code, out, _ = run(capsys, "import", tmp_path / "g/model-q8_0.gguf", "--out", tmp_path / "m", "--json")
    assert code == 0 and json.loads(out)["kinds"] == ["F32"]
    code, out, _ = run(capsys, "generate", tmp_path / "m", "the", "--max-tokens", "4", "--temperature", "0")
    assert code == 0
    assert run(capsys, "generate", tmp_path / "g", "the", "--max-tokens", "4", "--temperature", "0")[1] == out
    code, out, _ = run(capsys, "export", folder, "--out", tmp_path / "p", "--format", "meta", "--license", "mit")
    assert code == 0 and "Meta's code: not installed" in out
    assert "license: mit" in (tmp_path / "p/README.md").read_text()


def test_bad_input_is_one_line_and_leaves_nothing(folder, tmp_path, capsys, alone):
    work = tmp_path / "work"
    work.mkdir()
    (work / "x.bin").write_bytes(b"\x00" * 100)
    (work / "x.gguf").write_bytes(b"GGUF" + b"\xff" * 40)
    (work / "two").mkdir()
    for name in "ab":
        (work / "two" / f"{name}.gguf").write_bytes(b"GGUF")
    out = ("--out", tmp_path / "out")
    assert "no model" in refused(capsys, "import", work / "none", *out)
    assert "x.bin" in refused(capsys, "import", work / "x.bin", *out)
    assert "x.gguf" in refused(capsys, "import", work / "x.gguf", *out)
    assert "2 GGUF files" in refused(capsys, "import", work / "two", *out)
    assert "nobody/none" in refused(capsys, "import", "nobody/none", *out)
    assert "hf has no Q8_0" in refused(capsys, "export", folder, *out, "--dtype", "q8_0")
    assert "pip install llama-cpp-python" in refused(
        capsys, "export", folder, *out, "--format", "gguf", "--dtype", "q4_k_m"
    )
    assert "is a file" in refused(capsys, "export", folder, "--out", work / "x.bin")
    assert "'pth'" in refused(capsys, "export", folder, *out, "--format", "pth")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["work"]


def test_another_quantization_is_not_written_over_the_first(folder, tmp_path, capsys, alone):
    words = ("export", folder, "--out", tmp_path / "g", "--format", "gguf", "--dtype")
    assert run(capsys, *words, "q8_0")[0] == 0
    assert "model-q8_0.gguf" in refused(capsys, *words, "q4_0")
    assert run(capsys, *words, "q8_0")[0] == 0


def test_an_older_export_stays_when_the_new_one_fails(folder, tmp_path, capsys, alone, monkeypatch):
    words = ("export", folder, "--out", tmp_path / "m", "--format", "meta")
    assert run(capsys, *words)[0] == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()}

    def broken(*arguments, **named):
        raise ValueError("tensor x differs")

    monkeypatch.setattr(convert, "prove", broken)
    assert "tensor x differs" in refused(capsys, *words)
    assert {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_llama2c_with_its_vocabulary(shared_data, tmp_path, capsys, alone):
    pytest.importorskip("tokenizers")
    place = tmp_path / "stories260K"
    place.mkdir()
    weights = shared_data / "weights"
    shutil.copy(weights / "stories260K.bin", place / "model.bin")
    shutil.copy(weights / "tok512.bin", place / "tokenizer.bin")
    assert run(capsys, "import", place / "model.bin", "--out", tmp_path / "hf")[0] == 0
    words = ("--temperature", "0", "--max-tokens", "200")
    expected = (weights / "stories260K_expected_greedy.txt").read_text().strip()
    for model in (tmp_path / "hf", place / "model.bin"):
        code, out, _ = run(capsys, "generate", model, "", *words)
        assert code == 0 and out.strip() == expected
    assert "tokenizer.bin" in refused(capsys, "import", _moved(place / "model.bin", tmp_path), "--out", tmp_path / "x")


def _moved(path, folder):
    (folder / "alone").mkdir()
    return shutil.copy(path, folder / "alone")


OWN = {"README.md": "my notes", "config.json": "{}", "thesis.tex": "years of work", "model.safetensors": "theirs"}


@pytest.mark.parametrize("name", OWN)
def test_what_no_export_put_there_is_never_deleted(folder, tmp_path, capsys, alone, monkeypatch, name):
    (tmp_path / "out").mkdir()
    assert run(capsys, "export", folder, "--out", tmp_path / "out")[0] == 0, "an empty folder may be filled"
    (tmp_path / "out" / name).write_text(OWN[name])
    if name in ("config.json", "model.safetensors"):
        (tmp_path / "out/proof.json").unlink()
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(convert, "prove", None)  # refused before anything is written
    monkeypatch.setattr(convert, "_write", None)
    assert "would be deleted" in refused(capsys, "export", folder, "--out", tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_exports_to_one_folder_at_once(folder, tmp_path, alone):
    with (
        replacing(tmp_path / "out") as first,
        pytest.raises(ValueError, match="another process is writing"),
        replacing(tmp_path / "out"),
    ):
        pytest.fail("both write")
    assert first != tmp_path / "out" and (tmp_path / "out").is_dir()
    convert.convert(folder, tmp_path / "new")


def test_a_kill_between_two_renames_loses_nothing(folder, tmp_path, alone):
    convert.convert(folder, tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / ".out.old")
    with pytest.raises(RuntimeError), replacing(tmp_path / "out"):
        raise RuntimeError
    assert (tmp_path / "out/proof.json").is_file() and not (tmp_path / ".out.old").exists()


# ---- cards and Modelfiles ----


def test_a_card_carries_the_licence_of_its_source(folder, tmp_path, alone):
    copied = shutil.copytree(folder, tmp_path / "source")
    (copied / "README.md").write_text("---\nlanguage: en\nlicense: llama3.2\n---\n# A model\n")
    convert.convert(copied, tmp_path / "out")
    text = (tmp_path / "out/README.md").read_text()
    assert text.startswith("---\nlicense: llama3.2\n") and "converted from `source`" in text
    assert card.known(copied, "mit").license == "mit"
    for hostile in ("mit\ntags: [x]", "a b", "x" * 100):
        with pytest.raises(ValueError, match="no licence's identifier"):
            card.known(copied, hostile)
    (copied / "README.md").write_text("---\nlanguage: en\n---\n# A model\nlicense: mit\n")
    assert card.known(copied).license == ""
    assert "not stated" in card.text(Shape(**TINY), {"format": "hf", "kinds": ["F32"], "readers": {}},
                                     card.known(folder), [])  # fmt: skip


def rendered(template: str, messages) -> str:
    """Go's text/template as far as `modelfile.template` uses it: a range over messages with one chain of conditions."""
    body, tail = re.fullmatch(r"\{\{- \$last := \"\" \}\}\{\{ range \.Messages \}\}(.*)\{\{ end \}\}(.*)",
                                    template, re.S).groups()  # fmt: skip
    branches = re.findall(r"\{\{- (?:else if|if|else) ?(.*?)\}\}\{\{ (\".*?(?<!\\)\"|\"\") \}\}", body)
    text, last = "", ""
    for message in messages:
        for condition, literal in branches:
            tests = {f'eq .Role "{message["role"]}"', f'eq $last "{last}"', ""}
            if condition.strip() in tests:
                text += json.loads(literal)
                break
        text, last = text + message["content"], message["role"]
    return text + json.loads(re.fullmatch(r"\{\{ (\".*\") \}\}", tail)[1])


@pytest.mark.parametrize("chat_format", ["llama3", "llama3.1"])
@pytest.mark.parametrize("roles", ["u", "su", "uau", "suauau"])
def test_a_modelfile_writes_dialogs_as_the_template_does(chat_format, roles):
    names = {"u": "user", "s": "system", "a": "assistant"}
    messages = [{"role": names[role], "content": f"word {i}"} for i, role in enumerate(roles)]
    tokenizer = Tokenizer(TOKENIZER.tokens, chat_format)
    ids = modelfile.render(tokenizer, messages, reply=True)[0]
    assert rendered(modelfile.template(tokenizer), messages) == tokenizer.decode(ids[1:])


def test_what_a_modelfile_says(folder, tmp_path, alone):
    convert.convert(folder, tmp_path / "g", form="gguf")
    text = (tmp_path / "g/Modelfile").read_text()
    assert text.startswith("FROM ./model-f32.gguf\n") and "PARAMETER num_ctx 64\n" in text
    for stop in ("<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"):
        assert f'PARAMETER stop "{stop}"\n' in text
    assert "<|begin_of_text|>" not in text, "llama.cpp adds BOS by itself: here it would come twice"


# ---- show ----

# Published: Llama 3 paper, table 3, and the parameter counts of Meta's own checkpoints.
COUNTS = {"llama3.1-8b": 8_030_261_248, "llama3.1-70b": 70_553_706_496, "llama3.1-405b": 405_853_388_800}


@pytest.mark.parametrize("name", COUNTS)
def test_show_builds_the_large_ones_on_the_meta_device(name, capsys):
    code, out, _ = run(capsys, "show", name, "--context", "8192", "131072", "--json")
    told = json.loads(out)
    assert code == 0 and told["parameters"] == COUNTS[name]
    shape = PRESETS[name]
    gqa, mha = told["kv_bytes_per_token"]["gqa"], told["kv_bytes_per_token"]["mha"]
    assert gqa == 2 * 2 * shape.num_layers * 8 * 128 and mha == gqa * shape.num_heads // 8
    assert told["contexts"]["131072"]["kv_bytes_gqa"] == 131_072 * gqa
    assert told["weight_bytes"]["BF16"] == 2 * COUNTS[name]
    assert sum(math.prod(row["size"]) * row["count"] for row in told["tensors"].values()) == COUNTS[name]
    code, out, _ = run(capsys, "show", name)
    assert code == 0 and f"{COUNTS[name]:,}" in out and "MHA" in out
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 8 << 20


def test_show_of_a_model_on_disk(folder, capsys):
    assert f"{model_of(num_kv_heads=2).shape.num_params:,}" in run(capsys, "show", folder)[1]
    assert "did you mean 'llama3-8b'" in refused(capsys, "show", "llama3-8")
    assert "--context 0" in refused(capsys, "show", "tiny", "--context", "0")


def test_a_shape_named_by_run_recipe_or_preset():
    assert shapes.named("llama3.2-1b") == PRESETS["llama3.2-1b"]


# ---- small memory ----


@pytest.mark.slow
def test_conversion_streams(tmp_path):
    """A 0.5 GB model is converted twice in little more than torch itself takes; reading it whole would show."""
    shape = Shape(**(TINY | dict(dim=1024, num_layers=20, num_heads=16, ffn_dim=4096)))
    block = torch.randn(1 << 22).bfloat16()

    def load(name):
        size = sizes(shape)[name]
        return block[: math.prod(size)].view(size)

    weights = Weights(shape, dict.fromkeys(sizes(shape), "BF16"), load)
    program = (
        "import resource, sys; from pathlib import Path; from llamita.recipes import convert; "
        "import llamita.runtime as r; r.free_memory = lambda: 0; "
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; before = peak(); "
        "convert.convert(Path(sys.argv[1]), Path(sys.argv[2]), form=sys.argv[3]); print((peak() - before) // 1024)"
    )
    with replacing(tmp_path / "hf") as new:
        hf.write(weights, TOKENIZER, new, "BF16")
    num_mib = 2 * shape.num_params >> 20
    assert num_mib > 500
    for source, target, form in (("hf", "meta", "meta"), ("meta", "gguf", "gguf"), ("gguf", "again", "hf")):
        words = [sys.executable, "-c", program, str(tmp_path / source), str(tmp_path / target), form]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        assert int(done.stdout) < num_mib // 3, (form, done.stdout)
    assert (tmp_path / "hf/model.safetensors").read_bytes() == (tmp_path / "again/model.safetensors").read_bytes()


# ---- strangers' files ----


def header(*, tensors=None, length=None, pad=0):
    data = json.dumps(tensors or {}).encode()
    return struct.pack("<Q", len(data) if length is None else length) + data + b"\0" * pad


ONE = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\0" * 7, header(length=1 << 62), header(length=101 << 20, pad=1 << 10),
        header(tensors={"a": ONE}), header(tensors={"a": ONE}, pad=8), header(tensors={"a": ONE, "b": ONE}, pad=16),
        header(tensors={"a": ONE | {"shape": [-4]}}, pad=16), header(tensors={"a": ONE | {"shape": [1 << 40]}}, pad=16),
        header(tensors={"a": ONE | {"data_offsets": [16, 0]}}, pad=16),
        header(tensors={"a": ONE | {"dtype": "X"}}, pad=16),
        header(tensors={"a": ONE | {"shape": [1 << 32, 1 << 32]}}, pad=16), header(tensors=[1]), b"\x80\x02}q\x00.",
    ],
)  # fmt: skip
def test_malformed_safetensors_are_refused_in_one_line(folder, tmp_path, capsys, data):
    copied = shutil.copytree(folder, tmp_path / "m")
    (copied / "model.safetensors").write_bytes(data)
    assert "model.safetensors" in refused(capsys, "import", copied, "--out", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_fuzzed_safetensors_read_or_raise_one_line(folder, tmp_path):
    """Bytes flipped in the header, lengths replaced, ends cut off: a ValueError of one line, or the right shapes."""
    generator = np.random.default_rng(0)
    copied = shutil.copytree(folder, tmp_path / "m")
    path = copied / "model.safetensors"
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    read = failed = 0
    for _ in range(400):
        data = bytearray(whole)
        for place in generator.integers(0, 8 + size, generator.integers(1, 4)):
            data[place] = generator.integers(0, 256)
        if generator.random() < 0.3:
            del data[generator.integers(0, len(data)) :]
        path.write_bytes(data)
        try:
            weights = open.read(copied)
            for name, wanted in sizes(weights.shape).items():
                assert weights.load(name).shape == wanted
            read += 1
        except ValueError as error:
            assert "\n" not in str(error)
            failed += 1
    assert failed > 100 and read + failed == 400


# ---- the hub ----


def test_a_hub_name_is_fetched_without_pickles(folder, tmp_path, monkeypatch, capsys, alone):
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    assert run(capsys, "import", "someone/model", "--out", tmp_path / "out")[0] == 0
    [(name, patterns)] = asked
    assert name == "someone/model" and not any(pattern.endswith((".bin", ".pth")) for pattern in patterns)
    monkeypatch.setattr(hub, "hf_hub_download", lambda name, file: asked.append((name, file)) or str(folder))
    assert convert.fetch("someone/model/q4.gguf") == folder
    assert asked[-1] == ("someone/model", "q4.gguf")


# ---- an imported model goes on living ----


@pytest.fixture
def foreign(shared_data, tmp_path):
    """A small Llama with Llama 2's SentencePiece vocabulary and a chat template that refuses a system's message."""
    pytest.importorskip("sentencepiece")
    tokenizer = open_tokenizer(shared_data / "tokenizers/llama2_tokenizer.model")
    tokenizer = CarriedTokenizer(
        tokenizer.content, eos_id=tokenizer.eos_id, bos_id=tokenizer.bos_id, unk_id=0, stop_ids=[2, 5], adds_bos=True,
        chat_template="{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no') }}"
        "{% endif %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
    )  # fmt: skip
    save(model_of(vocab_size=tokenizer.vocab_size), tokenizer, tmp_path / "foreign")
    return tmp_path / "foreign"


def test_a_foreign_model_is_converted_tuned_evaluated_and_exported(foreign, tmp_path, capsys, alone):
    for form in ("meta", "gguf", "hf"):
        assert run(capsys, "export", foreign, "--out", tmp_path / form, "--format", form)[0] == 0
    assert open.tokenizer(tmp_path / "meta").stop_ids == {2, 5}
    written = modelfile.template(open.tokenizer(foreign))
    assert '{{- if eq .Role "system" }}{{ "" }}' in written and "assistant: " in written
    talk = tmp_path / "talk.jsonl"
    rows = [{"messages": [{"role": "user", "content": f"Hi {i}"}, {"role": "assistant", "content": "Ho."}]}
            for i in range(9)]  # fmt: skip
    talk.write_text("\n".join(map(json.dumps, rows)))
    words = ("--steps", "2", "--batch-size", "2", "--micro-batch-size", "2", "--data.seq-len", "32")
    tuned = ("sft", "--base", tmp_path / "hf", "--conversations", talk, "--dir", tmp_path / "sft", *words)
    assert run(capsys, *tuned)[0] == 0
    assert run(capsys, "export", tmp_path / "sft", "--out", tmp_path / "sft/model")[0] == 0
    assert "fine-tuned from `hf`" in (tmp_path / "sft/model/README.md").read_text()
    assert open.tokenizer(tmp_path / "sft/model").stop_ids == {2, 5}
    code, out, _ = run(capsys, "chat", tmp_path / "sft", "-p", "Hi", "--max-tokens", "3", "--temperature", "0")
    assert code == 0
    text = tmp_path / "text"
    text.mkdir()
    for number in range(12):
        (text / f"{number}.txt").write_text(f"Once there were {number} llamas. " * (number + 2))
    assert run(capsys, "data", "build", "plain", text, "--tokenizer", tmp_path / "hf", "--out", tmp_path / "c")[0] == 0
    code, out, _ = run(capsys, "eval", tmp_path / "hf", "--corpus", tmp_path / "c", "--window", "32", "--json")
    assert code == 0 and 0 < json.loads(out)["bits_per_byte"] < 16

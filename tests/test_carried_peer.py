"""Layer: a real model's tokenizer (SmolLM2's GGUF) and Llama 2's against llama.cpp and transformers. Peer lane."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from llamita.tokenizer import emit
from llamita.tokenizer.carried import CarriedTokenizer
from llamita.tokenizer.llamacpp import from_gguf
from llamita.tokenizer.opened import open_tokenizer
from llamita.tokenizer.pieces import from_llama2c
from tests.llama_cpp_peer import LlamaCpp
from tests.test_carried import DIALOG, key
from tests.test_llama_cpp_tokenizer import NEWER, _fuzz
from tests.test_tokenizer import TORTURE

pytestmark = pytest.mark.peer
gguf = pytest.importorskip("gguf", reason="gguf is not installed")

VENV = Path(__file__).parents[1] / ".venv"
LONGEST = 5_000  # characters; the regular expressions of the split "default" overflow llama.cpp's stack above


def fields_of(path: Path) -> dict:
    fields = gguf.GGUFReader(path).fields
    return {name: field.contents() for name, field in fields.items() if name.startswith("tokenizer.")}


@pytest.fixture(scope="module")
def smol_file() -> Path:
    found = sorted((VENV / "smollm2").glob("**/*.gguf"))
    if not found:
        pytest.skip("SmolLM2 does not lie in .venv/smollm2: run `make .venv/peers`")
    return found[0]


@pytest.fixture(scope="module")
def smol_fields(smol_file) -> dict:
    return fields_of(smol_file)


@pytest.fixture(scope="module")
def smol(smol_fields) -> CarriedTokenizer:
    return from_gguf(smol_fields)


@pytest.fixture(scope="module")
def texts(smol, smol_fields) -> list[str]:
    """Without what the peers are known to part on: Unicode 16, and bytes for which SmolLM2 has no token.

    Both drop such a byte; the library then joins what stood around it, llama.cpp does not.
    """
    lacking = {byte for byte, letter in enumerate(emit.LETTERS) if letter not in smol_fields[key("tokens")]}
    assert lacking >= {0x1D, 0xC0} and len(lacking) == 21
    words = SimpleNamespace(tokens=[*map(smol.token_bytes, range(17, smol.vocab_size))])
    found = [*TORTURE, *_fuzz(words, 1500), "<|im_end|> a<|im_start|></s>", *map(str, range(0, 10_000, 97))]
    return [text for text in found if NEWER.isdisjoint(map(ord, text)) and lacking.isdisjoint(text.encode())]


def unequal(tokenizer: CarriedTokenizer, peer: LlamaCpp, texts: list[str]) -> list[str]:
    return [a for a, b, c in zip(texts, tokenizer.encode_batch(texts), peer.tokenize(texts), strict=True) if b != c]


def written(tokenizer: CarriedTokenizer, folder: Path) -> LlamaCpp:
    emit.write_gguf(tokenizer, folder / "vocab.gguf")
    return LlamaCpp(folder / "vocab.gguf")


def test_smollm2_in_llama_cpp(smol, smol_file, texts, tmp_path):
    assert len(texts) > 850
    for peer in (LlamaCpp(smol_file), written(smol, tmp_path)):
        assert unequal(smol, peer, texts) == []
        assert peer.tokenize(["<|im_end|>hi <|im_start|>"], special=True) == [
            smol.encode("<|im_end|>hi <|im_start|>", specials="allow")
        ]
        assert (peer.bos, peer.eos, peer.add_bos, peer.n_vocab) == (1, 2, False, smol.vocab_size)
        assert peer.control == list(smol.specials.values())
        # llama.cpp also ends at this name, a mark of training on code
        assert peer.eog == smol.stop_ids | {smol.specials["<reponame>"]}


def test_smollm2_there_and_back(smol, smol_fields):
    assert emit.gguf_fields(smol) == smol_fields


@pytest.mark.parametrize("pre", ["gpt-2", "default", "llama-bpe"])
def test_the_other_splits(smol, smol_fields, smol_file, texts, pre, tmp_path):
    """On SmolLM2's tokens; llama.cpp with the split of another name must differ, or the texts show nothing."""
    other = from_gguf(smol_fields | {key("pre"): pre})
    short = [text for text in texts if len(text) < LONGEST]
    assert unequal(other, written(other, tmp_path), short) == []
    assert unequal(other, LlamaCpp(smol_file), short) != []


def test_smollm2_in_transformers(smol, texts, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    smol.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = theirs(texts, split_special_tokens=True)["input_ids"]
    assert ids == smol.encode_batch(texts) and [theirs.decode(i) for i in ids] == [smol.decode(i) for i in ids]
    assert theirs.apply_chat_template(DIALOG)["input_ids"] == smol.render(DIALOG)[0]
    assert theirs.apply_chat_template(DIALOG, tokenize=False) == smol.decode(smol.render(DIALOG)[0])
    opened = open_tokenizer(tmp_path)
    assert opened.fingerprint == smol.fingerprint and opened.stop_ids == smol.stop_ids


@pytest.mark.parametrize("name", ["llama 2", "tok512"])
def test_sentencepiece_in_llama_cpp_and_transformers(name, shared_data, texts, tmp_path):
    """The scores that llama.cpp has here are made from the merges."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    if name == "llama 2":
        tokenizer = from_gguf(fields_of(shared_data / "tokenizers" / "ggml-vocab-llama-spm.gguf"))
    else:
        tokenizer = from_llama2c(shared_data / "weights" / "tok512.bin", 512)
    peer = written(tokenizer, tmp_path)
    assert unequal(tokenizer, peer, [*texts, "a\u2581\u2581b"]) == []
    assert peer.eog == tokenizer.stop_ids and peer.add_bos is tokenizer.adds_bos is True
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert [theirs(text, split_special_tokens=True)["input_ids"] for text in texts] == [
        tokenizer.encode(text, bos=True) for text in texts
    ]

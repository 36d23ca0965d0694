"""Layer: parity with others. A real small Llama of someone else, SmolLM2-135M-Instruct as a Q4_1 GGUF file, whole:
imported, compared with llama.cpp, asked, exported to Hugging Face and to GGUF, and loaded there.
"""

import json
from pathlib import Path

import pytest
import torch

from llamita.formats import gguf, llama_cpp, open
from llamita.recipes import convert
from llamita.serve.llm import LLM
from llamita.tokenizer.chat import render

pytestmark = pytest.mark.peer
PROMPTS = (
    "The capital of France is", "def fibonacci(n):\n", "Once upon a time, in a", "Water boils at",
    "The three primary colours are", "1, 2, 3, 4,", "Dear Sir or Madam,\n\n", "The mitochondrion is",
    "Roses are red,", "In 1969, the first",
)  # fmt: skip
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
NUM_TOKENS = 32


@pytest.fixture(scope="module")
def file():
    found = sorted((Path(__file__).parents[1] / ".venv/smollm2").glob("**/*.gguf"))
    if not found or not llama_cpp.version():
        pytest.skip("SmolLM2 or llama-cpp-python is not installed: run `make .venv/peers`")
    return found[0]


@pytest.fixture(scope="module")
def imported(file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2") / "hf"
    return folder, convert.convert(file, folder)


@pytest.fixture(scope="module")
def llm(imported):
    return LLM.load(imported[0], device="cpu")


def test_what_was_imported(file, imported):
    folder, proof = imported
    kinds = set(gguf.read(file).kinds.values())
    assert "Q4_1" in kinds and proof["kinds"] == ["F32"]
    theirs = proof["readers"]["transformers"]
    assert theirs["max_logit_diff"] < theirs["bound"] and theirs["reply_tokens"] == 16
    shape = json.loads((folder / "config.json").read_text())
    assert (shape["hidden_size"], shape["rope_theta"], shape["tie_word_embeddings"]) == (576, 100_000.0, True)


def test_stock_transformers_loads_and_chats(imported, llm):
    transformers = pytest.importorskip("transformers")
    folder, _ = imported
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    assert prompt[0].tolist() == render(llm.tokenizer, QUESTION, reply=True)[0]
    reply = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False)
    text = tokenizer.decode(reply[0, prompt.shape[1] :], skip_special_tokens=True)
    assert text == llm.chat(QUESTION, temperature=0, max_tokens=24)
    assert "Paris" in text


def test_logits_and_ten_greedy_continuations_equal_llama_cpps(file, llm):
    for prompt in PROMPTS:
        ids = llm.tokenizer.encode(prompt, bos=True)
        with torch.no_grad():
            ours_TV = llm.model(torch.tensor([ids]))[0]
        found = llama_cpp.ask(file, torch.tensor([ids]), len(ids), NUM_TOKENS, [prompt], [])
        assert found.ids == [ids], "SmolLM2 puts no BOS before a text"
        assert (found.exact_BTV[0] - ours_TV).abs().max() < 5e-4 * ours_TV.std()
        [completion] = llm.engine.complete([ids], llm_greedy())
        stopped = [token for token in found.reply if token in llm.tokenizer.stop_ids]
        assert completion.tokens == found.reply[: len(found.reply) - len(stopped)], prompt
        other = found.logits_BTV[0] - ours_TV  # as llama.cpp computes with the packed weights: near, not equal
        assert 0.01 < other.abs().max() < ours_TV.std()


def llm_greedy():
    from llamita.serve.sample import Sampling

    return Sampling(temperature=0, max_tokens=NUM_TOKENS)


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0", "Q4_0", "Q4_K_M"])
def test_exported_to_gguf_and_loaded_by_llama_cpp(imported, tmp_path, kind):
    proof = convert.convert(imported[0], tmp_path / "g", form="gguf", kind=kind)
    theirs = proof["readers"]["llama.cpp"]
    assert theirs["max_logit_diff"] < theirs["bound"] and theirs["reply_tokens"] == 16
    assert (theirs["rounded_mean_kl"] > 1e-7) == (kind != "F32")
    assert (tmp_path / "g/Modelfile").read_text().startswith(f"FROM ./model-{kind.lower()}.gguf\n")
    again = open.tokenizer(tmp_path / "g")
    assert again.fingerprint == open.tokenizer(imported[0]).fingerprint

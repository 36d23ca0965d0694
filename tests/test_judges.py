"""Layer: arithmetic. A model's bits per byte are the likelihoods that it gives, computed here directly."""

import pickle

import numpy as np
import pytest
import torch

from llamita.model.llama import build
from llamita.model.shape import Shape
from llamita.recipes.judges import perplexity
from llamita.recipes.stages import open_model
from tests.fakes import byte_tokenizer
from tests.folders import save
from tests.weights import filled

TEXTS = ["the cat sat", "", "x", "straße 猫", "a longer text than all the others", "the cat sat"]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def saved(folder, dtype=None):
    tokenizer = byte_tokenizer()
    shape = Shape(
        dim=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=64, vocab_size=tokenizer.vocab_size,
        max_seq_len=64,
    )  # fmt: skip
    model = filled(build(shape))
    save(model, tokenizer, folder, dtype)
    return model, tokenizer


def bits_per_byte(model, tokenizer, text: str, most: int) -> float:
    """One token after another, no batch, no padding."""
    ids = [tokenizer.bos_id, *tokenizer.encode(text)[:most]]
    bits = 0.0
    with torch.inference_mode():
        for place in range(1, len(ids)):
            logits = model(torch.tensor([ids[:place]]))[0, -1].double()
            bits -= float(torch.log_softmax(logits, 0)[ids[place]]) / np.log(2)
    return bits / max(1, len(ids) - 1)


def test_bits_per_byte_are_the_mean_log_likelihood(tmp_path, threads):
    model, tokenizer = saved(tmp_path / "m")
    found = pickle.loads(pickle.dumps(perplexity(tmp_path / "m")))()(TEXTS)
    expected = [bits_per_byte(model, tokenizer, text, 512) for text in TEXTS]
    assert found.dtype == np.float32 and found[1] == 0 and found[2] > 0
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert np.ptp(found[[0, 2, 3, 4]]) > 0.1


def test_a_text_scores_alike_in_any_company(tmp_path, threads):
    saved(tmp_path / "m")
    judge = perplexity(tmp_path / "m")()
    many = [text * (1 + i % 5) for i in range(5) for text in TEXTS]
    alone = np.concatenate([judge([text]) for text in many])
    np.testing.assert_allclose(judge(many), alone, rtol=1e-5)
    assert judge(many).tolist() == judge(many).tolist()
    assert judge([]).shape == (0,) and judge([""]).tolist() == [0]


def test_only_the_beginning_counts_and_weights_of_bf16_are_widened(tmp_path, threads):
    _, tokenizer = saved(tmp_path / "m", torch.bfloat16)
    model = open_model(tmp_path / "m")[0].float()
    judge = perplexity(tmp_path / "m", max_tokens=5)()
    assert judge(["abcdefgh"])[0] == judge(["abcde" + "z" * 10_000])[0] != judge(["abcdz"])[0]
    whole = perplexity(tmp_path / "m")()  # no more than the model has places for
    text = "every word counts up to a point " * 10
    assert whole([text])[0] == pytest.approx(bits_per_byte(model, tokenizer, text, 64), rel=1e-5)
    assert whole([text])[0] == whole([text[:64]])[0] != whole([text[:63]])[0]

"""Advice on a vocabulary: the arithmetic by hand, the laws against published points, the whole on real source code."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest

from llamita.data.read import Document
from llamita.model.shape import preset
from llamita.plan import vocabulary
from llamita.plan.vocabulary import Measured, advise, default_flops, predicted_bits_per_byte, size, tao_optimum
from llamita.recipes import vocabularies

SHAPE = preset("100m")


def measured(vocab_size: int, bytes_per_token: float, unused: int = 0) -> Measured:
    counts = np.full(vocab_size - 256, 10)
    counts[:unused] = 0
    return Measured(vocab_size, round(bytes_per_token * counts.sum()), counts)


def test_a_row_by_hand():
    row = size(SHAPE, measured(32_768, 4.0, unused=8128), flops=1e18)
    assert row.num_params == 100_682_496 and row.file_bytes == 2 * 100_682_496
    assert row.embedding_share == pytest.approx(32_768 * 768 / 100_682_496)
    assert row.train_flops_per_byte == SHAPE.train_flops_per_token(8192) / 4 == 3 * row.decode_flops_per_byte
    assert row.budget_tokens * SHAPE.train_flops_per_token(8192) == pytest.approx(1e18)
    assert row.budget_bytes == pytest.approx(4 * row.budget_tokens)
    assert row.kv_bytes_per_kib == 2 * 12 * 4 * 64 * 2 * 1024 / 4
    assert row.unused == 0.25 and row.train_memory_bytes == 16 * 100_682_496
    untied = size(preset("100m", tied=False), measured(32_768, 4.0), flops=1e18)
    assert untied.embedding_share * untied.num_params == pytest.approx(2 * row.embedding_share * row.num_params)


def test_the_default_budget_is_twenty_tokens_a_parameter():
    row = size(SHAPE, measured(SHAPE.vocab_size, 4.0), default_flops(SHAPE))
    assert row.budget_tokens == pytest.approx(20 * SHAPE.num_params)


def test_what_compresses_better_at_the_same_size_is_predicted_better_and_a_larger_head_must_pay():
    flops = default_flops(SHAPE)
    better, worse = (size(SHAPE, measured(32_768, bpt), flops).bits_per_byte for bpt in (4.2, 4.0))
    assert better < worse
    small, large = (size(SHAPE, measured(entries, 4.0), flops).bits_per_byte for entries in (32_768, 65_536))
    assert small < large
    assert predicted_bits_per_byte(SHAPE, 1e9) > predicted_bits_per_byte(SHAPE, 1e10)


def test_the_law_fits_the_published_points(shared_data):
    """245 runs that Epoch AI read off Hoffmann et al.'s figure 4; constants as published, nothing fitted here."""
    errors = []
    with (shared_data / "scaling" / "chinchilla" / "svg_extracted_data.csv").open() as lines:
        for row in csv.DictReader(lines):
            params, flops, loss = (float(row[key]) for key in ("Model Size", "Training FLOP", "loss"))
            tokens = flops / 6 / params
            law = vocabulary.CHINCHILLA_E + vocabulary.CHINCHILLA_A / params**vocabulary.CHINCHILLA_ALPHA
            errors.append(math.log(law + vocabulary.CHINCHILLA_B / tokens**vocabulary.CHINCHILLA_BETA) - math.log(loss))
    assert len(errors) == 245 and np.median(np.abs(errors)) < 0.01


@pytest.mark.parametrize(
    ("trunk", "dim", "wanted"), [(2.87e9, 3200, 37_000), (7e9, 4096, 60_000), (70e9, 8192, 212_000)]
)
def test_the_optimum_of_the_parametric_law_is_the_papers(trunk, dim, wanted):
    """Tao et al. 2024, table 1, approach 3, at the compute that is optimal for each trunk by their approach 1."""
    shape = preset("llama3-8b", dim=dim, num_layers=1, num_heads=32, num_kv_heads=32, ffn_dim=1)
    layers = round(trunk / shape.params_per_layer)
    shape = preset("llama3-8b", dim=dim, num_layers=layers, num_heads=32, num_kv_heads=32, ffn_dim=1)
    flops = (trunk / math.exp(-2.48465)) ** 2
    assert tao_optimum(shape, flops) == pytest.approx(wanted, rel=0.06)


def test_the_recommendation_is_the_least_predicted_loss_and_says_what_its_neighbours_cost():
    sizes = [measured(65_536, 4.32), measured(4096, 3.5), measured(16_384, 4.15), measured(32_768, 4.27)]
    advice = advise(SHAPE, sizes, default_flops(SHAPE))
    assert [row.vocab_size for row in advice.sizes] == [4096, 16_384, 32_768, 65_536]
    assert advice.recommended == min(advice.sizes, key=lambda row: row.bits_per_byte).vocab_size == 16_384
    said = " ".join(advice.reasons)
    assert "4,096, the next smaller" in said and "32,768, the next larger" in said and "Tao et al." in said
    assert "with care" not in said and "with care" in " ".join(advise(SHAPE, sizes, 1e15).reasons)
    only = advise(SHAPE, sizes[:1], 1e18)
    assert only.recommended == 65_536 and "next" not in " ".join(only.reasons)
    with pytest.raises(ValueError, match="no vocabulary to compare"):
        advise(SHAPE, [], 1e18)


# ---- on text ----


def library(num: int) -> list[Document]:
    files = sorted(Path(json.__file__).parents[1].glob("*.py"))[:num]
    return [Document(path.read_text(encoding="utf-8"), path.name, "code") for path in files]


def test_advice_on_source_code(capsys):
    docs = library(120)
    advice = vocabularies.advise(docs, preset("demo"), sizes=(1024, 2048, 4096, 10**6))
    assert [row.vocab_size for row in advice.sizes] == [1024, 2048, 4096]
    assert "the text gives no more than" in capsys.readouterr().err
    compressions = [row.bytes_per_token for row in advice.sizes]
    assert compressions == sorted(compressions) and 2 < compressions[0] < compressions[-1] < 5
    vocabularies.show_advice(advice)
    out = capsys.readouterr().out
    assert f"Recommended: {advice.recommended:,} entries" in out and max(map(len, out.splitlines())) <= 110


def test_a_smaller_vocabulary_is_the_beginning_of_a_larger(tmp_path):
    docs = library(20)
    large = vocabularies.train(docs, 2048, tmp_path / "large").tokenizer
    small = vocabularies.train(docs, 1024, tmp_path / "small").tokenizer
    assert large.tokens[: 1024 - 256] == small.tokens


def test_too_few_documents_to_hold_one_out():
    with pytest.raises(ValueError, match="the text has 3 documents: give at least 20"):
        vocabularies.advise(library(3), preset("demo"), sizes=(1024,))

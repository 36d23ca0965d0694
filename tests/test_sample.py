"""Layer: numerics against a plain twin (Hugging Face's logits processors) and by hand."""

import pytest
import torch

from llamita.serve import sample
from llamita.serve.sample import Sampling, choose, row_generators

FORBIDDEN = sample.NEVER


def logits(rows: int = 6, vocab_size: int = 97) -> torch.Tensor:
    return 3 * torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(0))


def logs(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities]).log()


def allowed(logits_BV: torch.Tensor) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in logits_BV > FORBIDDEN]


@pytest.mark.parametrize("value", [0.05, 0.3, 0.9, 0.99])
@pytest.mark.parametrize("name", ["TopP", "MinP"])
def test_probability_filters_equal_hugging_faces(name, value):
    from transformers import generation

    ours = {"TopP": sample.top_p, "MinP": sample.min_p}[name](logits(), value)
    assert torch.equal(ours, getattr(generation, name + "LogitsWarper")(value)(None, logits()))


@pytest.mark.parametrize("k", [1, 2, 50, 96, 97, 1000])
def test_top_k_equals_hugging_faces(k):
    from transformers.generation import TopKLogitsWarper

    assert torch.equal(sample.top_k(logits(), k), TopKLogitsWarper(k)(None, logits()))


@pytest.mark.parametrize("penalty", [0.7, 1.3, 2.0])
def test_penalty_equals_hugging_faces(penalty):
    from transformers.generation import RepetitionPenaltyLogitsProcessor

    contexts = torch.randint(97, (6, 20), generator=torch.Generator().manual_seed(1))
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(contexts, logits())
    torch.testing.assert_close(sample.penalize(logits(), contexts.tolist(), penalty), theirs)


def test_all_filters_together_equal_hugging_faces():
    """The order of the filters: another order gives another set, as the last line shows."""
    from transformers.generation import (
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    theirs = logits()
    for warper in (
        TemperatureLogitsWarper(1.7),
        TopKLogitsWarper(20),
        TopPLogitsWarper(0.8),
        MinPLogitsWarper(0.1),
    ):
        theirs = warper(None, theirs)
    ours = sample.filtered(logits(), Sampling(temperature=1.7, top_k=20, top_p=0.8, min_p=0.1))
    assert torch.equal(ours, theirs)
    other = sample.top_k(sample.top_p(logits() / 1.7, 0.8), 20)
    assert allowed(other) != allowed(ours)


def test_filters_by_hand():
    fair = logs(0.1, 0.4, 0.2, 0.3)
    assert allowed(sample.top_k(fair, 2)) == [[1, 3]]
    assert allowed(sample.top_p(fair, 0.6)) == [[1, 3]]
    assert allowed(sample.top_p(fair, 0.75)) == [[1, 2, 3]]
    assert allowed(sample.top_p(fair, 1e-9)) == [[1]]
    assert allowed(sample.min_p(fair, 0.6)) == [[1, 3]]
    assert allowed(sample.min_p(fair, 1.0)) == [[1]]
    tied = logs(0.3, 0.3, 0.3, 0.1)
    assert allowed(sample.top_k(tied, 1)) == [[0, 1, 2]]
    penalized = sample.penalize(torch.tensor([[2.0, -2.0, 2.0]]), [[0, 1, 0]], 4.0)
    assert penalized.tolist() == [[0.5, -8.0, 2.0]]


def test_greedy_takes_the_best_after_the_penalty():
    generators = row_generators([[0]], seed=0)
    best = torch.tensor([[1.0, 3.0, 2.0]])
    assert choose(best, Sampling(temperature=0), [[1]], generators) == [1]
    assert choose(best, Sampling(temperature=0, repetition_penalty=2), [[1]], generators) == [2]


def test_draws_follow_the_probabilities_and_never_take_what_is_forbidden():
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0])
    sampling, generators = Sampling(temperature=1, top_p=1), row_generators([[0]], seed=5)
    drawn = torch.zeros(6)
    for _ in range(2000):
        drawn[choose(probabilities.log().unsqueeze(0), sampling, [[0]], generators)[0]] += 1
    assert drawn[[0, 2, 5]].sum() == 0
    # The standard error of a share is at most sqrt(0.25 / 2000) = 0.011.
    torch.testing.assert_close(drawn / 2000, probabilities, rtol=0, atol=0.045)


@pytest.mark.parametrize("uniform, token", [(0.0, 1), (1 - 2**-53, 4)])
def test_the_ends_of_the_unit_interval_draw_allowed_tokens(uniform, token, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.full(size, uniform, dtype=torch.float64))
    probabilities = logs(0.0, 0.5, 0.0, 0.2, 0.3, 0.0)
    assert choose(probabilities, Sampling(temperature=1, top_p=1), [[0]], row_generators([[0]], seed=0)) == [token]


def test_temperature_sharpens():
    fair, counts = logs(0.6, 0.4), {}
    for temperature in (0.1, 1.0, 100.0):
        sampling, generators = Sampling(temperature=temperature, top_p=1), row_generators([[0]], seed=1)
        counts[temperature] = sum(choose(fair, sampling, [[0]], generators)[0] for _ in range(500)) / 500
    assert counts[0.1] < 0.1 < 0.33 < counts[1.0] < 0.47 < counts[100.0] < 0.57


def test_a_row_draws_the_same_alone_and_in_any_company():
    prompts, sampling, wide = [[1], [2, 3], [4]], Sampling(temperature=2.0), logits(3)

    def draws(chosen: list[int]) -> dict[int, list[int]]:
        picked = [prompts[row] for row in chosen]
        generators = row_generators(picked, seed=7)
        steps = [choose(wide[chosen], sampling, picked, generators) for _ in range(10)]
        return {row: [step[place] for step in steps] for place, row in enumerate(chosen)}

    alone = {row: draws([row])[row] for row in range(3)}
    assert draws([0, 1, 2]) == alone
    assert draws([2, 0]) == {0: alone[0], 2: alone[2]}
    assert alone[0] != alone[1]


def test_the_same_prompt_again_and_another_seed_draw_other_samples():
    sampling = Sampling(temperature=1, top_p=1)
    flat = torch.zeros(2, 1000)
    twice = [choose(flat, sampling, [[1], [1]], row_generators([[1], [1]], seed)) for seed in (0, 0, 1)]
    assert twice[0] == twice[1]
    assert twice[0][0] != twice[0][1]
    assert twice[0][0] != twice[2][0]


@pytest.mark.parametrize(
    "name, value",
    [
        ("max_tokens", 0),
        ("temperature", -1),
        ("temperature", 1e-9),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_k", -1),
        ("min_p", -0.1),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("stop", ("a", "")),
        ("stop", ""),
    ],
)
def test_what_is_out_of_range_is_named(name, value):
    with pytest.raises(ValueError, match=rf"sampling\.{name} must be") as error:
        Sampling(**{name: value})
    assert "\n" not in str(error.value)


def test_one_stop_string_needs_no_tuple():
    assert Sampling(stop="abc").stop == Sampling(stop=["abc"]).stop == ("abc",)


def test_broken_logits_are_an_error_and_no_token():
    with pytest.raises(ValueError, match="NaN"):
        choose(torch.full((1, 3), float("nan")), Sampling(), [[0]], row_generators([[0]], 0))

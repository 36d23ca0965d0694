"""Layer: arithmetic. What is decided of a document by itself, and what is kept to be looked at of those that go."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llamita.data import curate
from llamita.data.build import build
from llamita.data.curate import MAX_SAMPLES, Block, Curator, Removed, sample
from llamita.data.read import Document
from llamita.data.recipe import Quality, Recipe, Rules
from llamita.data.shards import Corpus
from llamita.data.strings import Strings
from tests.fakes import byte_tokenizer

PROSE = "The river of the town is old, and the people that live there say so. " * 4
PYTHON = "def f(x):\n    return x + 1\n\n\nclass A:\n    def g(self):\n        return self.x\n" * 4


def block(*texts, kinds=None) -> Block:
    kinds = kinds or [""] * len(texts)
    return Block.of(
        [Document(text, f"d{i}", "s", kind=kind) for i, (text, kind) in enumerate(zip(texts, kinds, strict=True))]
    )


def gone_and_kept(recipe: Recipe, given: Block, judge=None, score=None) -> tuple[dict[str, str], list[str]]:
    """{name: reason} of what goes, and the names of what stays."""
    removed: dict[str, str] = {}
    decide = Curator(recipe, Path(), judge)
    if score:
        decide.score = score
    kept = decide(given, lambda lost, why: removed.update(zip(lost.columns["name"], why.tolist(), strict=True)))
    return removed, kept.columns["name"]


def test_the_kind_that_the_input_says_decides_which_rules_are_asked(tmp_path):
    recipe = Recipe("r", rules=Rules(prose=("words>=900",)))
    told = block(PROSE, PROSE, PROSE, PYTHON, PYTHON, kinds=["", "code", "article", "", "prose"])
    removed, kept = gone_and_kept(recipe, told)
    assert removed == dict.fromkeys(("d0", "d2", "d4"), "words>=900") and kept == ["d1", "d3"]
    rows = [{"text": f"{i} {PROSE}", "kind": kind} for i, kind in enumerate(["code", "article", "table"])]
    rows += [{"text": PYTHON, "metadata": {"kind": "prose"}}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build(Recipe("r"), [tmp_path / "a.jsonl"], byte_tokenizer(), tmp_path / "c")
    shares = json.loads((tmp_path / "c" / "build.json").read_bytes())["shares"]["kind"]
    assert {name: found["docs"] for name, found in shares.items()} == {"code": 1, "prose": 2, "table": 1}
    assert Corpus.open(tmp_path / "c").manifest.kinds == ["code", "prose", "table"]


def scored(values):
    return lambda strings: np.array(values, np.float32)


@pytest.mark.parametrize(("least", "kept"), [(0.5, ["d1", "d2"]), (0.0, ["d0", "d1", "d2"]), (0.91, [])])
def test_what_scores_less_than_the_threshold_goes(monkeypatch, least, kept):
    monkeypatch.setattr(curate, "scorer", lambda recipe: scored([0.49, 0.5, 0.9]))
    recipe = Recipe("r", quality=Quality(classifier="any", min_score=least))
    removed, stays = gone_and_kept(recipe, block(PROSE, PROSE, PROSE))
    assert stays == kept and set(removed.values()) <= {"quality"} and len(removed) + len(kept) == 3


@pytest.mark.parametrize(("most", "kept"), [(0.0, ["d0", "d1", "d2"]), (1.5, ["d0", "d1"]), (0.5, [])])
def test_what_takes_more_bits_than_the_limit_goes(most, kept):
    recipe = Recipe("r", quality=Quality(model="any", max_bits_per_byte=most))
    removed, stays = gone_and_kept(recipe, block(PROSE, PROSE, PROSE), judge=scored([0.9, 1.5, 2.0]))
    assert stays == kept and set(removed.values()) <= {"bits-per-byte"} and len(removed) + len(kept) == 3


def test_code_is_not_judged_as_prose(monkeypatch):
    monkeypatch.setattr(curate, "scorer", lambda recipe: scored([0.1]))
    recipe = Recipe("r", quality=Quality(classifier="any"))
    assert gone_and_kept(recipe, block(PYTHON, PROSE, kinds=["code", ""])) == ({"d1": "quality"}, ["d0"])


def removals(numbers) -> Removed:
    found = Removed()
    for start in range(0, len(numbers), 30):
        mine = numbers[start : start + 30]
        lost = Block(Strings.of([f"text {i}" for i in mine]), {"name": [f"n{i}" for i in mine]})
        found.add(lost, np.array(["odd" if i % 2 else "even" for i in mine], dtype=object))
    return found


def test_samples_are_drawn_from_all_that_goes_and_the_same_in_any_order():
    numbers = list(range(600))
    whole = removals(numbers)
    assert whole.docs == {"odd": 300, "even": 300} and whole.bytes["odd"] == sum(
        len(f"text {i}") for i in numbers[1::2]
    )
    places = {reason: [int(each["name"][1:]) for each in found] for reason, found in whole.samples.items()}
    for reason, found in places.items():
        assert len(set(found)) == MAX_SAMPLES and {i % 2 for i in found} == {reason == "odd"}
        assert 200 < np.mean(found) < 400 and max(found) > 500 and min(found) < 100, "not the first ones"
    random.Random(1).shuffle(numbers)
    assert removals(numbers).samples == whole.samples
    parts = [removals(numbers[:100]), removals(numbers[100:450]), removals(numbers[450:])]
    for reason in ("odd", "even"):
        assert sample([each for part in parts for each in part.samples[reason]]) == whole.samples[reason]
    assert all(each["text"] == f"text {each['name'][1:]}" for each in whole.samples["odd"])


def test_a_recipe_without_rules_measures_and_keeps_all():
    removed, kept = gone_and_kept(replace(Recipe("r"), rules=Rules()), block(PROSE, PYTHON))
    assert not removed and kept == ["d0", "d1"]


def test_texts_are_chosen_and_replaced_as_lists_are():
    draw = random.Random(0)
    for count in (0, 1, 7, 30):
        texts = [b"x" * draw.randrange(4) + str(i).encode() * draw.randrange(2) for i in range(count)]
        strings = Strings.of(texts)
        for _ in range(20):
            mask = np.array([draw.random() < 0.6 for _ in texts], bool)
            places = np.flatnonzero(mask)
            shuffled = np.array(draw.sample(places.tolist(), len(places)), np.int64)
            for which, wanted in ((mask, places), (places, places), (shuffled, shuffled)):
                chosen = strings.chosen(which)
                assert [chosen[i] for i in range(len(chosen))] == [texts[i] for i in wanted]
            others = [b"y" * draw.randrange(5) for _ in places]
            replaced = strings.with_texts(places.tolist(), others)
            by_place = dict(zip(places.tolist(), others, strict=True))
            assert [replaced[i] for i in range(count)] == [by_place.get(i, text) for i, text in enumerate(texts)]
            assert not replaced.data.flags.writeable and not strings.chosen(mask).data.flags.writeable

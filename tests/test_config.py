"""Pure arithmetic: config trees to TOML and back, strictly."""

import dataclasses

import pytest

from llamita import config
from llamita.model.shape import RopeScaling, preset
from llamita.recipes.runs import RECIPES, recipe, sources
from llamita.train.run import Run


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_toml(name, tmp_path):
    config.save(recipe(name), tmp_path / "run.toml")
    assert config.load(Run, tmp_path / "run.toml") == recipe(name)


def test_optional_subtree_survives_toml(tmp_path):
    run = Run(name="scaled", shape=preset("tiny", rope_scaling=RopeScaling(factor=32.0)))
    config.save(run, tmp_path / "run.toml")
    assert config.load(Run, tmp_path / "run.toml").shape.rope_scaling == RopeScaling(factor=32.0)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('name = "x"\nstepz = 3', "unknown setting 'stepz'; did you mean 'steps'?"),
        ('name = "x"', "the setting 'shape' is missing"),
        ('name = "x"\nsteps = "many"', "steps wants int, got 'many'"),
        ('name = "x"\nprecision = "fp9"', "precision = 'fp9' is unknown"),
        ("name = ", "Invalid value"),
    ],
)
def test_bad_toml_is_one_line_that_names_file_and_key(text, complaint, tmp_path):
    path = tmp_path / "run.toml"
    shape = "\n[shape]\ndim=64\nnum_layers=1\nnum_heads=2\nnum_kv_heads=1\nffn_dim=64\nvocab_size=512\n"
    path.write_text(text + (shape if "is missing" not in complaint else ""))
    with pytest.raises(ValueError) as error:
        config.load(Run, path)
    assert complaint in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_override_reaches_any_leaf_and_refuses_the_misspelt():
    run = config.override(recipe("tiny"), {"optim.lr": 1, "shape.tied": False})
    assert run.optim.lr == 1.0 and run.shape.tied is False
    with pytest.raises(ValueError, match=r"unknown setting 'optim.lrr'; did you mean 'optim.lr'"):
        config.override(run, {"optim.lrr": 1.0})
    with pytest.raises(ValueError, match="wants bool"):
        config.override(run, {"shape.tied": 1})


def test_diff_names_what_changed_and_nothing_else():
    old = recipe("tiny")
    new = dataclasses.replace(old, seed=5)
    assert config.diff(old, new) == {"seed": (0, 5)}
    assert config.diff(old, old) == {}


def test_sources_say_where_each_value_comes_from():
    changed = config.override(recipe("tiny"), {"optim.lr": 0.5})
    origin = sources(changed, recipe("tiny"), "recipe tiny", "command line")
    assert origin["optim.lr"] == "command line"
    assert origin["steps"] == "recipe tiny"
    assert origin["optim.clip"] == "default"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"batch_size": 6, "micro_batch_size": 4}, "not a multiple"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"log": {"every": 0}}, "log.every must be at least 1"),
    ],
)
def test_impossible_runs_are_refused(changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        config.from_dict(Run, config.to_dict(recipe("tiny")) | changes)


def test_rows_longer_than_the_model_sees_are_refused():
    with pytest.raises(ValueError, match=r"data.seq_len 1024 exceeds shape.max_seq_len 512"):
        config.override(recipe("tiny"), {"data.seq_len": 1024})

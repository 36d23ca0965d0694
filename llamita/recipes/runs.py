"""Recipes: functions that return a Run. What differs from the defaults is here, with its reason."""

from dataclasses import replace

from llamita.config import flatten, nearest
from llamita.model.shape import MAX_SIZE, preset
from llamita.train.run import Checkpoint, Data, Log, Optim, Run, Schedule


def demo() -> Run:
    """A real small Llama 3 in minutes on two cores: few layers, short rows and Muon, by trial (LOG.md)."""
    return Run(
        name="demo",
        shape=preset("demo"),
        data=Data(seq_len=256),
        optim=Optim(kind="muon", lr=6e-3, muon_lr=4e-3),
        schedule=Schedule(kind="wsd", warmup_steps=20, decay_share=0.4),
        checkpoint=Checkpoint(every=200),
        log=Log(every=20, eval_every=200, sample_every=400),
    )


def sft() -> Run:
    """Fine-tuning on conversations, falling to zero."""
    return Run(
        name="sft",
        shape=preset("demo"),
        data=Data(seq_len=256),
        optim=Optim(kind="muon", lr=3e-3, muon_lr=3e-3, weight_decay=0.0),
        schedule=Schedule(kind="cosine", warmup_steps=10),
        checkpoint=Checkpoint(every=100),
        log=Log(every=20, eval_every=100, sample_every=100),
    )


def tiny() -> Run:
    """The smallest run that learns: for tests and for trying things out."""
    return Run(
        name="tiny",
        shape=preset("tiny"),
        steps=100,
        data=Data(seq_len=128),
        schedule=Schedule(warmup_steps=10),
        checkpoint=Checkpoint(every=20),
    )


def llama_100m() -> Run:
    """100M parameters at a batch of 0.5M tokens, on the schedule of SmolLM2-135M (WSD, 2,000 steps of warm-up)."""
    return Run(
        name="100m",
        shape=preset("100m"),
        steps=20_000,
        batch_size=256,
        micro_batch_size=16,
        data=Data(seq_len=2048),
        optim=Optim(lr=1e-3),
        schedule=Schedule(kind="wsd", warmup_steps=2000, decay_share=0.1),
        checkpoint=Checkpoint(every=1000, keep=3),
        log=Log(every=10, eval_every=1000, sample_every=1000),
    )


RECIPES = {"demo": demo, "sft": sft, "tiny": tiny, "100m": llama_100m}


def recipe(name: str) -> Run:
    """The Run of the named recipe. Raises ValueError that names the nearest for an unknown one."""
    if name not in RECIPES:
        raise ValueError(f"no recipe is called {name!r}{nearest(name, RECIPES)}")
    return RECIPES[name]()


def sources(run: Run, recipe: Run, recipe_name: str, last: str) -> dict[str, str]:
    """Where each setting's value comes from: the dataclass's default, the recipe (any shape is its), or `last`."""
    wanted = flatten(recipe)
    plain = flatten(Run(name="", shape=replace(recipe.shape, max_seq_len=MAX_SIZE)))
    return {
        key: last
        if value != wanted.get(key)
        else recipe_name
        if key.startswith("shape.") or value != plain.get(key)
        else "default"
        for key, value in flatten(run).items()
    }

"""Recipes: functions that return a Run. What differs from the defaults is here, with its reason."""

from llamita.config import flatten, nearest
from llamita.model.shape import preset
from llamita.train.run import Checkpoint, Data, Log, Optim, Run, Schedule


def demo() -> Run:
    """A real small Llama 3 in minutes on two cores; Muon reaches a lower loss in the same time (LOG.md)."""
    return Run(
        name="demo",
        shape=preset("demo"),
        batch_size=8,
        micro_batch_size=8,
        data=Data(seq_len=512),
        optim=Optim(kind="muon", lr=3e-3, muon_lr=0.02),
        schedule=Schedule(kind="wsd", warmup_steps=50, decay_share=0.4),
        checkpoint=Checkpoint(every=150),
        log=Log(every=10, eval_every=150, sample_every=150),
    )


def sft() -> Run:
    """Fine-tuning on conversations: a tenth of the pretraining rates, falling to zero."""
    return Run(
        name="sft",
        shape=preset("demo"),
        batch_size=8,
        micro_batch_size=8,
        data=Data(seq_len=512),
        optim=Optim(lr=1e-3, weight_decay=0.0),
        schedule=Schedule(kind="cosine", warmup_steps=10),
        checkpoint=Checkpoint(every=50),
        log=Log(every=10, eval_every=50, sample_every=50),
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
    """Where each setting's value comes from: the dataclass's default, the recipe, or `last`."""
    values, wanted = flatten(run), flatten(recipe)
    plain = flatten(Run(name="", shape=recipe.shape))
    return {
        key: last if value != wanted.get(key) else recipe_name if value != plain.get(key) else "default"
        for key, value in values.items()
    }

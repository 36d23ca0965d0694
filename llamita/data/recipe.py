"""What is done to raw text: a recipe, plain values that go into a file, a fingerprint and the corpus's own papers."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from llamita.config import load, nearest, to_dict


@dataclass(frozen=True)
class Language:
    """Which natural languages stay. Code and tables have none and always stay."""

    identify: bool = False
    """Identify the language of each document; without it, rows keep what they say of themselves."""
    keep: tuple[str, ...] = ()
    """ISO 639-1 codes (639-3 where there is none) that stay; where none is named all, `und` too: what could not be
    told, which is tables of numbers, short texts, and languages that the identifier does not know."""


@dataclass(frozen=True)
class Rules:
    """Presets (`gopher-quality@1`) and predicates of one's own (`words>=50`) that a document must pass, by kind."""

    prose: tuple[str, ...] = ()
    code: tuple[str, ...] = ()
    table: tuple[str, ...] = ()
    c4_lines: bool = False
    """Drop lines of prose as C4 does, before anything is measured: menus, cookie notices, fewer than three words."""


@dataclass(frozen=True)
class Quality:
    """Judgments by models. Prose only."""

    classifier: str = ""
    """A classifier as `llamita data judge` writes it, or a fastText model (.bin, .ftz)."""
    label: str = ""
    """Of a fastText model: the label whose probability is the score."""
    min_score: float = 0.5
    model: str = ""
    """A model folder whose bits per byte are measured on the beginning of each document."""
    max_bits_per_byte: float = 0.0
    """Documents above it go; 0 keeps all and only writes the column."""


@dataclass(frozen=True)
class Dedup:
    """Which of several alike documents stays, and what counts as alike."""

    exact: bool = True
    url: bool = False
    minhash: bool = False
    scope: Literal["global", "source", "language"] = "global"
    """Documents are compared within it: FineWeb found better models with dumps kept apart (arXiv 2406.17557, 3.4)."""
    keep: Literal["first", "longest", "newest"] = "first"
    similarity: float = 0.8
    """Jaccard similarity of word 5-grams from which two documents are the same."""
    lines_more_than: int = 0
    """Lines of prose seen more often than this in a bucket go (Llama 3: 6); 0 turns it off."""
    bucket_docs: int = 30_000_000
    """Documents of a bucket (Llama 3: 30 million)."""
    substring_bytes: int = 0
    """Spans of at least so many bytes that stand in a part of the input a second time go; 0 turns it off."""


@dataclass(frozen=True)
class Contamination:
    """Evaluation items that must not be trained on."""

    evals: tuple[str, ...] = ()
    """Files and folders of evaluation sets."""
    action: Literal["drop", "cut", "report"] = "drop"


@dataclass(frozen=True)
class Recipe:
    """From raw text to a corpus."""

    name: str
    extract: Literal["fast", "precise", "union"] = "fast"
    """How the main text of HTML is found."""
    pii: bool = False
    """Replace e-mail addresses, phone numbers, keys and the like by placeholders."""
    heldout_share: float = 0.05
    """Share of the documents that is kept from training."""
    seed: int = 0
    """Key of the held-out split and of the order in the shards."""
    language: Language = field(default_factory=Language)
    rules: Rules = field(default_factory=Rules)
    quality: Quality = field(default_factory=Quality)
    dedup: Dedup = field(default_factory=Dedup)
    contamination: Contamination = field(default_factory=Contamination)

    def __post_init__(self) -> None:
        if not 0 < self.heldout_share < 1:
            raise ValueError(f"heldout_share must lie between 0 and 1, both excluded, not {self.heldout_share}")
        for name in ("lines_more_than", "substring_bytes"):
            if getattr(self.dedup, name) < 0:
                raise ValueError(f"dedup.{name} must be 0 (off) or more, not {getattr(self.dedup, name)}")
        if self.dedup.bucket_docs < 1:
            raise ValueError(f"dedup.bucket_docs must be at least 1, not {self.dedup.bucket_docs}")
        strange = [code for code in self.language.keep if not (code.islower() and len(code) in (2, 3))]
        if strange:
            raise ValueError(f"language.keep: {strange[0]!r} is no code of ISO 639; write en, de, und")
        if self.quality.max_bits_per_byte and not self.quality.model:
            raise ValueError("quality.max_bits_per_byte asks for quality.model: name the model that measures them")
        if not 0 < self.dedup.similarity <= 1:
            raise ValueError(f"dedup.similarity must be more than 0 and at most 1, not {self.dedup.similarity}")

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(to_dict(self), sort_keys=True).encode()).hexdigest()


def plain() -> Recipe:
    """Text that is good as it is: only exact duplicates go."""
    return Recipe("plain")


def web() -> Recipe:
    """Web pages as FineWeb cleans them (arXiv 2406.17557), but of all languages: the identified one is a column, and
    text in none stays as `und` (FineWeb keeps English alone; `language.keep` names those that stay)."""
    return Recipe(
        "web",
        pii=True,
        language=Language(identify=True),
        rules=Rules(
            prose=("gopher-repetition@1", "gopher-quality@1", "c4@1", "fineweb@1"), code=("code@1",), c4_lines=True
        ),
        dedup=Dedup(url=True, minhash=True),
    )


def books() -> Recipe:
    """Long prose: repetition and near duplicates go; no rule that is meant for web pages."""
    return Recipe(
        "books",
        language=Language(identify=True),
        rules=Rules(prose=("gopher-repetition@1",)),
        dedup=Dedup(minhash=True, keep="longest"),
    )


def code() -> Recipe:
    """Source code and its documentation: StarCoder's rules and near duplicates, secrets replaced."""
    return Recipe("code", pii=True, rules=Rules(code=("code@1",)), dedup=Dedup(minhash=True))


def llama3() -> Recipe:
    """All that section 3.1.1 of the Llama 3 paper does (arXiv 2407.21783), lines seen more than six times included."""
    return replace(web(), name="llama3", dedup=Dedup(url=True, minhash=True, keep="newest", lines_more_than=6))


RECIPES: dict[str, Callable[[], Recipe]] = {
    "plain": plain, "web": web, "books": books, "code": code, "llama3": llama3
}  # fmt: skip


def placed(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with the files that it names as absolute paths, relative ones taken from `folder` on: so tasks find
    them wherever they run, and so does who is given the corpus's own `recipe.toml` back."""

    def path(named: str) -> str:
        return named if not named or "://" in named else os.path.abspath(folder / named)

    quality, contamination = recipe.quality, recipe.contamination
    return replace(
        recipe,
        quality=replace(quality, classifier=path(quality.classifier), model=path(quality.model)),
        contamination=replace(contamination, evals=tuple(map(path, contamination.evals))),
    )


def recipe(name: str) -> Recipe:
    """A recipe by name, or from a .toml file, beside which the files that it names are looked for. Raises ValueError
    that names the nearest."""
    if name in RECIPES:
        return RECIPES[name]()
    if name.endswith(".toml") and Path(name).is_file():
        return placed(load(Recipe, Path(name)), Path(name).parent)
    raise ValueError(f"no data recipe is called {name!r}{nearest(name, RECIPES)} (or give a .toml file)")

"""One part of the raw input through all that is decided of a document by itself: its kind and language, signals, rules,
quality, evaluation items, personal data. What remains is hashed for the search of duplicates.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llamita.data import contamination, kind, language, measure, pii, presets, script
from llamita.data.c4 import c4_lines
from llamita.data.duplicates import name_hashes
from llamita.data.read import Document
from llamita.data.recipe import Recipe
from llamita.data.strings import Strings

if TYPE_CHECKING:
    import pyarrow

BLOCK_BYTES = 4 * 2**20
MAX_SAMPLES = 20
SAMPLE_CHARS = 300
NATURAL = ("prose", "table")  # kinds whose words are of a natural language
STAYS = ""

Judge = Callable[[list[str]], np.ndarray]


@dataclass(frozen=True)
class Block:
    """Some documents on their way: their texts, and a list or array [len] of each thing known about them."""

    strings: Strings
    columns: dict[str, Any]

    @classmethod
    def of(cls, docs: list[Document]) -> "Block":
        names = ("name", "source", "url", "license", "date", "lang", "kind")
        columns: dict[str, Any] = {name: [getattr(document, name) for document in docs] for name in names}
        return cls(Strings.of([document.text for document in docs]), columns)

    def __len__(self) -> int:
        return len(self.strings)

    def where(self, mask: np.ndarray) -> "Block":
        """The documents for which `mask`, bool [len], holds."""
        if mask.all():
            return self
        places = np.flatnonzero(mask).tolist()
        chosen = {
            name: column[mask] if isinstance(column, np.ndarray) else [column[place] for place in places]
            for name, column in self.columns.items()
        }
        return Block(self.strings.chosen(mask), chosen)

    def with_columns(self, columns: dict[str, Any]) -> "Block":
        return Block(self.strings, self.columns | columns)

    def is_kind(self, *kinds: str) -> np.ndarray:
        """bool [len]"""
        return np.isin(np.array(self.columns["kind"], dtype=str), kinds)

    def table(self) -> "pyarrow.Table":
        import pyarrow

        return pyarrow.table({"text": self.strings.to_arrow(), **self.columns, "num_bytes": self.strings.sizes})


@dataclass
class Removed:
    """What went, by reason: how many documents, how many bytes, some of them to be looked at."""

    docs: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    samples: dict[str, list[dict[str, str]]] = field(default_factory=dict)

    def add(self, block: Block, reasons: np.ndarray) -> None:
        places: dict[str, list[int]] = {}
        for i, reason in enumerate(reasons.tolist()):
            self.docs[reason] += 1
            self.bytes[reason] += int(block.strings.sizes[i])
            places.setdefault(reason, []).append(i)
        names = block.columns["name"]
        for reason, mine in places.items():
            likely = np.argsort(name_hashes([names[i] for i in mine]), kind="stable")[:MAX_SAMPLES]
            found = [{"name": names[mine[i]], "text": excerpt(block.strings[mine[i]])} for i in likely.tolist()]
            self.samples[reason] = sample(self.samples.get(reason, []) + found)

    def facts(self) -> dict[str, Any]:
        return {"docs": self.docs, "bytes": self.bytes, "samples": self.samples}


def sample(documents: list[dict[str, str]]) -> list[dict[str, str]]:
    """The MAX_SAMPLES whose names have the smallest hashes: as good as drawn by lot, and the same samples whether all
    are given at once or, in any order, samples of parts of them."""
    order = np.argsort(name_hashes([document["name"] for document in documents]), kind="stable")
    return [documents[i] for i in order[:MAX_SAMPLES].tolist()]


def excerpt(text: bytes) -> str:
    return text[: 4 * SAMPLE_CHARS].decode(errors="ignore")[:SAMPLE_CHARS]


def blocks(docs: Iterable[Document]) -> Iterator[Block]:
    """Blocks of about BLOCK_BYTES of text."""
    waiting: list[Document] = []
    size = 0
    for document in docs:
        waiting.append(document)
        size += len(document.text)
        if size >= BLOCK_BYTES:
            yield Block.of(waiting)
            waiting, size = [], 0
    if waiting:
        yield Block.of(waiting)


class Curator:
    """Decides block by block. `judge` gives bits per byte of texts, where the recipe names a model."""

    def __init__(self, recipe: Recipe, index: Path, judge: Judge | None = None):
        """`index` = where the evaluation items lie (`contamination.Index.save`), if the recipe names any."""
        self.recipe = recipe
        self.hits: list[dict[str, Any]] = []
        self.steps: list[Callable[[Block], tuple[Block, np.ndarray]]] = [self._typed]
        if recipe.language.identify or recipe.language.keep:
            self.steps.append(self._in_language)
        if recipe.rules.c4_lines:
            self.steps.append(self._without_c4_lines)
        self.steps.append(self._by_rules)
        if recipe.quality.classifier:
            self.score = scorer(recipe)
            self.steps.append(self._by_quality)
        if judge is not None:
            self.judge = judge
            self.steps.append(self._by_perplexity)
        if recipe.contamination.evals:
            self.index = contamination.Index.load(index)
            self.steps.append(self._without_evals)
        if recipe.pii:
            self.steps.append(self._without_pii)

    def __call__(self, block: Block, remove: Callable[[Block, np.ndarray], None]) -> Block:
        """What stays of a block; `remove` is told what went, and why, str [len]."""
        for step in self.steps:
            if len(block):
                block, reasons = step(block)
                gone = reasons != STAYS
                if gone.any():
                    remove(block.where(gone), reasons[gone])
                    block = block.where(~gone)
        return block

    def _typed(self, block: Block) -> tuple[Block, np.ndarray]:
        kinds, code_langs = kind.kinds(block.columns["name"], block.strings)
        said = block.columns["kind"]
        found = [own if own in kind.KINDS else guess for own, guess in zip(said, kinds, strict=True)]
        langs = [lang if is_of == kind.CODE else "" for lang, is_of in zip(code_langs, found, strict=True)]
        return block.with_columns({"kind": found, "code_lang": langs}), stays(block)

    def _in_language(self, block: Block) -> tuple[Block, np.ndarray]:
        natural = block.is_kind(*NATURAL)
        langs, scores = list(block.columns["lang"]), np.ones(len(block), np.float32)
        if self.recipe.language.identify:
            places = np.flatnonzero(natural)
            texts = block.strings.chosen(places)
            found, found_scores = language.identify(texts, script.scripts(texts))
            langs = ["" for _ in langs]
            for place, lang in zip(places.tolist(), found, strict=True):
                langs[place] = lang
            scores[places] = found_scores
        block = block.with_columns({"lang": langs, "lang_score": scores})
        keep = self.recipe.language.keep
        gone = natural & ~np.isin(np.array(langs, dtype=str), keep) if keep else np.zeros(len(block), bool)
        return block, reasons(gone, "language")

    def _without_c4_lines(self, block: Block) -> tuple[Block, np.ndarray]:
        prose = np.flatnonzero(block.is_kind("prose"))
        block = Block(replaced(block.strings, prose, c4_lines(block.strings.chosen(prose))), block.columns)
        return block, reasons(block.strings.sizes == 0, "c4-lines@1:nothing-left")

    def _by_rules(self, block: Block) -> tuple[Block, np.ndarray]:
        measured = measure.measure(block.strings)
        block = block.with_columns(measured)
        why = stays(block)
        for name in ("prose", "code", "table"):
            asked = getattr(self.recipe.rules, name)
            places = np.flatnonzero(block.is_kind(name))
            if not asked or not len(places):
                continue
            chosen = {column: values[places] for column, values in measured.items()}
            langs = [block.columns["lang"][place] for place in places.tolist()]
            names = np.array([*presets.names(asked), STAYS], dtype=object)
            why[places] = names[presets.failing(chosen, asked, langs)]  # -1, kept, is the last
        return block, why

    def _by_quality(self, block: Block) -> tuple[Block, np.ndarray]:
        prose = block.is_kind("prose")
        scores = np.full(len(block), np.nan, np.float32)
        scores[prose] = self.score(block.strings.chosen(prose))
        return block.with_columns({"quality": scores}), reasons(scores < self.recipe.quality.min_score, "quality")

    def _by_perplexity(self, block: Block) -> tuple[Block, np.ndarray]:
        prose = block.is_kind("prose")
        found = np.full(len(block), np.nan, np.float32)
        found[prose] = self.judge(block.strings.chosen(prose).texts())
        most = self.recipe.quality.max_bits_per_byte or np.inf
        return block.with_columns({"bits_per_byte": found}), reasons(found > most, "bits-per-byte")

    def _without_evals(self, block: Block) -> tuple[Block, np.ndarray]:
        hits = self.index.find(block.strings)
        self.hits += self.index.rows(block.strings, hits, block.columns["name"])
        gone = np.zeros(len(block), bool)
        if self.recipe.contamination.action == "drop":
            gone[hits.document] = True
        elif self.recipe.contamination.action == "cut" and len(hits.document):
            block = Block(contamination.cut(block.strings, hits), block.columns)
            gone = block.strings.sizes == 0
        return block, reasons(gone, "contamination")

    def _without_pii(self, block: Block) -> tuple[Block, np.ndarray]:
        strings, counts = pii.replaced(block.strings, block.is_kind("code"))
        total = np.sum(list(counts.values()), axis=0, dtype=np.int32)
        return Block(strings, block.columns | {"pii": total}), stays(block)


def stays(block: Block) -> np.ndarray:
    return np.full(len(block), STAYS, dtype=object)


def reasons(gone: np.ndarray, reason: str) -> np.ndarray:
    return np.where(gone, reason, STAYS).astype(object)


def replaced(strings: Strings, places: np.ndarray, others: Strings) -> Strings:
    """`strings` with those at `places`, ascending, replaced."""
    if len(places) == len(strings):
        return others
    return strings.with_texts(places.tolist(), [others[number] for number in range(len(others))])


def scorer(recipe: Recipe) -> Callable[[Strings], np.ndarray]:
    """The quality classifier that the recipe names."""
    path = Path(recipe.quality.classifier)
    if path.suffix in (".bin", ".ftz"):
        from llamita.data.fasttext import FastText

        model = FastText.load(path)
        return lambda strings: model.score(strings, recipe.quality.label)
    from llamita.data.classifier import Classifier

    return Classifier.load(path).score

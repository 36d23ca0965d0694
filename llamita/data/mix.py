"""Which share of training comes from which documents, and how often each of them is then seen.

A mixture is lines of text, one for each phase of a run:

    kind=code:17% lang!=en,lang^0.3:8% rest        from the start
    90%: source=textbooks:30% rest                 from 90% of the steps on ("1200: ..." = from step 1200)

A line is terms `SELECTOR[:AMOUNT]` or the name of a preset. A document belongs to the first term that it fits; where it
fits none, it is not used. Selectors: `COLUMN=NAME`, `COLUMN!=NAME` (known, and another one), several joined by commas
that must all hold, `rest`. Columns are source, lang and kind; names may hold `*` and `?`, and alternatives after `|`.
A language that could not be told (`und`) is not known: `lang=und` alone means it, no `lang!=en`, and `lang^T` counts it
with what has no language.
`COLUMN^T` holds for all and splits what fits by that column, each name's part in proportion to its tokens to the power
of T (arXiv 1911.02116, section 3.1: 0.3). Amounts: `17%` of the samples; `4x` the share it has among all tokens. Terms
without an amount divide what is left by their tokens.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, Protocol

import numpy as np

COLUMNS = ("source", "lang", "kind")
UNKNOWN = ("lang", "und")  # ISO 639: a language that could not be told; so it is none that a mixture speaks of
# Llama 3: half general knowledge, a quarter mathematics and reasoning, 17% code, 8% other languages (arXiv 2407.21783,
# section 3.1.2). Mathematics has no kind of its own: sources are called so.
PRESETS = {
    "natural": "rest",
    "4x-code": "kind=code:4x rest",
    "5%-other-languages": "lang!=en:5% rest",
    "llama3": "kind=code:17% source=*math*|*reasoning*:25% lang!=en:8% rest:50%",
}
LINE = re.compile(r"\s*(?:(\d+(?:\.\d+)?)(%?):\s+)?(\S.*)")
TEST = re.compile(r"(\w+)(=|!=|\^)(.+)")
AMOUNT = re.compile(r"(\d+(?:\.\d+)?)(%|x)")
GRAMMAR = "write terms such as kind=code:17%, lang=de:4x, lang!=en,lang^0.3:8% or rest"
SHOWN = 8  # names of a column in a message
# How fast repeated tokens lose value: fitted in Muennighoff et al. 2023 (arXiv 2305.16264), equations 5 and 6.
REPEATS = 15.39
WORN, SPENT = 4, 16  # epochs: up to 4 as good as new text, beyond 16 next to nothing is gained (its section 6)


class Condition(NamedTuple):
    """Documents whose name in `column` fits one of the patterns, or, with `is_other`, is known and fits none."""

    column: str
    is_other: bool
    patterns: tuple[str, ...]

    def fits(self, name: str) -> bool:
        found = any(fnmatchcase(name, pattern) for pattern in self.patterns)
        return _is_known(self.column, name) and not found if self.is_other else found


def _is_known(column: str, name: str) -> bool:
    return bool(name) and (column, name) != UNKNOWN


@dataclass(frozen=True)
class Term:
    """`amount` in percent or times, by `unit`, "" where none is given; `split` the column that it is divided by."""

    text: str
    conditions: tuple[Condition, ...]
    split: str
    temperature: float
    amount: float
    unit: str


@dataclass(frozen=True)
class Blend:
    """The terms of one phase of a run. It begins at step `start`, or, with `is_share`, at that share of all steps."""

    start: float
    is_share: bool
    terms: tuple[Term, ...]


@dataclass(frozen=True)
class Pool:
    """Documents that every phase treats alike. `classes`: in each phase its term (-1: none) and the name it is split
    by."""

    name: str
    classes: tuple[tuple[int, str], ...]
    tokens: int

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Pool":
        return cls(fields["name"], tuple((term, name) for term, name in fields["classes"]), fields["tokens"])


class Tagged(Protocol):
    """Documents with their columns; `shards.Documents` is one."""

    @property
    def names(self) -> Mapping[str, Sequence[str]]: ...

    @property
    def lengths(self) -> np.ndarray: ...

    def column(self, name: str) -> np.ndarray: ...


def parse(lines: Sequence[str]) -> tuple[Blend, ...]:
    """The phases of a mixture; none is one phase of all documents. Raises ValueError naming what cannot be read."""
    blends = []
    for number, line in enumerate(lines or ("natural",)):
        match = LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"data.mix: an empty line; {GRAMMAR}")
        start, percent, text = match.groups()
        if (number == 0) != (start is None):
            raise ValueError(f"data.mix: {line!r}: all lines but the first begin with their start, such as `90%: `")
        share = float(start or 0) / 100 if percent else float(start or 0)
        if share >= 1 if percent else not share.is_integer():
            raise ValueError(f"data.mix: {line!r} starts at no step of the run: give less than 100%, or a whole step")
        terms = tuple(_term(term) for term in PRESETS.get(text.strip(), text).split())
        blends.append(Blend(share, bool(percent), terms))
    return tuple(blends)


def _term(text: str) -> Term:
    selector, colon, written = text.partition(":")
    amount = AMOUNT.fullmatch(written)
    if colon and amount is None:
        raise ValueError(f"data.mix: {text!r} has no amount after the colon: give 17% or 4x (? for a colon in a name)")
    conditions, split, temperature = [], "", 1.0
    for part in [] if selector == "rest" else selector.split(","):
        match = TEST.fullmatch(part)
        if match is None or match[1] not in COLUMNS:
            presets = ", ".join(PRESETS)
            raise ValueError(f"data.mix: {part!r} is no selector; {GRAMMAR}, or one of the mixtures {presets}")
        column, sign, value = match.groups()
        if sign != "^":
            conditions.append(Condition(column, sign == "!=", tuple(value.split("|"))))
        elif split or not re.fullmatch(r"\d+(\.\d+)?", value):
            raise ValueError(f"data.mix: {text!r}: a term is split once, by a power from 0 up, such as lang^0.3")
        else:
            split, temperature = column, float(value)
    number, unit = amount.groups() if amount else (0, "")
    return Term(selector, tuple(conditions), split, temperature, float(number), unit)


def pools(documents: Tagged, blends: Sequence[Blend]) -> tuple[list[Pool], list[np.ndarray]]:
    """The pools of these documents, and the numbers of each one's documents, int64, in order.

    Raises ValueError for a term that no document belongs to.
    """
    names = documents.names
    keys = np.zeros(len(documents.lengths), np.int64)
    for column in COLUMNS:
        keys = keys * len(names[column]) + documents.column(column)
    kinds, kind_of = np.unique(keys, return_inverse=True)
    tags = dict(zip(COLUMNS, np.unravel_index(kinds, [len(names[column]) for column in COLUMNS]), strict=True))
    tagged = [{column: names[column][tags[column][i]] for column in COLUMNS} for i in range(len(kinds))]
    classes = [tuple(_class(document, blend.terms) for blend in blends) for document in tagged]
    for number, blend in enumerate(blends):
        reached = {each[number][0] for each in classes}
        for i, term in enumerate(blend.terms):
            if i not in reached:
                raise ValueError(f"data.mix: no document belongs to {term.text!r}; the corpus has {_listed(tagged)}")
    distinct = sorted(set(classes))
    pool_of = np.array([distinct.index(each) for each in classes], np.min_scalar_type(len(distinct)))[kind_of.ravel()]
    tokens = np.bincount(pool_of, weights=documents.lengths, minlength=len(distinct)).astype(np.int64).tolist()
    ends = np.cumsum(np.bincount(pool_of, minlength=len(distinct)))
    found = [Pool(_named(each, blends), each, count) for each, count in zip(distinct, tokens, strict=True)]
    return found, np.split(np.argsort(pool_of, kind="stable"), ends[:-1])


def _class(document: Mapping[str, str], terms: Sequence[Term]) -> tuple[int, str]:
    for number, term in enumerate(terms):
        if all(each.fits(document[each.column]) for each in term.conditions):
            name = document[term.split] if term.split else ""
            return number, name if _is_known(term.split, name) else ""
    return -1, ""


def _listed(tagged: Sequence[Mapping[str, str]]) -> str:
    parts = []
    for column in COLUMNS:
        names = sorted({document[column] for document in tagged} - {""})
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        parts.append(f"{column}={'|'.join(names[:SHOWN])}{more}" if names else f"no {column}")
    return ", ".join(parts)


def _named(classes: Sequence[tuple[int, str]], blends: Sequence[Blend]) -> str:
    """The terms that a pool belongs to, or the one of all phases."""
    found = []
    for (number, name), blend in zip(classes, blends, strict=True):
        term = blend.terms[number]
        parts = [f"{term.split}={name}" if "^" in part else part for part in term.text.split(",")]
        found.append("unused" if number < 0 else ",".join(parts))
    return found[0] if len(set(found)) == 1 else " then ".join(found)


def weights(of: Sequence[Pool], blends: Sequence[Blend], number: int) -> tuple[float, ...]:
    """The share of each pool in a phase, together 1. Raises ValueError when the amounts do not make 100%."""
    terms = blends[number].terms
    tokens = np.array([pool.tokens for pool in of], np.float64)
    term_of = np.array([pool.classes[number][0] for pool in of])
    natural = np.array([tokens[term_of == i].sum() for i in range(len(terms))]) / tokens.sum()
    units = [0.01 if term.unit == "%" else size for term, size in zip(terms, natural, strict=True)]
    shares = np.array([term.amount * unit for term, unit in zip(terms, units, strict=True)])
    is_open = np.array([not term.unit for term in terms])
    left = 1 - shares.sum()
    if left < -1e-9 or (abs(left) > 1e-9 and not is_open.any()):
        told = ", ".join(f"{term.text} {share:.1%}" for term, share in zip(terms, shares, strict=True) if term.unit)
        remedy = "give less" if left < 0 else "add `rest`, or give more"
        raise ValueError(f"data.mix: the amounts make {1 - left:.1%} of the samples, not 100% ({told}): {remedy}")
    shares[is_open] = max(left, 0.0) * natural[is_open] / natural[is_open].sum() if is_open.any() else 0.0
    found = np.zeros(len(of))
    for i, term in enumerate(terms):
        names = sorted({pool.classes[number][1] for pool in of if pool.classes[number][0] == i})
        members = [np.array([pool.classes[number] == (i, name) for pool in of]) for name in names]
        parts = np.array([tokens[mine].sum() for mine in members])
        parts = parts / parts.sum()
        powers = parts**term.temperature
        for mine, power in zip(members, powers / powers.sum(), strict=True):
            found[mine] = shares[i] * power * tokens[mine] / tokens[mine].sum()
    return tuple(found.tolist())


def schedule(
    of: Sequence[Pool], blends: Sequence[Blend], steps: int, batch_size: int
) -> list[tuple[int, tuple[float, ...]]]:
    """For each phase of a run its first sample and the share of each pool. Raises ValueError: a phase outside of the
    run or of the order, amounts that do not make 100%."""
    starts = [round(blend.start * steps) if blend.is_share else int(blend.start) for blend in blends]
    if sorted(set(starts)) != starts or starts[-1] >= steps:
        raise ValueError(
            f"data.mix: phases start later and later, within the {steps} steps of the run, not at {starts}"
        )
    return [(start * batch_size, weights(of, blends, number)) for number, start in enumerate(starts)]


def epochs(sizes: Sequence[int], shares: Sequence[float], total: float) -> list[float]:
    """How often each pool is seen when `shares` of `total` are drawn from pools of these sizes, all in one unit."""
    return [share * total / size for share, size in zip(shares, sizes, strict=True)]


def worth(epochs: float) -> float:
    """How many epochs of new text so many epochs of the same text are worth: 1 + R* (1 - exp(-R / R*)) with R repeats
    (arXiv 2305.16264, equation 5)."""
    return epochs if epochs <= 1 else 1 + REPEATS * (1 - math.exp((1 - epochs) / REPEATS))


def advice(of: Sequence[Pool], sizes: Sequence[int], shares: Sequence[float], total: float) -> list[str]:
    """A line for each pool: its share of the run, its tokens, its `epochs` and what they are worth."""
    lines = []
    for pool, share, seen in zip(of, shares, epochs(sizes, shares, total), strict=True):
        line = f"mix: {pool.name}  {share:.1%} of the run  {pool.tokens:,} tokens  {seen:.2f} epochs"
        if seen > 1:
            line += f", worth {worth(seen) / seen:.0%} of as much new text"
        if seen > SPENT:
            line += f"; beyond {SPENT} epochs next to nothing is gained: give it less weight or more text"
        elif seen > WORN:
            line += f"; beyond {WORN} epochs repeats are worth less and less"
        lines.append(line)
    return lines

"""Vocabularies side by side on the same text: what each takes for it, as numbers, tables and a plot."""

import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
from rich import box
from rich.markup import escape
from rich.table import Table

from llamita.tokenizer.count import MAX_GROUPS
from llamita.tokenizer.tally import Text
from llamita.tokenizer.vocabulary import Vocabulary, well_formed

BATCH_BYTES, BATCH_TEXTS = 4 * 2**20, 2**14
PART_CHARS = 2**20  # libraries take up to a hundred bytes of memory for a byte of one text, and one core
MAX_IDS = 2**24  # a tokenizer.json may give a token any 32-bit id; no vocabulary of 64 MiB needs so many
LONGEST_RUN = 20  # where runs of non-space have more characters on average, they are no words
TABLE_ROWS, TABLE_VOCABULARIES = 40, 4

# Where each stretch of scripts without spaces begins and ends: Thai to Myanmar, Khmer, kana, Han, Han of planes 2, 3
_EDGES = np.array([0xE00, 0x10A0, 0x1780, 0x1800, 0x3040, 0x3100, 0x3400, 0xA000, 0x20000, 0x40000], np.uint32)
_SEAM = re.compile(r"(?s:.*)\n(?=\S)|(?s:.*)\s(?=\S)")  # up to the last beginning of a line, else of a word
_BYTES, _WORDS, _IN_WORDS, _UNSPACED, _TEXT_COLUMNS, _COLUMNS = 1, 3, 4, 5, 6, 3  # of a cell, see below
Named = Mapping[str, Vocabulary] | Iterable[tuple[str, Vocabulary]]
_Cells = Mapping[tuple[str, str], np.ndarray]  # by source and language


@dataclass(frozen=True)
class Cost:
    """What one vocabulary takes for a group of texts. None where a number would be divided by zero.

    `relative` is -0.158 for 15.8% fewer tokens than the first vocabulary takes. `tokens_per_word` is over the
    languages that space their words, so None for one that does not. `fallback_share` is of the tokens. `lossy`
    counts the documents that do not come back from their ids.
    """

    tokens: int
    bytes_per_token: float | None
    tokens_per_word: float | None
    tokens_per_document: float | None
    relative: float | None
    fallback_share: float | None
    lossy: int


@dataclass(frozen=True)
class Group:
    """Texts of one language or source, or all. Bytes are those of UTF-8; words are runs of non-space, everywhere."""

    documents: int
    bytes: int
    characters: int
    words: int
    vocabularies: dict[str, Cost]


@dataclass(frozen=True)
class Use:
    """How much of a vocabulary the text used, special tokens left out, and its speed in 10^6 bytes a second."""

    entries: int
    never_used: int
    never_used_share: float | None
    megabytes_per_second: float


@dataclass(frozen=True)
class Comparison:
    """What `compare` found. Vocabularies are in the order given, languages and sources by bytes, the most first."""

    threads: int
    vocabularies: dict[str, Use]
    overall: Group
    languages: dict[str, Group]
    sources: dict[str, Group]

    def to_dict(self) -> dict:
        """All numbers as plain values for JSON: shares are fractions, what cannot be told is None."""
        return asdict(self)

    def tables(self) -> list[Table]:
        """A row a vocabulary; then, where there are several, languages and sources, TABLE_ROWS of each at most."""
        found, others = [self._summary()], list(self.vocabularies)[1:]
        for kind, groups in (("language", self.languages), ("source", self.sources)):
            if len(groups) > 1:
                for at in range(0, max(1, len(others)), TABLE_VOCABULARIES):
                    found.append(self._by_group(kind, groups, others[at : at + TABLE_VOCABULARIES]))
        return found

    def _summary(self) -> Table:
        text = self.overall
        title = f"{text.bytes / 1e6:,.1f} MB of text; documents: {text.documents:,}; threads: {self.threads}"
        per_text = ("bytes/\ntoken", "tokens/\nword", "tokens/\ndocument")
        head = ("entries", "tokens", "to first", *per_text, "fall-\nback", "never\nused", "lossy", "MB/s")
        table = _table(title, "vocabulary", *head)
        for name, use in self.vocabularies.items():
            cost = text.vocabularies[name]
            ratios = [_shown(ratio, ".2f") for ratio in (cost.bytes_per_token, cost.tokens_per_word)]
            shares = [_shown(share, ".1%") for share in (cost.fallback_share, use.never_used_share)]
            counts = [_count(cost.tokens), _change(cost.relative), *ratios, _count(cost.tokens_per_document)]
            speed = f"{use.megabytes_per_second:.1f}"
            table.add_row(escape(name), f"{use.entries:,}", *counts, *shares, f"{cost.lossy:,}", speed)
        return table

    def _by_group(self, kind: str, groups: Mapping[str, Group], others: Sequence[str]) -> Table:
        first = next(iter(self.vocabularies))
        heads = [f"{escape(name)}\ntokens" for name in others]
        table = _table(f"Bytes per token by {kind}", kind, "of text", escape(first), *heads)
        for column in table.columns[2:]:
            column.width = len("1.00 +100.0%")  # long names fold, numbers never
        for name, group in list(groups.items())[:TABLE_ROWS]:
            costs = [group.vocabularies[other] for other in (first, *others)]
            ratios = [_shown(cost.bytes_per_token, ".2f") for cost in costs]
            changed = [f"{ratio} {_change(cost.relative)}" for ratio, cost in zip(ratios[1:], costs[1:], strict=True)]
            table.add_row(escape(name or "?"), f"{group.bytes / self.overall.bytes:.1%}", ratios[0], *changed)
        if len(groups) > TABLE_ROWS:
            table.caption = f"The {TABLE_ROWS} largest; {len(groups) - TABLE_ROWS:,} more are in the JSON."
        return table


def _table(title: str, *headers: str) -> Table:
    table = Table(title=escape(title), title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD)
    table.pad_edge, table.padding = False, (0, 1, 0, 0)
    for header in headers:
        table.add_column(header, justify="right" if table.columns else "left", overflow="fold", max_width=24)
    return table


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _change(value: float | None) -> str:
    """As wide as "+100.0%"; fewer tokens are green, more are red."""
    colour = "green" if value and value < 0 else "red" if value else "none"
    return f"[{colour}]{_shown(value, '+.1%'):>7}[/]"


def _count(value: float | None) -> str:
    """Four digits, with k, M or G behind them for thousands and more."""
    if value is None or value < 1000:
        return _shown(value, ".4g")
    factor, prefix = next(pair for pair in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if value >= pair[0])
    return f"{value / factor:#.4g}".rstrip(".") + prefix


class _Part(NamedTuple):
    """A text, or a stretch of a long one: `number` tells texts apart."""

    text: str
    source: str
    lang: str
    number: int
    begins: bool


def _cut(text: str) -> Iterator[str]:
    """`text` in parts of at most PART_CHARS, which begin with a line, or else a word, if any does."""
    start = 0
    while len(text) - start > PART_CHARS:
        seam = _SEAM.match(text, start, start + PART_CHARS)
        end = seam.end() if seam else start + PART_CHARS
        yield text[start:end]
        start = end
    yield text[start:]


def _batches(texts: Iterable[Text]) -> Iterator[list[_Part]]:
    batch, size = list[_Part](), 0
    for number, (text, source, lang) in enumerate(texts):
        for i, part in enumerate(_cut(well_formed(text))):
            batch.append(_Part(part, source, lang, number, i == 0))
            size += len(part.encode())
            if size >= BATCH_BYTES or len(batch) >= BATCH_TEXTS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _text_columns(part: _Part) -> list[int]:
    """Documents, bytes, characters, words, characters in words, those of scripts without spaces."""
    text, words = part.text, part.text.split()
    codes = np.frombuffer(b"" if text.isascii() else text.encode("utf-32-le"), np.uint32)
    unspaced = int(np.count_nonzero(np.searchsorted(_EDGES, codes, "right") & 1))
    return [part.begins, len(text.encode()), len(text), len(words), sum(map(len, words)), unspaced]


class _Meter:
    """One vocabulary and what it has come to so far."""

    def __init__(self, name: str, vocabulary: Vocabulary):
        if vocabulary.vocab_size > MAX_IDS:
            raise ValueError(f"{name}: its ids go up to {vocabulary.vocab_size - 1:,}; {MAX_IDS:,} ids are the most")
        ids = range(vocabulary.vocab_size)
        self.vocabulary = vocabulary
        self.fallback = np.array([vocabulary.is_fallback(i) for i in ids], bool)
        self.entry = np.array([self._has(i) and not vocabulary.is_special(i) for i in ids], bool)
        self.used = np.zeros(len(ids), bool)
        self.seconds, self._lossy = 0.0, -1

    def _has(self, token_id: int) -> bool:
        try:
            self.vocabulary.token_bytes(token_id)
        except ValueError:
            return False
        return True

    def measure(self, parts: Sequence[_Part]) -> np.ndarray:
        """(parts, _COLUMNS) int64: tokens, those that are fallback, and 1 where a text turns out lossy."""
        texts = [part.text for part in parts]
        begun = time.perf_counter()
        ids = self.vocabulary.encode_batch(texts)
        self.seconds += time.perf_counter() - begun
        rows = []
        for part, one in zip(parts, ids, strict=True):
            at = np.array(one, np.int64)
            self.used[at] = True
            lossy = part.number != self._lossy and self.vocabulary.decode(one) != part.text
            if lossy:
                self._lossy = part.number  # its other parts do not count again
            rows.append([len(one), np.count_nonzero(self.fallback[at]), lossy])
        return np.array(rows, np.int64)

    def use(self, num_bytes: int) -> Use:
        entries, never = int(self.entry.sum()), int((self.entry & ~self.used).sum())
        return Use(entries, never, _ratio(never, entries), num_bytes / 1e6 / self.seconds)


def compare(vocabularies: Named, texts: Iterable[Text]) -> Comparison:
    """Encode `texts` with every vocabulary, the first being what the others are measured against.

    Reads the texts once, a few MB at a time. No BOS or EOS is counted; the space that SentencePiece puts before a
    text is, as its ids have it. A text of more than PART_CHARS characters is encoded in parts, cut where a line
    begins if there is one: a token more or less for each cut. Every document is checked for coming back.

    ValueError if there are no vocabularies, two of one name, or no text.
    """
    pairs = list(vocabularies.items() if isinstance(vocabularies, Mapping) else vocabularies)
    names = [name for name, _ in pairs]
    if not pairs:
        raise ValueError("no vocabulary to compare; name one or more")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"two vocabularies have the name {twice!r}; give each its own")
    meters = [_Meter(name, vocabulary) for name, vocabulary in pairs]
    cells: dict[tuple[str, str], np.ndarray] = {}
    for parts in _batches(texts):
        columns = np.array([_text_columns(part) for part in parts])
        for part, row in zip(parts, np.hstack([columns, *(meter.measure(parts) for meter in meters)]), strict=True):
            cells[part.source, part.lang] = cells.get((part.source, part.lang), 0) + row
        if len(cells) > MAX_GROUPS:
            raise ValueError(f"more than {MAX_GROUPS:,} pairs of source and language; give the texts fewer names")
    if not any(row[_BYTES] for row in cells.values()):
        raise ValueError("no text to compare on; give files or folders that hold some")
    overall, languages, sources = _grouped(cells, names)
    uses = {name: meter.use(overall.bytes) for name, meter in zip(names, meters, strict=True)}
    return Comparison(os.cpu_count() or 1, uses, overall, languages, sources)


def _sums(cells: _Cells, which: int) -> dict[str, np.ndarray]:
    """The cells added up by source (0) or by language (1)."""
    sums: dict[str, np.ndarray] = {}
    for key, cell in cells.items():
        sums[key[which]] = sums.get(key[which], 0) + cell
    return sums


def _grouped(cells: _Cells, names: Sequence[str]) -> tuple[Group, dict[str, Group], dict[str, Group]]:
    """All cells, and by language and by source, the largest first."""
    spaced = {}
    for lang, row in _sums(cells, 1).items():
        spaced[lang] = 2 * row[_UNSPACED] <= row[_IN_WORDS] <= LONGEST_RUN * row[_WORDS]
    cells = {key: np.stack([row, row * spaced[key[1]]]) for key, row in cells.items()}

    def grouped(which: int) -> dict[str, Group]:
        groups = {name: _group(rows, names) for name, rows in _sums(cells, which).items()}
        return dict(sorted(groups.items(), key=lambda item: (-item[1].bytes, item[0])))

    return _group(np.sum(list(cells.values()), axis=0), names), grouped(1), grouped(0)


def _group(sums: np.ndarray, names: Sequence[str]) -> Group:
    """From the (2, columns) sums over all languages of a group, and over those that space their words."""
    total, spaced = sums
    documents, num_bytes, characters, words = map(int, total[: _WORDS + 1])
    costs = {}
    for at, name in zip(range(_TEXT_COLUMNS, len(total), _COLUMNS), names, strict=True):
        tokens, fallback, lossy = map(int, total[at : at + _COLUMNS])
        costs[name] = Cost(
            tokens=tokens,
            bytes_per_token=_ratio(num_bytes, tokens),
            tokens_per_word=_ratio(spaced[at], spaced[_WORDS]),
            tokens_per_document=_ratio(tokens, documents),
            relative=_ratio(tokens - total[_TEXT_COLUMNS], total[_TEXT_COLUMNS]),
            fallback_share=_ratio(fallback, tokens),
            lossy=lossy,
        )
    return Group(documents, num_bytes, characters, words, costs)


def _ratio(over: int, under: int) -> float | None:
    return float(over / under) if under else None

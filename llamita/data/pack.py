"""Rows of one length out of documents of any: best-fit decreasing, so that short documents are never cut.

Shapes: B rows, T tokens. A document of L tokens has L - 1 pairs of an input and its target, and pairs are
what is packed. Fewer truncations train better models (arXiv 2404.10830).
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numba
import numpy as np
import torch
from torch import Tensor

from llamita.data.mix import Pool, Tagged, parse, pools

IGNORED = -1
WINDOW = 2**22  # documents that are packed together: enough for full rows, few enough for memory
GROUP = 64  # rooms that are passed over at once when no row has any of them
VERSION = 1  # of the files of a kept packing


class Piece(NamedTuple):
    """Pairs start ... start + length - 1 of a document: pair i is (token i, token i + 1)."""

    doc: int
    start: int
    length: int


class Packing(Sequence[list[Piece]]):
    """The pieces of each row, 24 bytes a piece: `pieces` int64 [P, 3], row after row; `ends` int64 [rows] in them."""

    def __init__(self, pieces: np.ndarray, ends: np.ndarray, num_truncated: int = 0):
        self.pieces, self.ends, self.num_truncated = pieces, ends, num_truncated
        self._stem: Path | None = None

    @classmethod
    def of(cls, packed: Iterable[tuple[np.ndarray, np.ndarray]], num_truncated: int = 0) -> "Packing":
        """What `windows` gives, as one packing in memory."""
        parts = [(np.empty((0, 3), np.int64), np.empty(0, np.int64)), *packed]
        firsts = np.cumsum([0, *(len(pieces) for pieces, _ in parts)])
        ends = [first + ends for first, (_, ends) in zip(firsts[:-1], parts, strict=True)]
        return cls(np.concatenate([pieces for pieces, _ in parts]), np.concatenate(ends), num_truncated)

    @classmethod
    def open(cls, stem: Path) -> "Packing":
        """What `write` wrote, through memory maps; pickled as its place. Raises ValueError when it is not whole."""
        pieces, ends = (np.asarray(np.memmap(f"{stem}.{name}", "<i8", "r")) for name in ("pieces", "ends"))
        if len(pieces) != 3 * ends[-1]:
            raise ValueError(f"{stem}.pieces is damaged; delete {stem.parent}, it is made again")
        packing = cls(pieces.reshape(-1, 3), ends)
        packing._stem = stem
        return packing

    def __reduce__(self) -> tuple:
        if self._stem is None:
            return Packing, (self.pieces, self.ends, self.num_truncated)
        return Packing.open, (self._stem,)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        return [Piece(*piece) for piece in self.pieces_of(i)]

    def pieces_of(self, i: int) -> list[list[int]]:
        """Document, start and length of each piece of row i."""
        return self.pieces[self.ends[i - 1] if i else 0 : self.ends[i]].tolist()


def best_fit(lengths: Sequence[int] | np.ndarray, seq_len: int, *, keep_whole: bool = False) -> Packing:
    """Packs documents of `lengths` tokens into rows of `seq_len` pairs; the same input gives the same rows.

    Longer documents are cut into full rows and a remainder, or, with `keep_whole`, cut short and counted in
    `num_truncated`. Remainders go, longest first, where they leave the least room. Documents are packed in
    windows of WINDOW, so that memory is bounded.
    """
    lengths = np.asarray(lengths, np.int64)
    num_truncated = int((lengths > seq_len + 1).sum()) if keep_whole else 0
    return Packing.of(windows(np.minimum(lengths, seq_len + 1) if keep_whole else lengths, seq_len), num_truncated)


def write(stem: Path, packed: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
    """Writes what `windows` gives to two files, one window at a time."""
    first = 0
    with open(f"{stem}.pieces", "wb") as to_pieces, open(f"{stem}.ends", "wb") as to_ends:
        for pieces, ends in packed:
            to_pieces.write(pieces.astype("<i8", copy=False).tobytes())
            to_ends.write((first + ends).astype("<i8", copy=False).tobytes())
            first += len(pieces)


def windows(
    lengths: np.ndarray, seq_len: int, docs: np.ndarray | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pieces and ends of the rows of WINDOW documents after WINDOW documents, of all or of those numbered `docs`."""
    for first in range(0, len(lengths if docs is None else docs), WINDOW):
        chosen = np.arange(first, min(first + WINDOW, len(lengths))) if docs is None else docs[first : first + WINDOW]
        num_full, rest = np.divmod(np.maximum(lengths[chosen] - 1, 0), seq_len)
        whole = int(num_full.sum())
        longest_first, _ = grouped(seq_len - rest, seq_len + 1)
        parts = longest_first[rest[longest_first] > 0]
        rows, num_rows = rows_of(rest[parts], seq_len)
        order, ends = grouped(rows, num_rows)
        parts = parts[order]
        pieces = np.empty((whole + len(parts), 3), np.int64)
        pieces[:whole, 0] = np.repeat(chosen, num_full)
        pieces[:whole, 1] = seq_len * (np.arange(whole) - np.repeat(np.cumsum(num_full) - num_full, num_full))
        pieces[:whole, 2] = seq_len
        pieces[whole:, 0] = chosen[parts]
        pieces[whole:, 1] = num_full[parts] * seq_len
        pieces[whole:, 2] = rest[parts]
        yield pieces, np.concatenate([np.arange(1, whole + 1), whole + ends])


@numba.njit(cache=True, nogil=True)
def grouped(group_of: np.ndarray, num_groups: int) -> tuple[np.ndarray, np.ndarray]:
    """The indices of the first group, in order, then of the second ..., and where each group ends among them."""
    ends = np.zeros(num_groups, np.int64)
    for group in group_of:
        ends[group] += 1
    ends = np.cumsum(ends)
    order = np.empty(len(group_of), np.int64)
    free = ends.copy()
    for i in range(len(group_of) - 1, -1, -1):
        free[group_of[i]] -= 1
        order[free[group_of[i]]] = i
    return order, ends


@numba.njit(cache=True, nogil=True)
def rows_of(lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, int]:
    """The row of each of these lengths, longest first: the fullest that still has room for it, or a new one; and how
    many rows there are. Of several as full, the last to have become so.

    Rows with room for exactly r are a stack: `top[r]` is its last row, `below[row]` the one under it. `to_be_had`
    counts rows by GROUP of rooms. Since lengths fall, no row has room for `previous` or more but less than `tightest`.
    """
    chosen, below = np.empty(len(lengths), np.int64), np.empty(len(lengths), np.int64)
    top = np.full(seq_len + 1, -1, np.int64)
    to_be_had = np.zeros(seq_len // GROUP + 1, np.int64)
    previous = tightest = seq_len
    num_rows = 0
    for i, length in enumerate(lengths):
        room = length
        while room < previous and top[room] < 0:
            room += 1
        if room == previous:
            room = tightest
        while room < seq_len and top[room] < 0:
            room += 1
            while room % GROUP == 0 and room < seq_len and not to_be_had[room // GROUP]:
                room += GROUP
        if room < seq_len:
            row = top[room]
            top[room] = below[row]
            to_be_had[room // GROUP] -= 1
        else:
            room, row = seq_len, num_rows
            num_rows += 1
        left = room - length
        if left:
            below[row], top[left] = top[left], row
            to_be_had[left // GROUP] += 1
        chosen[i] = row
        previous, tightest = length, left if left >= length else room
    return chosen, num_rows


class Row(NamedTuple):
    """int64 [T] each, targets -1 where there is no loss; `starts` = where documents and padding begin."""

    inputs: np.ndarray
    targets: np.ndarray
    starts: list[int]


class Rows(Protocol):
    """What a loader draws from."""

    seq_len: int

    def __len__(self) -> int: ...

    def fill(self, i: int, inputs: np.ndarray, targets: np.ndarray) -> list[int]:
        """Writes row i into `inputs` and `targets`, int64 [T] each; returns its `starts`."""
        ...


class Texts(Protocol):
    """Documents as ids; `shards.Documents` is one."""

    @property
    def lengths(self) -> np.ndarray: ...

    def tokens(self, i: int) -> np.ndarray: ...


class PackedRows:
    """`texts` in rows of `seq_len`; a document sees itself alone, and padding is a segment of its own.

    `masks[doc]`, bool [L], says which tokens of a document bear loss as targets; without masks all do.
    `keep_whole` cuts long documents short instead of going on in another row. A `packing` that is given is taken as
    it is. Raises ValueError when there is less text than one row.
    """

    def __init__(
        self,
        texts: Texts,
        seq_len: int,
        masks: Sequence[np.ndarray] | None = None,
        *,
        keep_whole: bool = False,
        packing: Packing | None = None,
    ):
        if packing is None:
            packing = best_fit(texts.lengths, seq_len, keep_whole=keep_whole)
            num_tokens = int(texts.lengths.sum())
            if not len(packing) or (not keep_whole and num_tokens < seq_len):
                raise too_little(num_tokens, seq_len)
        self.packing = packing
        self.texts, self.seq_len, self.masks = texts, seq_len, masks

    def __len__(self) -> int:
        return len(self.packing)

    def __getitem__(self, i: int) -> Row:
        inputs, targets = np.empty(self.seq_len, np.int64), np.empty(self.seq_len, np.int64)
        return Row(inputs, targets, self.fill(i, inputs, targets))

    def fill(self, i: int, inputs: np.ndarray, targets: np.ndarray) -> list[int]:
        """Writes row i into `inputs` and `targets`, int64 [T] each; returns its `starts`."""
        starts, end = [], 0
        for doc, start, length in self.packing.pieces_of(i):
            tokens = self.texts.tokens(doc)
            place = slice(end, end + length)
            inputs[place] = tokens[start : start + length]
            targets[place] = tokens[start + 1 : start + length + 1]
            if self.masks is not None:
                bears_loss = np.asarray(self.masks[doc][start + 1 : start + length + 1], bool)
                targets[place][~bears_loss] = IGNORED
            starts.append(end)
            end += length
        if end < self.seq_len:
            inputs[end:], targets[end:] = 0, IGNORED
            starts.append(end)
        return starts


@dataclass(frozen=True)
class Batch:
    """Rows and where their documents begin; `first` = the first sample number k of the whole step."""

    inputs_BT: Tensor
    targets_BT: Tensor
    starts: list[list[int]]
    first: int


def collate(rows: Sequence[Row], first: int) -> Batch:
    inputs_BT, targets_BT = (
        torch.from_numpy(np.stack(parts)) for parts in ([row.inputs for row in rows], [row.targets for row in rows])
    )
    return Batch(inputs_BT, targets_BT, [row.starts for row in rows], first)


def packed(
    documents: Tagged, lines: Sequence[str], seq_len: int, of: str, folder: Path | None = None
) -> tuple[list[Pool], list[Packing]]:
    """The pools of a mixture and how the documents of each are packed.

    `folder` keeps the result on disk, so that it is found and not made again for the same mixture and `of`, the
    fingerprint of what the documents come from; without it all is in memory. Raises ValueError: what `mix.pools`
    does, less text than one row, what was kept is damaged.
    """
    key = {"version": VERSION, "of": of, "mix": list(lines), "seq_len": seq_len, "window": WINDOW}
    if folder is None or not _is_kept(folder, key):
        found, docs = pools(documents, parse(lines))
        if (num_tokens := sum(pool.tokens for pool in found)) < seq_len:
            raise too_little(num_tokens, seq_len)
        each = (windows(documents.lengths, seq_len, chosen) for chosen in docs)
        if folder is None:
            return found, [Packing.of(one) for one in each]
        aside = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        for number, one in enumerate(each):
            write(aside / f"pool-{number}", one)
        (aside / "pools.json").write_text(json.dumps({"key": key, "pools": [asdict(pool) for pool in found]}))
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    kept = [Pool.from_json(pool) for pool in json.loads((folder / "pools.json").read_bytes())["pools"]]
    return kept, [Packing.open(folder / f"pool-{number}") for number in range(len(kept))]


def _is_kept(folder: Path, key: dict[str, Any]) -> bool:
    path = folder / "pools.json"
    return path.is_file() and json.loads(path.read_bytes())["key"] == key


def too_little(num_tokens: int, seq_len: int) -> ValueError:
    return ValueError(
        f"the corpus has {num_tokens:,} tokens, fewer than one sequence of {seq_len:,}: "
        "give more text or a smaller --data.seq_len"
    )

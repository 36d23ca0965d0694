"""Rows of one length out of documents of any: best-fit decreasing, so that short documents are never cut.

Shapes: B rows, T tokens. A document of L tokens has L - 1 pairs of an input and its target, and pairs are
what is packed. Fewer truncations train better models (arXiv 2404.10830).
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

IGNORED = -1


class Piece(NamedTuple):
    """Pairs start ... start + length - 1 of a document: pair i is (token i, token i + 1)."""

    doc: int
    start: int
    length: int


class Packing(Sequence[list[Piece]]):
    """The pieces of each row, kept as arrays: 24 bytes a piece, whatever the size of the corpus."""

    def __init__(self, pieces: np.ndarray, row_of_piece: np.ndarray, num_truncated: int):
        order = np.argsort(row_of_piece, kind="stable")
        self.pieces = pieces[order]
        self.ends = np.cumsum(np.bincount(row_of_piece))
        self.num_truncated = num_truncated

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        start = self.ends[i - 1] if i else 0
        return [Piece(*piece) for piece in self.pieces[start : self.ends[i]].tolist()]


def best_fit(lengths: Sequence[int] | np.ndarray, seq_len: int, *, keep_whole: bool = False) -> Packing:
    """Packs documents of `lengths` tokens into rows of `seq_len` pairs; the same input gives the same rows.

    Longer documents are cut into full rows and a remainder, or, with `keep_whole`, cut short and counted in
    `num_truncated`. Remainders go, longest first, where they leave the least room.
    """
    num_pairs = np.maximum(np.asarray(lengths, np.int64) - 1, 0)
    num_truncated = int((num_pairs > seq_len).sum()) if keep_whole else 0
    if keep_whole:
        num_pairs = np.minimum(num_pairs, seq_len)
    num_full = num_pairs // seq_len
    docs = np.repeat(np.arange(len(num_pairs)), num_full)
    starts = (np.arange(len(docs)) - np.repeat(np.cumsum(num_full) - num_full, num_full)) * seq_len
    full = np.stack([docs, starts, np.full(len(docs), seq_len)], axis=1)

    rest = num_pairs % seq_len
    order = np.argsort(-rest, kind="stable")
    order = order[rest[order] > 0]
    parts = np.stack([order, num_full[order] * seq_len, rest[order]], axis=1)
    rows = len(full) + np.array(rows_of(rest[order].tolist(), seq_len), np.int64)
    return Packing(np.concatenate([full, parts]), np.concatenate([np.arange(len(full)), rows]), num_truncated)


def rows_of(lengths: list[int], seq_len: int) -> list[int]:
    """The row of each of these lengths, longest first: the fullest that still has room for it, or a new one.

    `rooms` has bit r set while some row has room for exactly r: the tightest fit is a shift and a lowest bit.
    """
    by_room: defaultdict[int, list[int]] = defaultdict(list)
    rooms, num_rows, chosen = 0, 0, []
    for length in lengths:
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, row = seq_len, num_rows
            num_rows += 1
        left = room - length
        if left:
            by_room[left].append(row)
            rooms |= 1 << left
        chosen.append(row)
    return chosen


class Row(NamedTuple):
    """int64 [T] each, targets -1 where there is no loss; `starts` = where documents and padding begin."""

    inputs: np.ndarray
    targets: np.ndarray
    starts: list[int]


class Rows(Protocol):
    """What a loader draws from."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Row: ...


class Texts(Protocol):
    """Documents as ids; `shards.Documents` is one."""

    @property
    def lengths(self) -> np.ndarray: ...

    def tokens(self, i: int) -> np.ndarray: ...


class PackedRows:
    """`texts` in rows of `seq_len`; a document sees itself alone, and padding is a segment of its own.

    `masks[doc]`, bool [L], says which tokens of a document bear loss as targets; without masks all do.
    `keep_whole` cuts long documents short instead of going on in another row. Raises ValueError when there is
    less text than one row.
    """

    def __init__(
        self,
        texts: Texts,
        seq_len: int,
        masks: Sequence[np.ndarray] | None = None,
        *,
        keep_whole: bool = False,
    ):
        num_tokens = int(texts.lengths.sum())
        self.packing = best_fit(texts.lengths, seq_len, keep_whole=keep_whole)
        if not len(self.packing) or (not keep_whole and num_tokens < seq_len):
            raise ValueError(
                f"the corpus has {num_tokens:,} tokens, fewer than one sequence of {seq_len:,}: "
                "give more text or a smaller --data.seq_len"
            )
        self.texts, self.seq_len, self.masks = texts, seq_len, masks

    def __len__(self) -> int:
        return len(self.packing)

    def __getitem__(self, i: int) -> Row:
        inputs, targets = np.zeros(self.seq_len, np.int64), np.full(self.seq_len, IGNORED)
        starts, end = [], 0
        for doc, start, length in self.packing[i]:
            tokens = self.texts.tokens(doc)[start : start + length + 1]
            place = slice(end, end + length)
            inputs[place], targets[place] = tokens[:-1], tokens[1:]
            if self.masks is not None:
                bears_loss = np.asarray(self.masks[doc][start + 1 : start + length + 1], bool)
                targets[place][~bears_loss] = IGNORED
            starts.append(end)
            end += length
        return Row(inputs, targets, [*starts, end] if end < self.seq_len else starts)


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

"""Layer: arithmetic. Packing loses no pair of tokens, doubles none, and lets no document see another."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamita.data.pack import IGNORED, PackedRows, Piece, best_fit, collate
from tests.fakes import Texts

LENGTHS = st.lists(st.integers(0, 60), max_size=80)


def slow_rows(lengths, seq_len):
    """Best-fit decreasing in the plainest words: look at every open row."""
    room = []
    chosen = []
    for length in lengths:
        fitting = [(left, i) for i, left in enumerate(room) if left >= length]
        row = min(fitting)[1] if fitting else len(room)
        if not fitting:
            room.append(seq_len)
        room[row] -= length
        chosen.append(row)
    return len(room)


@given(LENGTHS, st.integers(1, 30))
def test_every_pair_is_packed_once_and_rows_are_not_overfull(lengths, seq_len):
    rows = list(best_fit(lengths, seq_len))
    pairs = Counter((p.doc, p.start + i) for row in rows for p in row for i in range(p.length))
    assert pairs == Counter((doc, i) for doc, length in enumerate(lengths) for i in range(length - 1))
    assert all(0 < sum(piece.length for piece in row) <= seq_len for row in rows)
    cut = Counter(piece.doc for row in rows for piece in row)
    assert all(count == -(-(lengths[doc] - 1) // seq_len) for doc, count in cut.items())


@given(LENGTHS, st.integers(1, 30))
def test_as_few_rows_as_the_slow_twin(lengths, seq_len):
    pairs = [max(length - 1, 0) for length in lengths]
    rest = sorted((n % seq_len for n in pairs if n % seq_len), reverse=True)
    assert len(best_fit(lengths, seq_len)) == sum(n // seq_len for n in pairs) + slow_rows(rest, seq_len)


def test_the_tightest_fit_is_taken():
    rows = list(best_fit([7, 8, 3, 2], 10))
    assert rows == [[Piece(1, 0, 7), Piece(2, 0, 2), Piece(3, 0, 1)], [Piece(0, 0, 6)]]
    in_order = [[7, 3], [8, 2]]
    assert [[lengths[p.doc] for p in row] for lengths in [[7, 8, 3, 2]] for row in rows] != in_order


def test_long_documents_are_cut_or_kept_short():
    assert list(best_fit([26, 5], 10)) == [
        [Piece(0, 0, 10)],
        [Piece(0, 10, 10)],
        [Piece(0, 20, 5), Piece(1, 0, 4)],
    ]
    kept = best_fit([26, 5, 11, 12], 10, keep_whole=True)
    assert sorted(kept) == [[Piece(0, 0, 10)], [Piece(1, 0, 4)], [Piece(2, 0, 10)], [Piece(3, 0, 10)]]
    assert (kept.num_truncated, best_fit([26, 5], 10).num_truncated) == (2, 0)


def test_a_million_documents_fill_their_rows():
    lengths = np.random.RandomState(0).lognormal(6.5, 1, 1_000_000).astype(np.int64) + 3
    packing = best_fit(lengths, 8192)
    assert packing.pieces[:, 2].sum() == (lengths - 1).sum()
    assert (lengths - 1).sum() / (len(packing) * 8192) > 0.999


def distinct(lengths):
    """Documents in which no token occurs twice, so that a pair tells where it came from."""
    ends = np.cumsum(lengths)
    return [np.arange(end - length, end) + 1 for length, end in zip(lengths, ends, strict=True)]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30).filter(lambda n: sum(n) > 30), st.integers(4, 16))
def test_targets_never_cross_documents_and_each_pair_is_trained_on_once(lengths, seq_len):
    rows = PackedRows(Texts(distinct(lengths)), seq_len)
    seen = Counter()
    for row in rows:
        assert row.inputs.shape == row.targets.shape == (seq_len,) and row.starts[0] == 0
        assert row.inputs.dtype == row.targets.dtype == np.int64
        bears_loss = row.targets != IGNORED
        assert (row.targets[bears_loss] == row.inputs[bears_loss] + 1).all()
        seen.update(row.inputs[bears_loss].tolist())
        jumps = np.flatnonzero(np.diff(row.inputs) != 1) + 1
        padding_from = bears_loss.sum()
        assert [start for start in row.starts[1:] if start != padding_from] == [j for j in jumps if j < padding_from]
        assert padding_from == seq_len or padding_from in row.starts
        assert (row.inputs[padding_from:] == 0).all()
    assert seen == Counter(token for document in distinct(lengths) for token in document[:-1].tolist())


def test_other_tokens_in_one_document_change_nothing_else():
    documents = distinct([9, 5, 14, 4])
    before = list(PackedRows(Texts(documents), 8))
    touched = [documents[0] + 1000, *documents[1:]]
    after = list(PackedRows(Texts(touched), 8))
    assert [row.starts for row in before] == [row.starts for row in after]
    for old, new in zip(before, after, strict=True):
        changed = old.inputs != new.inputs
        assert (changed == ((old.inputs >= 1) & (old.inputs <= 9))).all()
        assert (changed == (old.targets != new.targets)).all()
    assert any((old.inputs != new.inputs).any() for old, new in zip(before, after, strict=True))


def test_a_mask_says_which_targets_bear_loss():
    documents = distinct([9, 7, 30])
    masks = [np.isin(document, [2, 4, 5, 12, 16, 30, 45]) for document in documents]
    whole = PackedRows(Texts(documents), 12, masks)
    assert sorted(t for row in whole for t in row.targets if t != IGNORED) == [2, 4, 5, 12, 16, 30, 45]
    short = PackedRows(Texts(documents), 12, masks, keep_whole=True)
    assert sorted(t for row in short for t in row.targets if t != IGNORED) == [2, 4, 5, 12, 16]
    for row, plain in zip(whole, PackedRows(Texts(documents), 12), strict=True):
        assert (row.inputs == plain.inputs).all() and row.starts == plain.starts


def test_less_text_than_a_row_is_an_error():
    texts = Texts(distinct([5, 4]))
    assert len(PackedRows(texts, 9)) == 1
    with pytest.raises(
        ValueError, match=r"the corpus has 9 tokens, fewer than one sequence of 10: .* --data\.seq_len$"
    ):
        PackedRows(texts, 10)
    assert len(PackedRows(texts, 10, keep_whole=True)) == 1
    with pytest.raises(ValueError, match="the corpus has 0 tokens"):
        PackedRows(Texts([]), 10, keep_whole=True)


def test_collate_stacks_rows():
    rows = list(PackedRows(Texts(distinct([9, 5, 14, 4])), 8))
    batch = collate(rows, first=7)
    assert batch.inputs_BT.shape == batch.targets_BT.shape == (len(rows), 8) and batch.first == 7
    assert batch.inputs_BT[1].tolist() == rows[1].inputs.tolist()
    assert batch.starts == [row.starts for row in rows]

"""Layer: arithmetic. Packing loses no pair of tokens, doubles none, and lets no document see another."""

import json
import lzma
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamita.data import pack
from llamita.data.pack import IGNORED, PackedRows, Piece, best_fit, collate, packed, rows_of
from tests.fakes import Texts

LENGTHS = st.lists(st.integers(0, 60), max_size=80)


def slow_rows(lengths, seq_len):
    """Best-fit decreasing in the plainest words: look at every open row; of several as full, the last to be so."""
    room, since, chosen = [], [], []
    for now, length in enumerate(lengths):
        fitting = [(left, -since[i], i) for i, left in enumerate(room) if left >= length]
        row = min(fitting)[2] if fitting else len(room)
        if not fitting:
            room.append(seq_len)
            since.append(0)
        room[row] -= length
        since[row] = now
        chosen.append(row)
    return chosen, len(room)


@settings(deadline=None)  # the kernels are compiled in the first example
@given(LENGTHS, st.integers(1, 30))
def test_every_pair_is_packed_once_and_rows_are_not_overfull(lengths, seq_len):
    rows = list(best_fit(lengths, seq_len))
    pairs = Counter((p.doc, p.start + i) for row in rows for p in row for i in range(p.length))
    assert pairs == Counter((doc, i) for doc, length in enumerate(lengths) for i in range(length - 1))
    assert all(0 < sum(piece.length for piece in row) <= seq_len for row in rows)
    cut = Counter(piece.doc for row in rows for piece in row)
    assert all(count == -(-(lengths[doc] - 1) // seq_len) for doc, count in cut.items())


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 30))
def test_as_few_rows_as_the_slow_twin(lengths, seq_len):
    pairs = [max(length - 1, 0) for length in lengths]
    rest = sorted((n % seq_len for n in pairs if n % seq_len), reverse=True)
    assert len(best_fit(lengths, seq_len)) == sum(n // seq_len for n in pairs) + slow_rows(rest, seq_len)[1]


@settings(deadline=None)
@given(st.lists(st.integers(1, 299), max_size=120), st.sampled_from([300, 320, 640, 1000]))
def test_the_kernel_is_its_slow_twin(lengths, seq_len):
    lengths.sort(reverse=True)
    rows, num_rows = rows_of(np.array(lengths, np.int64), seq_len)
    assert (rows.tolist(), num_rows) == slow_rows(lengths, seq_len)


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
    cut_anywhere = (np.cumsum(lengths - 1) // 8192 != (np.cumsum(lengths - 1) - lengths + 1) // 8192) & (
        lengths <= 8192
    )
    assert np.bincount(packing.pieces[:, 0])[lengths <= 8193].max() == 1  # none that fits is cut
    assert cut_anywhere.mean() > 0.05  # negative control: rows cut out of one long stream cut many


def test_shared_text_fills_its_rows():
    shared = Path(__file__).resolve().parents[2] / "shared/data/pretrain"
    if not shared.is_dir():
        pytest.skip("the shared data is not here")
    sizes = []
    for name in (
        "c4_demo.jsonl.xz",
        "techdocs_en.jsonl.xz",
        "fairytales_en.jsonl.xz",
        "tinystories_en_sample.jsonl.xz",
    ):
        with lzma.open(shared / name, "rt") as lines:
            sizes += [len(json.loads(line)["text"]) // 4 + 3 for line in lines]  # about as many tokens
    packing = best_fit(sizes, 8192)
    assert (np.array(sizes) - 1).sum() / (len(packing) * 8192) > 0.998  # 600 rows, the last of them not full


def test_windows_bound_what_is_packed_together(monkeypatch):
    monkeypatch.setattr(pack, "WINDOW", 10)
    lengths = np.random.RandomState(0).randint(1, 40, 35)
    found = best_fit(lengths, 16)
    apart = [best_fit(lengths[first : first + 10], 16) for first in range(0, 35, 10)]
    assert list(found) == [
        [Piece(number * 10 + doc, start, length) for doc, start, length in row]
        for number, packing in enumerate(apart)
        for row in packing
    ]


class Tagged(Texts):
    """Documents of two sources by turns."""

    names = {"source": ["web", "books"], "lang": [""], "kind": ["prose"]}

    def column(self, name):
        return np.arange(len(self.lengths)) % 2 if name == "source" else np.zeros(len(self.lengths), np.int64)


MIX = ("source=books:30% rest",)


def test_what_is_kept_is_what_would_be_packed(tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "WINDOW", 10)  # of the 25 documents of each pool
    documents = Tagged(distinct(np.random.RandomState(0).randint(2, 40, 50)))
    found, packings = packed(documents, MIX, 16, "a", tmp_path / "kept")
    again = packed(None, MIX, 16, "a", tmp_path / "kept")  # the documents are not looked at any more
    assert again[0] == found == packed(documents, MIX, 16, "a")[0]
    for kept, opened, made in zip(packings, again[1], packed(documents, MIX, 16, "a")[1], strict=True):
        assert list(kept) == list(opened) == list(made) == list(pickle.loads(pickle.dumps(kept)))
        assert len(pickle.dumps(kept)) < 500
    assert [{doc % 2 for row in packing for doc, *_ in row} for packing in packings] == [{1}, {0}]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept"]


@pytest.mark.parametrize("other", [(MIX, 16, "b"), (MIX, 17, "a"), ((), 16, "a")])
def test_what_was_packed_for_something_else_is_made_again(tmp_path, other):
    documents = Tagged(distinct([5, 9, 14, 20]))
    packed(documents, MIX, 16, "a", tmp_path / "kept")
    assert packed(documents, *other, tmp_path / "kept")[0] == packed(documents, *other)[0]
    with pytest.raises(AttributeError):
        packed(None, MIX, 16, "a", tmp_path / "kept")


@pytest.mark.parametrize("name", ["pool-0.pieces", "pool-0.ends"])
def test_a_damaged_packing_is_told(tmp_path, name):
    packed(Tagged(distinct([5, 9, 14, 20])), MIX, 8, "a", tmp_path / "kept")
    whole = (tmp_path / "kept" / name).read_bytes()
    (tmp_path / "kept" / name).write_bytes(whole[: len(whole) // 16 * 8])
    with pytest.raises(ValueError, match=r"pool-0\.pieces is damaged; delete .*kept"):
        packed(None, MIX, 8, "a", tmp_path / "kept")


def test_one_pool_is_packed_as_without_a_mixture():
    documents = Tagged(distinct(np.random.RandomState(0).randint(2, 40, 50)))
    (pool,), (packing,) = packed(documents, (), 16, "a")
    assert list(packing) == list(PackedRows(documents, 16).packing) and pool.tokens == documents.lengths.sum()
    with pytest.raises(ValueError, match="fewer than one sequence of 5,000"):
        packed(documents, (), 5000, "a")


def distinct(lengths):
    """Documents in which no token occurs twice, so that a pair tells where it came from."""
    ends = np.cumsum(lengths)
    return [np.arange(end - length, end) + 1 for length, end in zip(lengths, ends, strict=True)]


@settings(deadline=None)
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

"""Layer: a kernel beside its plain twin."""

import random

import pytest

from llamita.data.c4 import POLICY, SIGNS, _long_lines, c4_lines, plain_c4_lines
from llamita.data.strings import Strings

PIECES = [*"abc  \n\n\t\r[", "one two ", "x" * 600, "中文" * 9, "[12]", "use cookies ", "JavaScript", " \x0b\x0c"]


@pytest.mark.parametrize("seed", range(20))
def test_the_kernel_is_its_twin(seed):
    rng = random.Random(seed)
    texts = ["".join(rng.choices(PIECES, k=rng.randrange(40))) for _ in range(200)]
    strings = Strings.of(texts)
    assert c4_lines(strings).texts() == [plain_c4_lines(text.encode()).decode() for text in texts]


def test_a_phrase_across_two_texts_is_in_neither():
    assert c4_lines(Strings.of(["one two java", "script three four"])).texts() == ["one two java", "script three four"]


def test_lengths_decide():
    border = ["a b c", "a b", "中" * 10, "中" * 11, "x " * 2 + "y" * 1000, "x " * 2 + "y" * 1001]
    kept = c4_lines(Strings.of(border)).texts()
    assert [bool(text) for text in kept] == [True, False, False, True, True, False]


def test_the_kernel_alone_does_not_know_phrases():
    """So the marks that call the twin are what the first test rests on."""
    import numpy as np

    strings = Strings.of(["we use cookies here"])
    out, ends = np.empty(99, np.uint8), np.zeros(2, np.int64)
    _long_lines(strings.data, strings.offsets, out, ends)
    assert ends[1] == 19 and c4_lines(strings).texts() == [""]


def test_each_phrase_has_a_sign():
    assert all(any(sign in phrase for sign in SIGNS) for phrase in POLICY)

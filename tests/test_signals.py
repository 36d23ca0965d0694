"""Layer: arithmetic and hostile input. Words and repetition are those of slow plain twins, columns as by hand."""

import random
import re
from collections import Counter

import numpy as np
import pytest

from llamita.data import line_signals, presets, words
from llamita.data.measure import measure
from llamita.data.strings import Strings
from llamita.data.words import ALONE, BLANK, CAPITAL, CLOSES, IN_WORD, LETTER, OPENS, OTHER

LETTERS = "aB1.,:/-'\u2019()\"#=~<$ \n\té—…字\u00a0ส😀°s"
PIECES = [
    *("the cat", "isn't", "U.S.", "J. Smith", "e.g.", "http://a.b/c-d", "well-known", "3,000.50", "she\u2019ll", "a.B"),
    *("std::vector<int>", "...", "x--y", "don't.", "John's", "猫が好き。", "สวัสดี", "\n\n", "- item", "wait..."),
]
HOSTILE = [
    *("", " ", "\n" * 99, "." * 999, "'s" * 300, ".'" * 300),
    *("a" * 5000, "字" * 999, "\u00a0", "😀", "-", "a:" * 300),
]


def random_texts() -> list[str]:
    rng = random.Random(0)
    letters = ["".join(rng.choices(LETTERS, k=rng.randrange(40))) for _ in range(2000)]
    return letters + [" ".join(rng.choices(PIECES, k=rng.randrange(60))) for _ in range(200)] + HOSTILE


def kind_of(char: str) -> int:
    return int(words.classes()[ord(char)]) if char < "\U00010000" else ALONE


def plain_words(text: str) -> list[str]:
    """The twin of `words.split`, on strings."""
    found: list[str] = []
    for chunk in re.findall(r"\S+", text):
        run = ""
        for char in chunk:
            if kind_of(char) & (ALONE | BLANK):
                found += [*plain_edges(run), char]
                run = ""
            else:
                run += char
        found += plain_edges(run)
    return found


def plain_edges(run: str) -> list[str]:
    """Marks before and behind go one by one."""
    before, behind = [], []
    while run and (run.startswith("..") or kind_of(run[0]) & OPENS):
        mark = re.match(r"\.+|.", run)[0] if run.startswith("..") else run[0]
        before.append(mark)
        run = run[len(mark) :]
    while run:
        mark = re.search(r"(?:\.+|.)$", run)[0]
        rest = run[: -len(mark)]
        if mark == ".":
            initial = rest and kind_of(rest[-1]) & CAPITAL and not (len(rest) > 1 and kind_of(rest[-2]) & CAPITAL)
            if not rest or not kind_of(rest[-1]) or initial:
                break
        elif re.search(r".['\u2019][sS]$", run):
            mark = run[-2:]
        elif not kind_of(mark[-1]) & CLOSES and not mark.startswith("."):
            break
        behind.insert(0, mark)
        run = run[: -len(mark)]
    return before + plain_inside(run) + behind


def plain_inside(word: str) -> list[str]:
    if not word or "://" in word:
        return [word] if word else []
    clitic = re.search(r"(?i)(?<=.)(?:n['\u2019]t|['\u2019](?:[md]|ll|re|ve))$", word)
    core, tail = (word[: clitic.start()], [clitic[0]]) if clitic else (word, [])
    found, begun = [], 0
    for match in re.finditer(r"-+|\.+|~+|[,/:<=>\u2013\u2014]", core):
        start, stop = match.span()
        a, b = (kind_of(core[start - 1]) if start else 0), (kind_of(core[stop]) if stop < len(core) else 0)
        if start and parts(match[0], a, b):
            found += [core[begun:start], match[0]]
            begun = stop
    return [part for part in [*found, core[begun:], *tail] if part]


def parts(mark: str, a: int, b: int) -> bool:
    if mark[0] == ".":
        lower = a & CLOSES or (a & LETTER and not a & CAPITAL)
        return len(mark) > 1 or bool(lower and b & (CAPITAL | CLOSES))
    if mark[0] == "-" and a & OTHER and b & OTHER:
        return True
    return bool(a & (LETTER if mark == "," else IN_WORD) and b & LETTER)


def words_as_text(strings: Strings) -> list[list[str]]:
    split = words.split(strings)
    whole = strings.data.tobytes()
    spelt = [
        whole[start : start + 4 * size].decode(errors="ignore")[:size]
        for start, size in zip(split.starts.tolist(), split.chars.tolist(), strict=True)
    ]
    return [spelt[a:b] for a, b in zip(split.ends[:-1], split.ends[1:], strict=True)]


def plain_shares(text: str) -> dict[str, float]:
    """The twin of the repetition columns: Gopher's table A1 with sets of strings."""
    said, shares = plain_words(text), {}
    for n in (2, 3, 4):
        grams = [" ".join(said[i : i + n]) for i in range(len(said) - n + 1)]
        top = Counter(grams).most_common(1)[0][1] if grams else 0
        first = next((i for i in range(len(grams)) if grams[: i + 1].count(grams[i]) == top), 0)  # to be as frequent
        shares[f"top_{n}_gram"] = len(grams[first]) * top if grams else 0
    for n in range(5, 11):
        seen, again, i = set(), 0, 0
        while i <= len(said) - n:
            gram = tuple(said[i : i + n])
            again += sum(map(len, gram)) if gram in seen else 0
            i += n if gram in seen else 1
            seen.add(gram)
        shares[f"dup_{n}_gram"] = again
    lines, paragraphs = re.split(r"\n+", text), re.split(r"\n{2,}", text.strip(" \t\n"))
    for name, stretches in (("line", lines), ("paragraph", paragraphs)):
        again = [stretch for i, stretch in enumerate(stretches) if stretch in stretches[:i]]
        shares[f"dup_{name}s"] = len(again) / len(stretches) * max(len(text), 1)
        shares[f"dup_{name}_chars"] = sum(map(len, again))
    return {name: value / max(len(text), 1) for name, value in shares.items()}


def test_words_are_those_of_the_plain_twin():
    texts = random_texts()
    for text, found in zip(texts, words_as_text(Strings.of(texts)), strict=True):
        assert found == plain_words(text), repr(text)


def test_an_elided_word_that_ends_in_s_is_not_taken_to_pieces():
    assert words_as_text(Strings.of(["parce qu'ils"])) == [["parce", "qu'ils"]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello, world! It's John's.", ["Hello", ",", "world", "!", "It", "'s", "John", "'s", "."]),
        ("do n't don\u2019t we'll", ["do", "n't", "do", "n\u2019t", "we", "'ll"]),
        ("(well-known) U.S. 3,000.50", ["(", "well", "-", "known", ")", "U.S.", "3,000.50"]),
        ("see http://a.b/c-d, a/b wait...", ["see", "http://a.b/c-d", ",", "a", "/", "b", "wait", "..."]),
        ("\u732b\u304c\u597d\u304d\u3002", ["\u732b", "\u304c", "\u597d", "\u304d", "\u3002"]),
    ],
)
def test_words_by_hand(text, expected):
    assert words_as_text(Strings.of([text])) == [expected]


def test_repetition_is_that_of_the_plain_twin():
    rng = random.Random(1)
    pools = [rng.choices(["a", "bb", "c,", "dd\n", "e\n\n", "\u00e9"], k=rng.randrange(1, 6)) for _ in range(300)]
    texts = [" ".join(rng.choices(pool, k=rng.randrange(1, 90))) for pool in pools]
    texts += [text for text in HOSTILE[1:] if "..." not in text and "字" not in text]
    columns = measure(Strings.of(texts))
    for i, text in enumerate(texts):
        for name, share in plain_shares(text).items():
            assert columns[name][i] == pytest.approx(share, abs=1e-6), (name, text[:80])


def test_columns_by_hand():
    text = "# One {two} three.\n\n- four five\u2026\n\u2022 SIX 7?"
    columns = {name: float(column[0]) for name, column in measure(Strings.of([text])).items()}
    assert columns["chars"] == len(text) and columns["lines"] == 4 and columns["full_lines"] == 3
    assert columns["max_line_length"] == 18 and columns["braces"] == 1
    assert columns["bullet_lines"] == 0.5 and columns["ellipsis_lines"] == 0.25
    assert columns["short_lines"] == 1 and columns["digit_share"] == pytest.approx(1 / len(text))
    said = plain_words(text)
    assert columns["words"] == 7 and columns["hash_ratio"] == pytest.approx(1 / len(said))
    assert columns["newlines_per_word"] == pytest.approx(3 / len(said))
    assert columns["alpha_words"] == pytest.approx(6 / len(said))
    assert columns["mean_word_length"] == pytest.approx(len("Onetwothreefourfivesix7") / 7)


def test_dots_are_characters():
    assert measure(Strings.of(["wait..."]))["chars"] == 7


def test_stop_words_are_counted_once_and_by_language():
    columns = measure(Strings.of(["the the the of", "der die und Haus", "\u0438 \u0432 \u043d\u0435"]))
    assert columns["stop_words_en"].tolist() == [2, 0, 0] and columns["stop_words_de"].tolist() == [0, 3, 0]
    assert columns["stop_words_ru"].tolist() == [0, 0, 3]


def test_columns_do_not_depend_on_the_batch_and_are_numbers():
    texts = random_texts()[-300:]
    together = measure(Strings.of(texts))
    for i in (0, 5, 150, *range(288, 300)):
        alone = measure(Strings.of([texts[i]]))
        for name, column in alone.items():  # NaN: the question does not arise
            np.testing.assert_array_equal(column[0], together[name][i], err_msg=f"{name} of {texts[i][:80]!r}")
    assert not any(np.isinf(column).any() or len(column) != 300 for column in together.values())
    assert set(presets.COLUMNS) <= set(together)
    assert all(len(column) == 0 for column in measure(Strings.of([])).values())


def test_lines_longer_than_a_tally_holds():
    for size in ((1 << line_signals.BITS) - 2, (1 << line_signals.BITS) - 1, 3 << line_signals.BITS):
        line = "{#1é…" * size + "..." + "." * size
        found = line_signals.measure(Strings.of([f"{line}\n{line}"]))
        counts = {
            name: int(found[name][0]) for name in ("chars", "lines", "max_line_length", "hashes", "ellipses", "braces")
        }
        assert counts == {
            "chars": 2 * len(line) + 1, "lines": 2, "max_line_length": len(line), "hashes": 2 * size,
            "ellipses": 2 * (size + 1 + size // 3), "braces": 2 * size,
        }  # fmt: skip
        assert found["digit_share"][0] * (2 * len(line) + 1) == pytest.approx(2 * size)

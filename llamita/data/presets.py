"""Rules: predicates on signals. Published sets are presets, named and versioned; `words>=50` is a rule of one's own.

A document fails the first rule that it does not pass; all are measured, so that any other rule can be asked later.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from llamita.config import nearest
from llamita.data import line_signals, repeats
from llamita.data.language import LANGUAGES
from llamita.data.words import STOP_WORDS

INF = float("inf")
COLUMNS = sorted({
    *line_signals.NAMES, *repeats.NAMES, "words", "mean_word_length", "longest_word", "alpha_words", "sentences",
    "hash_ratio", "ellipsis_ratio", "newlines_per_word", "dup_full_line_chars",
} - {"hashes", "ellipses", "newlines", "num_lines", "num_paragraphs", "line_chars"})  # fmt: skip
STOP_WORD_RULE = "stop_words"


@dataclass(frozen=True)
class Rule:
    """A document passes when low <= its value <= high. `stop_words` is asked of languages with a list alone."""

    name: str
    column: str
    low: float = -INF
    high: float = INF
    lows: dict[str, float] = field(default_factory=dict)
    """What stands for `low` in languages that are written otherwise."""


# Bounds of FineWeb-2 (Penedo et al. 2025, arXiv 2506.20920, configs/): Korean words are short, a character a syllable;
# Thai and Lao sentences end in a blank, so c4@1 cannot count them either.
SHORT_WORDS = {"ko": 1.0}
NO_STOPS = {"th": 0.0, "lo": 0.0}
# Marks count as words without a letter, and English has few. Of Russian stories 15% passed its bound of 0.8; FineWeb-2
# sets it by language (0.755 for Finnish).
MANY_MARKS = dict.fromkeys(LANGUAGES.keys() - {"en"}, 0.65)


def _gopher_repetition() -> tuple[Rule, ...]:
    """Rae et al. 2021 (arXiv 2112.11446), table A1."""
    top, dup = {2: 0.20, 3: 0.18, 4: 0.16}, {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
    lines = [("dup_paragraphs", 0.30), ("dup_paragraph_chars", 0.20), ("dup_lines", 0.30), ("dup_line_chars", 0.20)]
    grams = [(f"top_{n}_gram", most) for n, most in top.items()] + [(f"dup_{n}_gram", most) for n, most in dup.items()]
    return tuple(Rule(name, name, high=most) for name, most in lines + grams)


# Rae et al. 2021 (arXiv 2112.11446), A.1.1.
GOPHER_QUALITY = (
    Rule("words", "words", 50, 100_000), Rule("mean_word_length", "mean_word_length", 3, 10, SHORT_WORDS),
    Rule("hash_ratio", "hash_ratio", high=0.1), Rule("ellipsis_ratio", "ellipsis_ratio", high=0.1),
    Rule("bullet_lines", "bullet_lines", high=0.9), Rule("ellipsis_lines", "ellipsis_lines", high=0.3),
    Rule("alpha_words", "alpha_words", low=0.8, lows=MANY_MARKS), Rule(STOP_WORD_RULE, STOP_WORD_RULE, low=2),
)  # fmt: skip
# Raffel et al. 2020 (arXiv 1910.10683), 2.2, as FineWeb keeps it: without the rule on terminal punctuation.
C4 = (Rule("sentences", "sentences", low=5, lows=NO_STOPS), Rule("curly_bracket", "braces", high=0))
# Penedo et al. 2024 (arXiv 2406.17557), 3.6. Their code says 0.01 where the paper says 0.1.
FINEWEB = (
    Rule("punctuated_lines", "punctuated_lines", low=0.12, lows=NO_STOPS),
    Rule("short_lines", "short_lines", high=0.67),
    Rule("dup_full_line_chars", "dup_full_line_chars", high=0.1),
    Rule("newlines_per_word", "newlines_per_word", high=0.3),
)  # fmt: skip
# Li et al. 2023, StarCoder (arXiv 2305.06161), 3.1: lengths of lines, and share of letters and digits.
CODE = (
    Rule("max_line_length", "max_line_length", high=1000), Rule("mean_line_length", "mean_line_length", high=100),
    Rule("alnum_share", "alnum_share", low=0.25),
)  # fmt: skip
PRESETS: dict[str, tuple[Rule, ...]] = {
    "gopher-quality@1": GOPHER_QUALITY, "gopher-repetition@1": _gopher_repetition(), "c4@1": C4, "fineweb@1": FINEWEB,
    "fineweb-code@1": (*FINEWEB[:2], Rule("dup_full_line_chars", "dup_full_line_chars", high=0.01), FINEWEB[3]),
    "code@1": CODE,
}  # fmt: skip
OWN = re.compile(r"([a-z_0-9]+)\s*(>=|<=)\s*(-?\d+(?:\.\d+)?)")


def rules(presets: Sequence[str]) -> list[tuple[str, Rule]]:
    """The rules of presets and predicates, and the name of each. Raises ValueError for what is neither."""
    found = []
    for preset in presets:
        own = OWN.fullmatch(preset)
        if own:
            column, sign, value = own[1], own[2], float(own[3])
            if column not in COLUMNS:
                raise ValueError(f"no signal is called {column!r}{nearest(column, COLUMNS)}")
            found.append((preset, Rule(preset, column, *((value, INF) if sign == ">=" else (-INF, value)))))
        elif preset in PRESETS:
            found += [(f"{preset}:{rule.name}", rule) for rule in PRESETS[preset]]
        else:
            raise ValueError(f"no rules are called {preset!r}{nearest(preset, PRESETS)} (or write words>=50)")
    return found


def names(presets: Sequence[str]) -> list[str]:
    """`preset:rule` of each rule, in order."""
    return [name for name, _ in rules(presets)]


def mask(columns: dict[str, np.ndarray], rule: Rule, langs: Sequence[str]) -> np.ndarray:
    """Which documents pass a rule, bool [D]."""
    if rule.column == STOP_WORD_RULE:
        passed = np.ones(len(langs), bool)
        of = np.array([lang or "en" for lang in langs], dtype=object)
        for lang in STOP_WORDS:
            mine = of == lang
            passed[mine] = columns[f"{STOP_WORD_RULE}_{lang}"][mine] >= rule.low
        return passed
    values = columns[rule.column]
    lows = np.array([rule.lows.get(lang, rule.low) for lang in langs], np.float32)
    return np.isnan(values) | ((values >= lows) & (values <= np.float32(rule.high)))


def failing(columns: dict[str, np.ndarray], presets: Sequence[str], langs: Sequence[str]) -> np.ndarray:
    """The first rule that each document fails, an index into `names(presets)`, int16 [D]; -1 where it passes all."""
    found = np.full(len(langs), -1, np.int16)
    for place, (_, rule) in enumerate(rules(presets)):
        found[(found < 0) & ~mask(columns, rule, langs)] = place
    return found

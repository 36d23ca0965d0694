"""Articles, prepositions, pronouns, particles: what relatives of a language write otherwise, and few sentences lack."""

from collections.abc import Sequence
from functools import cache

import numpy as np
from numba import njit

from llamita.data.strings import Strings
from llamita.data.words import LETTER, STOP_WORDS, split

# The most frequent of them, of languages with a script that others share; a tenth of all words and more.
FUNCTION_WORDS = {language: words for language, words in STOP_WORDS.items() if language not in ("ja", "zh")} | {
    "af": "die en van in is het n nie te wat ons om", "az": "və bu bir ilə ci də ki kimi olan üçün sonra da",
    "be": "і ў у на з не што а да па гэта але", "bg": "на в и е от се да за не ще с са",
    "ca": "de la i a el que en per del les un es", "cy": "yn y o a i ar ei yr mae ac gan oedd",
    "da": "og i er at til en det på af der med for", "eo": "la de kaj en estas al estis mi ke por ne pri",
    "et": "ja on ei et kui ka see aga oli siis ning oma", "eu": "eta da zen ziren bat izan zuen ere an dira bere du",
    "fi": "ja on ovat ei että se oli myös sen sekä kun ole", "ga": "an a na agus is ar i é le ag go de",
    "hr": "i je u se na da za и је у на се", "hu": "a az és hogy is egy nem de volt meg csak ez",
    "is": "að og í er á sem til það um við en ekki", "la": "et in est a sunt ad cum de ut per non inter",
    "lg": "mu ku ne nga nti e bwe era ba wa ye oba", "lt": "ir kad iš su yra į tai tik apie ne ar kaip",
    "lv": "un ir ar par ka no arī uz vai bet tā to", "mk": "на во и се од со за е да како го што",
    "mn": "нь байна юм энэ ч гэж байгаа л их байсан бол болон", "no": "i og er av som til det på for med å ein",
    "ro": "de a în cu si şi și din la este care pe", "sk": "a na sa v je s že aj si z pre o",
    "sl": "je in v na se za da ki so z pa ne", "so": "oo ka ku iyo u ah waa ay ee la waxaa uu",
    "sq": "të e në i dhe me nga një për është që më", "st": "ho le e ba ya ka a ke o ha tse tsa",
    "sw": "ya na wa kwa katika za ni la kuwa cha kama hii", "tl": "ng sa ang na mga ay at isang ito si ni noong",
    "ur": "کے ہے کی میں سے اور کا کو اس نے کہ ہیں", "yo": "ni ti je o n ó tí ní ati a e fún",
}  # fmt: skip


@cache
def _hashes() -> np.ndarray:
    """Of the words of each language, small, with a capital and in capitals; uint64 [L, W], 0 for none."""
    lists = [words.split() for words in FUNCTION_WORDS.values()]
    table = np.zeros((len(lists), 3 * max(map(len, lists))), np.uint64)
    for row, words in zip(table, lists, strict=True):
        forms = sorted({form for word in words for form in (word, word.capitalize(), word.upper())})
        row[: len(forms)] = split(Strings.of(forms)).hashes
    return table


@njit(cache=True, nogil=True)
def _count(hashes, kinds, ends, rows, table):
    counts = np.zeros((2, len(rows)), np.int64)
    for d in range(len(rows)):
        for i in range(ends[d], ends[d + 1] if rows[d] >= 0 else ends[d]):
            counts[1, d] += kinds[i] & LETTER != 0
            for word in table[rows[d]]:
                counts[0, d] += word == hashes[i]
    return counts


def count(strings: Strings, languages: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """How many function words of a language each text has, and how many words; int64 [D] each, 0 without a list."""
    places = {language: place for place, language in enumerate(FUNCTION_WORDS)}
    rows = np.array([places.get(language, -1) for language in languages], np.int64)
    words = split(strings)
    found, total = _count(words.hashes, words.kinds, words.ends, rows, _hashes())
    return found, total

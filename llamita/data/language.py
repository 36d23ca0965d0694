"""The natural language of texts: CLD2 (pycld2) and a naive Bayes over byte n-grams (py3langid) have to agree on it.

py3langid's model is read from the package, and walked here by a kernel: its answers, seven times as fast, so
both are asked of every text. Of the languages in LANGUAGES the likeliest is taken, with VOTE for what CLD2 is sure of.
Confidence = (2 support + probability) / 3: CLD2's score for it, by what it gives that language as a rule, and the
probability by py3langid among all that it knows; less for letters that the language lacks, and function words that the
text lacks: so its relatives are told, of which neither knows. What stays below the language's threshold is "und".
"""

import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numba
import numpy as np

from llamita.data import function_words
from llamita.data.script import UNWRITTEN, foreign_letters, sampled
from llamita.data.script import scripts as scripts_of
from llamita.data.strings import Strings

UNDETERMINED = "und"
VOTE = 1.0  # nats
BATCH = 1024  # texts weighed at once: bounds memory
FEATURE_BITS, LANES = 20, 8
SHORT_CHARS, SHORT_THRESHOLD = 20, 0.1
LONG_CHARS = 80  # from here on THRESHOLDS hold; between, a straight line
LETTERS_COST = 4.0  # confidence lost, were all letters foreign
WORDS_SPREAD = 0.35  # of the share of function words, from text to text, in it
WORDS_COST, WORDS_SPARED, WORDS_MOST = 0.3, 0.5, 4.0  # by standard deviations of function words too few

# Language: what CLD2 scores texts in it (median, a KB), the share of its words that are function words (0: not asked),
# and the least confidence accepted (of a text of LONG_CHARS). Chosen by benchmarks/language_id.py --fit, on one half of
# its sentences and paragraphs.
LANGUAGES: dict[str, tuple[int, float, float]] = {
    "af": (998, 0.26, 0.52), "am": (502, 0, 0.54), "ar": (819, 0.1, 0.36), "az": (1276, 0.1, 0.61),
    "be": (792, 0.16, 0.55), "bg": (675, 0.26, 0.26), "bn": (540, 0, 0.51), "br": (1208, 0, 0.71),
    "ca": (613, 0.28, 0.42), "cs": (1228, 0.12, 0.01), "cy": (1369, 0.26, 0.43), "da": (810, 0.24, 0.17),
    "de": (1069, 0.14, 0.41), "el": (1024, 0, 0.75), "en": (1175, 0.19, 0.36), "eo": (730, 0.27, 0.57),
    "es": (411, 0.24, 0.51), "et": (1096, 0.13, 0.53), "eu": (1049, 0.12, 0.2), "fa": (783, 0.22, 0.5),
    "fi": (1268, 0.11, 0.75), "fo": (1106, 0, 0.76), "fr": (774, 0.21, 0.35), "fy": (868, 0, 0.72),
    "ga": (1170, 0.27, 0.39), "gd": (1499, 0, 0.68), "gl": (866, 0, 0.44), "gu": (1024, 0, 0.76),
    "ha": (1136, 0, 0.58), "he": (745, 0, 0.35), "hi": (818, 0.17, 0.79), "hr": (619, 0.15, 0.35),
    "ht": (1133, 0, 0.74), "hu": (1270, 0.21, 0.51), "hy": (1024, 0, 0.75), "id": (1000, 0.12, 0.69),
    "ig": (1298, 0, 0.73), "is": (1136, 0.25, 0.35), "it": (627, 0.16, 0.51), "ja": (3326, 0, 0.78),
    "ka": (1024, 0, 0.8), "kk": (880, 0, 0.69), "km": (1024, 0, 0.8), "kn": (1024, 0, 0.8), "ko": (3645, 0, 0.78),
    "ky": (980, 0, 0.8), "la": (723, 0.13, 0.47), "lb": (1005, 0, 0.61), "lg": (927, 0.14, 0.62), "lo": (1024, 0, 0.8),
    "lt": (1080, 0, 0.6), "lv": (1246, 0.14, 0.45), "mg": (1561, 0, 0.73), "mk": (743, 0.26, 0.12),
    "ml": (1024, 0, 0.8), "mn": (1046, 0, 0.56), "mr": (593, 0, 0.38), "mt": (1258, 0, 0.74), "my": (1024, 0, 0.8),
    "ne": (575, 0, 0.72), "nl": (865, 0.25, 0.56), "no": (832, 0.23, 0.19), "pa": (1024, 0, 0.75),
    "pl": (1311, 0.14, 0.49), "ps": (936, 0, 0.8), "pt": (761, 0.21, 0.61), "ro": (815, 0.2, 0.55),
    "ru": (635, 0.15, 0.23), "si": (1024, 0, 0.8), "sk": (1293, 0.17, 0.32), "sl": (613, 0.19, 0.1),
    "sn": (1128, 0, 0.39), "so": (1334, 0.18, 0.65), "sq": (1234, 0.29, 0.22), "st": (879, 0.37, 0.42),
    "sv": (767, 0.19, 0.21), "sw": (964, 0.25, 0.61), "ta": (1024, 0, 0.8), "te": (1024, 0, 0.8),
    "tg": (1058, 0, 0.63), "th": (1024, 0, 0.8), "tl": (851, 0.4, 0.52), "tr": (1046, 0, 0.75), "tt": (897, 0, 0.78),
    "uk": (796, 0.12, 0.52), "ur": (955, 0.23, 0.61), "uz": (1388, 0, 0.8), "vi": (1520, 0, 0.57),
    "xh": (988, 0, 0.51), "yo": (768, 0.16, 0.48), "zh": (1936, 0, 0.8), "zu": (931, 0, 0.5),
}  # fmt: skip
THRESHOLDS = {language: threshold for language, (_, _, threshold) in LANGUAGES.items()}

# Varieties that short texts do not tell apart: they count as agreement. The first is what LANGUAGES lists.
VARIETIES = {
    "zh": ("zh", "zh-Hant", "yue", "wuu"), "no": ("no", "nb", "nn"), "id": ("id", "ms"), "ar": ("ar", "arz", "ary"),
    "hr": ("hr", "bs", "sr", "sr-ME"), "uz": ("uz", "uzs"), "he": ("he", "iw"),
}  # fmt: skip
TOLD_APART = ("nn", "sr")  # named all the same, where py3langid finds them; the others by the first name
_GROUP_OF = {variety: group for group, varieties in VARIETIES.items() for variety in varieties}

# Scripts of languages that are not written in Latin letters alone.
_WRITTEN = {
    "Arab": "ar az fa ps ur", "Armn": "hy", "Beng": "bn", "Cyrl": "az be bg kk ky mk mn ru sr tg tt uk uz",
    "Deva": "hi mr ne", "Ethi": "am", "Geor": "ka", "Grek": "el", "Gujr": "gu", "Guru": "pa", "Hang": "ko",
    "Hani": "ja ko zh", "Hebr": "he", "Jpan": "ja", "Khmr": "km", "Knda": "kn", "Laoo": "lo",
    "Latn": "az sr uz", "Mlym": "ml", "Mymr": "my", "Sinh": "si", "Taml": "ta", "Telu": "te", "Thai": "th",
}  # fmt: skip
_WRITTEN_IN = {script: frozenset(languages.split()) for script, languages in _WRITTEN.items()}
_NOT_IN_LATIN = frozenset().union(*_WRITTEN_IN.values()) - _WRITTEN_IN["Latn"]


class Weighed(NamedTuple):
    """What both say of each text."""

    label: list[str]
    """The likeliest of LANGUAGES, or the variety of it that TOLD_APART names."""
    probability: np.ndarray
    """Of it, or any variety of it, by py3langid among all the languages it knows; float32 [D]."""
    score: np.ndarray
    """What CLD2 scores it, less where only a part of the text is in it; 0 where it names others; float32 [D]."""
    chars: np.ndarray
    """Of the sample, int64 [D]."""
    foreign: np.ndarray
    """The share of letters that the language lacks, float32 [D]."""
    function_words: np.ndarray
    """Of the language, int64 [D]."""
    words: np.ndarray
    """int64 [D]"""


def identify(strings: Strings, scripts: Sequence[str] | None = None) -> tuple[list[str], np.ndarray]:
    """The language of each text, ISO 639-1 or where there is none 639-3, and the confidence, float32 [D] in [0, 1].

    "und" where it is none of LANGUAGES, in a script that the language is not written in, or too uncertain. Both see a
    sample of the start, middle and end. `scripts` = `script.scripts(strings)`, where that is known.
    """
    languages: list[str] = []
    confidences = np.zeros(len(strings), np.float32)
    for first in range(0, len(strings), BATCH):
        last = min(first + BATCH, len(strings))
        ends = strings.offsets[first : last + 1]
        batch = Strings(strings.data[ends[0] : ends[-1]], ends - ends[0])
        weighed = weigh(batch)
        sure = accepted(weighed, scripts[first:last] if scripts is not None else scripts_of(batch))
        languages += [label if is_sure else UNDETERMINED for label, is_sure in zip(weighed.label, sure, strict=True)]
        confidences[first:last] = confidence_of(weighed)
    return languages, confidences


def accepted(weighed: Weighed, scripts: Sequence[str]) -> np.ndarray:
    """Which are sure enough, and in a script their language is written in, bool [D]."""
    written = [is_written_in(label, script) for label, script in zip(weighed.label, scripts, strict=True)]
    return (confidence_of(weighed) >= threshold_of(weighed)) & np.array(written, bool)


def confidence_of(weighed: Weighed) -> np.ndarray:
    """float32 [D]"""
    facts = np.array([LANGUAGES[group_of(label)] for label in weighed.label], np.float32).reshape(-1, 3)
    support, expected = np.minimum(weighed.score / facts[:, 0], 1), facts[:, 1] * weighed.words
    lacking = (expected - weighed.function_words) / np.sqrt(1 + expected + (WORDS_SPREAD * expected) ** 2)
    cost = LETTERS_COST * weighed.foreign + WORDS_COST * np.clip(lacking - WORDS_SPARED, 0, WORDS_MOST)
    return np.maximum((2 * support + weighed.probability) / 3 - cost, 0).astype(np.float32)


def threshold_of(weighed: Weighed) -> np.ndarray:
    """The least confidence accepted of each text: that of its language, less for short texts; float64 [D]."""
    full = np.array([THRESHOLDS[group_of(label)] for label in weighed.label])
    share = np.clip((weighed.chars - SHORT_CHARS) / (LONG_CHARS - SHORT_CHARS), 0, 1)
    return SHORT_THRESHOLD + share * (full - SHORT_THRESHOLD)


def group_of(label: str) -> str:
    """The language of LANGUAGES that a variety counts as."""
    return _GROUP_OF.get(label, label)


def is_written_in(language: str, script: str) -> bool:
    if script == "Latn":
        return language not in _NOT_IN_LATIN
    return script != UNWRITTEN and language in _WRITTEN_IN.get(script, ())


def weigh(strings: Strings) -> Weighed:
    model = _model()
    sample = sampled(strings)
    texts = [_composed(sample[i]) for i in range(len(sample))]
    sample = Strings.of(texts)
    votes, scores = _scored_by_cld2(texts)
    columns, probability = _likeliest(_probabilities(sample, model), model.languages, votes)
    labels = [model.labels[column] for column in columns.tolist()]
    score = scores[np.arange(len(texts)), model.languages[columns]]
    groups = [group_of(label) for label in labels]
    foreign, found = foreign_letters(sample, groups), function_words.count(sample, groups)
    return Weighed(labels, probability, score, _chars(sample.data, sample.offsets), foreign, *found)


@numba.njit(cache=True, nogil=True)
def _likeliest(probabilities, languages, votes):
    """The best column of the best language of each text, int64 [D], and the probability of the language, float32."""
    columns, found = np.empty(len(votes), np.int64), np.empty(len(votes), np.float32)
    for d in range(len(votes)):
        sums = np.zeros(votes.shape[1], np.float32)
        for column in range(len(languages)):
            if languages[column] >= 0:
                sums[languages[column]] += probabilities[d, column]
        best = (np.log(sums + np.float32(1e-6)) + votes[d]).argmax()
        found[d], columns[d], most = sums[best], 0, np.float32(-1)
        for column in range(len(languages)):
            if languages[column] == best and probabilities[d, column] > most:
                columns[d], most = column, probabilities[d, column]
    return columns, found


def _composed(text: bytes) -> bytes:
    """In the normal form C that the model was trained on."""
    return text if text.isascii() else unicodedata.normalize("NFC", text.decode()).encode()


def _scored_by_cld2(texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Votes and scores by language, float32 [D, L] each. `texts` hold no control characters, which pycld2 refuses."""
    import pycld2

    places = {language: place for place, language in enumerate(LANGUAGES)}
    votes, scores = np.zeros((2, len(texts), len(places)), np.float32)
    for i, text in enumerate(texts):
        is_reliable, _, found = pycld2.detect(text, isPlainText=True, bestEffort=True)
        for rank, (_, language, percent, score) in enumerate(found):
            place = places.get(group_of(language))
            if place is not None:
                scores[i, place] = max(scores[i, place], score * (percent / 100) ** 0.5)
                if rank == 0 and is_reliable:
                    votes[i, place] = VOTE
    return votes, scores


class _Model(NamedTuple):
    """py3langid's: an automaton that finds features in bytes, and log-probabilities by language."""

    states: np.ndarray
    """Where in `nexts` a state reads, and in FEATURE_BITS the feature it ends, plus one, 0 for none; int64 [S]."""
    nexts: np.ndarray
    """The next state by row and byte, uint32 [R * 256]."""
    weights: np.ndarray
    """float32 [F, C]"""
    priors: np.ndarray
    """float32 [C]"""
    labels: list[str]
    """[C]"""
    languages: np.ndarray
    """Which of LANGUAGES a column counts for, -1 for none, int64 [C]."""


@cache
def _model() -> _Model:
    """Once a process: 0.4 s, and about 110 MB."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    read = LanguageIdentifier.from_model_file(MODEL_FILE)
    places = {language: place for place, language in enumerate(LANGUAGES)}
    labels = [name if name in TOLD_APART else group_of(name) for name in read.nb_classes]
    return _Model(
        np.array(read.tk_row, np.int64) << 8 + FEATURE_BITS | (np.array(read.tk_output, np.int64) + 1),
        np.frombuffer(read.tk_nextmove, f"u{read.tk_nextmove.itemsize}"),
        read.nb_ptc.astype(np.float32),
        read.nb_pc,
        labels,
        np.array([places.get(group_of(name), -1) for name in read.nb_classes]),
    )


def forget() -> None:
    """Let go of the model."""
    _model.cache_clear()


def _probabilities(strings: Strings, model: _Model) -> np.ndarray:
    """By column of the model, float32 [D, C]; tempered by the length, as py3langid does."""
    scores = _weights_summed(strings.data, strings.offsets, *model[:4])
    scores /= np.sqrt(np.maximum(strings.sizes, 1), dtype=np.float32)[:, None]
    np.exp(scores - scores.max(1, keepdims=True), out=scores)
    return scores / scores.sum(1, keepdims=True)


@numba.njit(cache=True, nogil=True)
def _walked(data, offsets, states, nexts):
    """The feature that ends at each byte of each text, -1 for none, int32 [N].

    LANES texts step by step at once: each step waits for memory, and their waits are one (2.6 times as fast).
    """
    ended = np.empty(len(data), np.int32)
    at, row = np.zeros((2, LANES), np.int64)
    for d in range(0, len(offsets) - 1, LANES):
        lanes = min(LANES, len(offsets) - 1 - d)
        together = len(data)
        for lane in range(lanes):
            at[lane], row[lane] = offsets[d + lane], states[0] >> FEATURE_BITS
            together = min(together, offsets[d + lane + 1] - offsets[d + lane])
        for _ in range(together):
            for lane in range(lanes):
                row[lane], ended[at[lane]] = _step(states, nexts, row[lane], data[at[lane]])
                at[lane] += 1
        for lane in range(lanes):
            for i in range(at[lane], offsets[d + lane + 1]):
                row[lane], ended[i] = _step(states, nexts, row[lane], data[i])
    return ended


@numba.njit(cache=True, nogil=True, _nrt=False)
def _step(states, nexts, row, byte):
    state = states[nexts[row + byte]]
    return state >> FEATURE_BITS, (state & ((1 << FEATURE_BITS) - 1)) - 1


@numba.njit(cache=True, nogil=True)
def _weights_summed(data, offsets, states, nexts, weights, priors):
    """log(1 + how often) times the weights of each feature a text has; all 0 where it has none. float32 [D, C]

    Feature by feature, not text by text: the weights are 57 MB, and a row that many texts have is fetched once.
    """
    scores = np.zeros((len(offsets) - 1, len(priors)), np.float32)
    ended = _walked(data, offsets, states, nexts)
    counts, ends, num = np.zeros(len(weights), np.int32), np.zeros(len(weights) + 1, np.int64), 0
    found = np.empty((3, len(data)), np.int32)  # a row each: feature, text, how often
    for d in range(len(scores)):
        begun = num
        for i in range(offsets[d], offsets[d + 1]):
            if ended[i] >= 0:
                if counts[ended[i]] == 0:
                    found[0, num], found[1, num] = ended[i], d
                    num += 1
                counts[ended[i]] += 1
        for k in range(begun, num):
            found[2, k], counts[found[0, k]] = counts[found[0, k]], 0
            ends[found[0, k] + 1] += 1
        if begun < num:
            scores[d] = priors
    ends, sorted_by_feature = np.cumsum(ends), np.empty((2, num), np.int32)
    for k in range(num):
        sorted_by_feature[:, ends[found[0, k]]] = found[1:, k]
        ends[found[0, k]] += 1
    k = 0
    for feature in range(len(weights)):
        while k < ends[feature]:
            text, weight = sorted_by_feature[0, k], np.float32(np.log1p(sorted_by_feature[1, k]))
            for column in range(len(priors)):
                scores[text, column] += weight * weights[feature, column]
            k += 1
    return scores


@numba.njit(cache=True, nogil=True)
def _chars(data, offsets):
    counts = np.zeros(len(offsets) - 1, np.int64)
    for d in range(len(counts)):
        for i in range(offsets[d], offsets[d + 1]):
            counts[d] += data[i] & 0xC0 != 0x80
    return counts

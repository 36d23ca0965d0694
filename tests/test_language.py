"""Layer: arithmetic, parity with the library, hostile input, and real text. What is not sure is not named."""

import bz2
import json
import random
from collections import defaultdict

import numpy as np
import pytest
import regex

from llamita.data import function_words, language, script
from llamita.data.function_words import FUNCTION_WORDS
from llamita.data.language import LANGUAGES, THRESHOLDS, Weighed, accepted, group_of, identify, is_written_in
from llamita.data.script import ALPHABETS, foreign_letters, sampled, scripts
from llamita.data.strings import Strings

SENTENCES = {
    "en": "The ship had left the harbour before anyone noticed that the captain was missing.",
    "de": "Das Schiff hatte den Hafen verlassen, bevor jemand merkte, dass der Kapitän fehlte.",
    "fr": "Le navire avait quitté le port avant que personne ne remarque l'absence du capitaine.",
    "pl": "Statek opuścił port, zanim ktokolwiek zauważył, że brakuje kapitana.",
    "ru": "Корабль покинул гавань раньше, чем кто-либо заметил отсутствие капитана.",
    "el": "Το πλοίο είχε φύγει από το λιμάνι πριν κάποιος προσέξει ότι έλειπε ο καπετάνιος.",
    "he": "הספינה עזבה את הנמל לפני שמישהו שם לב שהקברניט נעדר.",
    "ja": "船長がいないことに誰かが気づく前に、船は港を出ていた。",
    "zh": "在有人注意到船长失踪之前，这艘船已经离开了港口。",
    "ko": "선장이 없다는 것을 누군가 알아차리기 전에 배는 이미 항구를 떠났다.",
    "sr": "Брод је напустио луку пре него што је ико приметио да капетан недостаје.",
}
HOSTILE = [
    "",
    " ",
    "\n" * 5000,
    "a" * 100_000,
    "\u0000\u0001\ufffe\ufdd0",
    "12345 67890 " * 50,
    "\u0301" * 4000,
    "é" * 999,
    "😀" * 500,
]


@pytest.fixture(autouse=True)
def the_extra():
    pytest.importorskip("pycld2")
    pytest.importorskip("py3langid")


def test_scripts_are_those_of_unicode():
    every = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x10000), *range(0x1E900, 0x1E960)]))
    for name in script.SCRIPTS[1:]:
        property_name = {"Jpan": r"\p{Script=Hira}||\p{Script=Kana}"}.get(name, rf"\p{{Script={name}}}")
        letters = regex.findall(rf"[\p{{L}}&&[{property_name}]]", every, regex.V1)
        told = scripts(Strings.of(letters))
        assert told.count(name) >= 0.9 * len(letters) > 0, name
        assert len(letters) - told.count(name) - told.count("Zyyy") <= 0.06 * len(letters), name


def test_dominant_scripts():
    texts = [
        "",
        "12 + 3 = ?!",
        "aβγδ",
        "abcд",
        "漢字かな",
        "漢字" * 30 + "か",
        "中文",
        "한국어 漢",
        "٣ عربي",
        "«»",
        "𞤀𞤁 x",
    ]
    expected = ["Zyyy", "Zyyy", "Grek", "Latn", "Jpan", "Hani", "Hani", "Hang", "Arab", "Zyyy", "Adlm"]
    assert scripts(Strings.of(texts)) == expected


def plain_sample(text: str, size: int) -> bytes:
    whole = text.encode()
    starts = [0, (len(whole) - size // 3) // 2, len(whole) - size // 3]
    pieces = [whole] if len(whole) <= size else [whole[start : start + size // 3] + b"\n" for start in starts]
    clean = b""
    for piece in pieces:
        for char in regex.sub(rb"^[\x80-\xbf]+", b"", piece).decode(errors="replace"):
            code = ord(char)
            keep = char in "\t\n" or not (code < 32 or 127 <= code < 160 or 0xFDD0 <= code <= 0xFDEF)
            clean += char.encode() if keep and code & 0xFFFE != 0xFFFE else b" "
    return clean


def test_samples_are_whole_characters_without_controls():
    rng = random.Random(3)
    alphabet = "ab é猫😀\t\n\r\x00\x85\ufdd0\uffff\U0001fffe"
    texts = ["".join(rng.choices(alphabet, k=rng.randrange(60))) for _ in range(2000)]
    for size in (9, 30, 600):
        sample = sampled(Strings.of(texts), size)
        for i, text in enumerate(texts):
            cut = plain_sample(text, size).decode().replace("\ufffd", " ")
            assert sample[i].decode() == cut, (text, size)


def test_cld2_takes_every_character_of_a_sample():
    import pycld2

    every = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    texts = ["".join(every[i : i + 100]) for i in range(0, len(every), 100)]
    sample = sampled(Strings.of(texts))
    for i in range(len(sample)):
        pycld2.detect(sample[i], isPlainText=True, bestEffort=True)
    with pytest.raises(pycld2.error):
        pycld2.detect("\x01", isPlainText=True)


def some_sentences(shared_data, step: int) -> list[dict]:
    lines = bz2.decompress((shared_data / "multilingual" / "langid_sentences.jsonl.bz2").read_bytes()).splitlines()
    return [json.loads(line) for line in lines[::step]]


def test_the_kernel_is_py3langid(shared_data):
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    theirs = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    texts = [*HOSTILE, *SENTENCES.values(), *(row["text"] for row in some_sentences(shared_data, 200))]
    texts = [text for text in texts if not text.isupper()]  # which py3langid lower-cases
    sample = Strings.of([language._composed(text.encode()) for text in texts])
    ours = language._probabilities(sample, language._model())
    for text, row in zip(texts, ours, strict=True):
        expected = dict(theirs.rank(text))
        merged: dict[str, float] = defaultdict(float)
        for name, probability in zip(theirs.nb_classes, row.tolist(), strict=True):
            merged[name] += probability
        assert merged == pytest.approx(expected, abs=1e-4), text[:80]


def test_the_likeliest_language_is_a_sum_of_its_varieties_and_a_vote():
    rng = np.random.default_rng(2)
    probabilities = rng.dirichlet(np.full(12, 0.4), 200).astype(np.float32)
    languages = np.array([0, 1, 2, 0, -1, 3, 1, 2, -1, 3, 3, 0])
    votes = (rng.random((200, 4)) < 0.2).astype(np.float32)
    columns, found = language._likeliest(probabilities, languages, votes)
    for d in range(200):
        sums = np.array([probabilities[d, languages == place].sum() for place in range(4)])
        best = int((np.log(sums + 1e-6) + votes[d]).argmax())
        own = np.flatnonzero(languages == best)
        assert columns[d] == own[probabilities[d, own].argmax()] and found[d] == pytest.approx(sums[best], rel=1e-5)


def test_cld2_votes_for_the_first_it_names_where_it_is_sure():
    votes, scores = language._scored_by_cld2([text.encode() for text in SENTENCES.values()] + [b""])
    for i, name in enumerate(SENTENCES):
        place = list(LANGUAGES).index(group_of(name))
        assert votes[i].sum() == votes[i, place] == language.VOTE
        assert scores[i].argmax() == place and scores[i, place] > 100
    assert not votes[-1].any() and not scores[-1].any()


def test_sentences():
    found, confidences = identify(Strings.of(list(SENTENCES.values())))
    assert found == list(SENTENCES) and confidences.dtype == np.float32 and (confidences > 0.5).all()


def test_texts_are_judged_alone(monkeypatch):
    texts = [*SENTENCES.values(), *HOSTILE]
    whole = identify(Strings.of(texts))
    monkeypatch.setattr(language, "BATCH", 3)
    alone = [identify(Strings.of([text])) for text in texts]
    parts = ([name for names, _ in alone for name in names], np.concatenate([sure for _, sure in alone]))
    for found, confidences in (
        parts, identify(Strings.of(texts)), identify(Strings.of(texts), scripts(Strings.of(texts))),
    ):  # fmt: skip
        assert found == whole[0] and np.allclose(confidences, whole[1], atol=1e-5)
    assert identify(Strings.of([]))[0] == []


def test_hostile_texts_are_not_named():
    rng = random.Random(8)
    noise = ["".join(rng.choice("abcdefghijklmnopqrstuvwxyz  ") for _ in range(400)) for _ in range(100)]
    found, confidences = identify(Strings.of([*HOSTILE, *noise]))
    assert found[: len(HOSTILE)] == ["und"] * len(HOSTILE)
    assert found.count("und") >= len(found) - 5
    assert np.isfinite(confidences).all() and (confidences >= 0).all() and (confidences <= 1).all()


def weighed_as(names: list[str], probability, score, chars, foreign=0, found=0, words=0) -> Weighed:
    columns = (np.broadcast_to(column, len(names)) for column in (probability, score, chars, foreign, found, words))
    return Weighed(names, *columns)


def test_what_is_accepted():
    usual, _, threshold = LANGUAGES["en"]
    names = ["en"] * 5
    scores = np.array([usual, 2 * usual, 0, usual, usual], np.float32)
    weighed = weighed_as(names, np.array([1, 1, 0.27, 1, 1]), scores, np.array([100, 100, 20, 100, 100]))
    assert language.confidence_of(weighed) == pytest.approx([1, 1, 0.09, 1, 1])
    assert accepted(weighed, ["Latn", "Latn", "Latn", "Cyrl", "Zyyy"]).tolist() == [True, True, False, False, False]
    lengths = weighed_as(names, 1, 1, np.array([0, 20, 50, 80, 900]))
    middle = (language.SHORT_THRESHOLD + threshold) / 2
    assert language.threshold_of(lengths) == pytest.approx([0.1, 0.1, middle, threshold, threshold])
    assert all(0 < value <= 0.95 for value in THRESHOLDS.values())


def test_letters_and_words_that_do_not_fit_cost_confidence():
    usual, rate, _ = LANGUAGES["en"]
    foreign = weighed_as(["en"] * 3, 1, usual, 100, np.array([0, 0.01, 0.5]))
    assert language.confidence_of(foreign) == pytest.approx([1, 0.96, 0])
    lacking = weighed_as(["en"] * 4, 1, usual, 600, 0, np.array([100 * rate, 100 * rate + 9, 4, 0]), 100)
    sure = language.confidence_of(lacking)
    assert sure[0] == sure[1] == 1 and sure[3] < sure[2] < 0.75
    assert language.confidence_of(weighed_as(["ja"], 1, LANGUAGES["ja"][0], 600, 0, 0, 100)) == 1, "no list, no cost"


def plain_foreign(text: str, name: str) -> float:
    letters = [char for char in text if char.isalpha() and ord(char) < 0x2000]
    more, _, lacking = ALPHABETS[name].partition("-")
    own = (set(script._COMMON) - set(lacking)) | set(more)
    shared = regex.compile(r"[\p{Latin}\p{Cyrillic}\p{Arabic}\p{Myanmar}]")
    found = [char for char in letters if shared.match(char) and char not in own and char.lower()[0] not in own]
    return len(found) / max(1, len(letters))


def test_foreign_letters():
    texts = ["", "Příliš žluťoučký", "Příliš žluťoučký", "WXW ab", "WXW ab", "ကၐ", "猫猫", "İstanbul", "ab\u0301"]
    names = ["cs", "cs", "pl", "en", "es", "my", "en", "tr", "en"]
    found = foreign_letters(Strings.of(texts), names)
    assert found == pytest.approx([0, 0, 7 / 15, 0, 2 / 5, 0.5, 0, 0, 0])
    assert foreign_letters(Strings.of(["щ"]), ["el"]) == 0, "a language without an alphabet here"
    rng = random.Random(5)
    texts = ["".join(rng.choices("abwxqzéłšČİщҚەگငၐ猫 1.", k=rng.randrange(40))) for _ in range(len(ALPHABETS) * 5)]
    names = [*ALPHABETS] * 5
    assert foreign_letters(Strings.of(texts), names) == pytest.approx(list(map(plain_foreign, texts, names)), abs=1e-6)


def test_alphabets_and_function_words_are_of_languages_that_are_named():
    assert set(ALPHABETS) | set(FUNCTION_WORDS) <= set(LANGUAGES)
    assert {name for name, (_, rate, _) in LANGUAGES.items() if rate} <= set(FUNCTION_WORDS)
    for name, letters in ALPHABETS.items():
        assert not set(letters.partition("-")[0]) & set(script._COMMON), f"{name} adds what all have"
        assert set(letters.partition("-")[2]) <= set(script._COMMON), f"{name} lacks what none has"
        words = FUNCTION_WORDS.get(name, "")
        assert foreign_letters(Strings.of([words]), [name]) == 0, f"{name} writes its own words with foreign letters"


def test_function_words_are_counted():
    texts = ["", "The cat and THE dog, of 12.", "the and", "Der Hund und die Katze", "the", "ни the"]
    found, words = function_words.count(Strings.of(texts), ["en", "en", "de", "de", "ja", "en"])
    assert found.tolist() == [0, 4, 0, 3, 0, 1] and words.tolist() == [0, 6, 2, 5, 0, 2]
    rng = random.Random(7)
    names = [*FUNCTION_WORDS]
    texts = [" ".join(rng.choices([*FUNCTION_WORDS[name].split(), "xyzzy", "7"], k=30)) for name in names]
    lists = [FUNCTION_WORDS[name].split() for name in names]
    assert all(len(set(words)) == len(words) for words in lists)
    expected = [sum(map(words.__contains__, text.split())) for words, text in zip(lists, texts, strict=True)]
    assert function_words.count(Strings.of(texts), names)[0].tolist() == expected


def test_scripts_and_varieties():
    assert is_written_in("sr", "Cyrl") and is_written_in("sr", "Latn") and is_written_in("ja", "Hani")
    assert not is_written_in("ru", "Latn") and not is_written_in("en", "Cyrl") and not is_written_in("zh", "Jpan")
    assert group_of("zh-Hant") == "zh" and group_of("ms") == "id" and group_of("en") == "en"
    written = set().union(*language._WRITTEN_IN.values())
    assert {group_of(name) for name in written} <= set(LANGUAGES), "a script of a language that is never named"


def test_real_sentences(shared_data):
    rows = [row for row in some_sentences(shared_data, 11) if group_of(row["lang"]) in LANGUAGES]
    rights: dict[str, list[bool]] = defaultdict(list)
    for row, name in zip(rows, identify(Strings.of([row["text"] for row in rows]))[0], strict=True):
        rights[group_of(row["lang"])].append(group_of(name) == group_of(row["lang"]))
    shares = sorted((float(np.mean(right)) for right in rights.values()), reverse=True)
    assert len(shares) >= 65 and np.mean(shares) >= 0.95 and np.mean(shares[:45]) >= 0.99


def paragraphs_of(shared_data, names: set[str]) -> list[str]:
    lines = bz2.decompress((shared_data / "multilingual" / "udhr.jsonl.bz2").read_bytes()).splitlines()
    rows = [row for row in map(json.loads, lines) if row["id"] in names]
    return [part for row in rows for part in row["text"].split("\n") if len(part) >= 60]


def test_languages_outside_are_refused(shared_data):
    names = {"quy", "kab", "fur", "tzh", "ewe", "lus", "hmn", "chv", "sah", "bam", "nav", "wol", "sme", "gaa", "aym"}
    texts = paragraphs_of(shared_data, names)
    assert len(texts) > 400 and identify(Strings.of(texts))[0].count("und") >= 0.97 * len(texts)


def test_relatives_are_told_by_letters_and_function_words(shared_data, monkeypatch):
    texts = paragraphs_of(shared_data, {"shn", "mnw", "kea", "pnb", "pap", "rmy", "skr", "tly", "hsb", "dyu"})
    assert len(texts) > 400 and identify(Strings.of(texts))[0].count("und") >= 0.9 * len(texts)
    monkeypatch.setattr(language, "LETTERS_COST", 0)
    monkeypatch.setattr(language, "WORDS_COST", 0)
    assert identify(Strings.of(texts))[0].count("und") < 0.75 * len(texts)

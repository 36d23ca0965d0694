"""Layer: arithmetic and hostile files. The kernels do what their slow twins do, and learn what can be learnt."""

import json
import pickle
import random
import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llamita.data import classifier
from llamita.data.classifier import Classifier, auc, evaluate
from llamita.data.strings import Strings

HOSTILE = [
    "", " ", "\n" * 50, "a", "A b", "don\u2019t «stop» now\u2014no", "猫が好き。ABC", "x猫y 猫 ー", "한국어 띄어쓰기",
    "ⵜⴰⵎⴰⵣⵉⵖⵜ", "→ a\u00a0b ©c", "😀 ok", "0x1F 12,5", "ab" * 3000, "é" * 500, "ß\u0301!", "\u9fff\ua000\u2fff",
]  # fmt: skip
MASK = 2**64 - 1


def plain_words(text: str) -> list[bytes]:
    """By character, not by byte."""
    words, open_word = [], ""
    for char in text + " ":
        code = ord(char)
        alone = 0x3000 <= code <= 0x9FFF
        is_letter = char.isalnum() if char.isascii() else code >= 0xC0 and not 0x2000 <= code < 0x2C00
        if open_word and (alone or not is_letter):
            words.append(open_word)
            open_word = ""
        if alone:
            words.append(char)
        elif is_letter:
            open_word += char.lower() if char.isascii() else char
    return [word.encode() for word in words]


def plain_features(text: str, num_buckets: int) -> list[int]:
    found, before = [], 0
    for word in plain_words(text):
        code = 14695981039346656037
        for byte in word:
            code = ((code ^ byte) * 1099511628211) & MASK
        code ^= code >> 29
        found.append(code % num_buckets)
        if before:
            pair = ((before * 0x9E3779B97F4A7C15) & MASK) ^ code
            found.append((pair ^ (pair >> 31)) % num_buckets)
        before = code
    return found


def some_texts(count=60, seed=0) -> list[str]:
    rng = random.Random(seed)
    parts = [
        "The",
        "cat",
        "sat",
        "über",
        "猫",
        "です",
        "한국",
        "10",
        "…",
        "—",
        ", ",
        "\n",
        " ",
        " ",
        "A",
        "ⵣ",
        "\u00a0",
    ]
    return HOSTILE + ["".join(rng.choices(parts, k=rng.randrange(60))) for _ in range(count)]


def two_sides(count=400, seed=0) -> tuple[Strings, np.ndarray]:
    """Texts of two overlapping vocabularies."""
    rng = random.Random(seed)
    labels = [i % 2 for i in range(count)]
    texts = [" ".join(rng.choices([f"w{j + 5 * label}" for j in range(12)], k=12)) for label in labels]
    return Strings.of(texts), np.array(labels, np.float32)


def drawn(count: int, seed: int) -> tuple[Strings, np.ndarray]:
    """Texts whose words say how likely they are to be good."""
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 500, (count, 10))
    chances = 1 / (1 + np.exp(-np.random.default_rng(9).normal(0, 0.8, 500)[words].sum(1)))
    return Strings.of([" ".join(f"w{word}" for word in row) for row in words]), rng.random(count) < chances


def test_features_are_those_of_the_plain_twin():
    texts = some_texts()
    strings = Strings.of(texts)
    found = np.empty(10_000, np.uint64)
    for i, text in enumerate(texts):
        start, end = strings.offsets[i : i + 2]
        count = classifier._features(strings.data, start, end, np.uint64(2**12 - 1), found)
        assert found[:count].tolist() == plain_features(text, 2**12), text
    assert plain_words("Don\u2019t 猫が ab\u00a0C") == [b"don", b"t", "猫".encode(), "が".encode(), b"ab", b"c"]


def test_only_so_many_words_are_looked_at():
    strings = Strings.of(["a b c d e f"])
    found = np.empty(2 * 2, np.uint64)
    count = classifier._features(strings.data, 0, len(strings.data), np.uint64(2**20 - 1), found)
    assert found[:count].tolist() == plain_features("a b", 2**20)


def test_scores_are_those_of_the_plain_twin():
    texts, weights = some_texts(), np.random.default_rng(0).normal(size=2**10).astype(np.float32)
    model = Classifier(weights, 0.3, 1.5, -0.2)
    sums = [weights[plain_features(text, 2**10)].sum(dtype=float) for text in texts]
    counts = [max(1, len(plain_features(text, 2**10))) for text in texts]
    logits = 0.3 + np.array(sums) / np.sqrt(counts)
    np.testing.assert_allclose(model.logits(Strings.of(texts)), logits, rtol=1e-4, atol=1e-5)
    scores = model.score(Strings.of(texts))
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, 1 / (1 + np.exp(-(1.5 * logits - 0.2))), atol=1e-5)
    alone = [model.score(Strings.of([text]))[0] for text in texts]
    assert alone == scores.tolist() and model.score(Strings.of([""])).shape == (1,)


def test_what_can_be_learnt_is_learnt_and_nothing_else():
    strings, labels = two_sides()
    heldout, truth = two_sides(seed=1)
    model = Classifier.train(strings, labels, num_buckets=2**14)
    assert auc(model.score(heldout), truth) > 0.98
    shuffled = np.random.default_rng(0).permutation(labels)
    assert abs(auc(Classifier.train(strings, shuffled, num_buckets=2**14).score(heldout), truth) - 0.5) < 0.2
    soft = Classifier.train(strings, 0.2 + 0.6 * labels, num_buckets=2**14)
    assert auc(soft.score(heldout), truth) > 0.98 and np.ptp(soft.score(heldout)) < np.ptp(model.score(heldout))


def test_one_seed_one_model():
    strings, labels = two_sides(150)
    one, same, other = (Classifier.train(strings, labels, num_buckets=2**12, seed=seed) for seed in (3, 3, 4))
    assert one.weights.tobytes() == same.weights.tobytes() and (one.bias, one.scale) == (same.bias, same.scale)
    assert one.weights.tobytes() != other.weights.tobytes()
    assert pickle.loads(pickle.dumps(one)).score(strings).tolist() == one.score(strings).tolist()


def test_held_out_documents_calibrate():
    strings, labels = drawn(3000, 0)
    heldout, truth = drawn(3000, 1)
    model = Classifier.train(strings, labels, num_buckets=2**16, epochs=10)
    before = evaluate(Classifier(model.weights, model.bias).score(heldout), truth)
    after = evaluate(model.score(heldout), truth)
    assert after["calibration_error"] < 0.04 < before["calibration_error"]
    assert after["auc"] == before["auc"] > 0.75


def test_too_few_or_one_sided_documents_are_not_calibrated_and_one_side_alone_is_refused():
    strings, labels = two_sides(60)
    assert Classifier.train(strings, labels, num_buckets=2**10).scale == 1
    rare = np.zeros(400, np.float32)
    rare[np.random.default_rng(0).permutation(400)[-1]] = 1  # seed 0 holds the first of this order out
    assert Classifier.train(two_sides(400)[0], rare, num_buckets=2**10).scale == 1
    for one_side in (np.zeros(60), np.ones(60)):
        with pytest.raises(ValueError, match="label both"):
            Classifier.train(strings, one_side)


def test_a_saved_classifier_scores_as_before(tmp_path):
    strings, labels = two_sides(120)
    model = Classifier.train(strings, labels, num_buckets=2**10)
    model.save(tmp_path / "q.safetensors")
    assert Classifier.load(tmp_path / "q.safetensors").score(strings).tolist() == model.score(strings).tolist()


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "q.safetensors"
    Classifier(np.ones(8, np.float32), 0.0).save(path)
    data, facts = path.read_bytes(), {"version": 1, "bias": 0.0, "scale": 1.0, "shift": 0.0}
    for size in range(0, len(data), 5):
        (tmp_path / "cut").write_bytes(data[:size])
        with pytest.raises(ValueError, match="is no classifier of ours"):
            Classifier.load(tmp_path / "cut")
    with pytest.raises(ValueError, match="no classifier at"):
        Classifier.load(tmp_path / "absent")

    def refused(weights, changes, match):
        named = {"llamita_classifier": json.dumps(facts | changes)}
        save_file({"weights": weights}, path, named)
        with pytest.raises(ValueError, match=match) as caught:
            Classifier.load(path)
        assert "\n" not in str(caught.value)

    good = np.ones(8, np.float32)
    refused(good, {"version": 2}, "version 2, not 1")
    refused(good, {"scale": "x"}, "is no classifier of ours")
    refused(good, {"scale": None}, "is no classifier of ours")
    refused(good, {"bias": float("nan")}, "damaged")
    refused(good * np.float32(np.inf), {}, "damaged")
    refused(np.ones(12, np.float32), {}, re.escape("float32 (12,)"))
    refused(np.ones((2, 4), np.float32), {}, re.escape("float32 (2, 4)"))
    refused(np.ones(8, np.float16), {}, "float16")
    refused(np.ones(0, np.float32), {}, re.escape("(0,)"))
    save_file({"weights": good}, path)
    with pytest.raises(ValueError, match="llamita_classifier"):
        Classifier.load(path)
    assert load_file(path)["weights"].tolist() == good.tolist()


def test_auc_and_evaluation_are_as_defined():
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 6, 80) / 6, rng.integers(0, 2, 80)
    pairs = [(g > b) + (g == b) / 2 for g in scores[labels == 1] for b in scores[labels == 0]]
    assert auc(scores, labels) == pytest.approx(np.mean(pairs))
    found = evaluate(np.array([0.9, 0.8, 0.2, 0.6]), np.array([1, 0, 0, 1]))
    assert (found["accuracy"], found["kept"], found["precision"], found["recall"]) == (0.75, 0.75, 2 / 3, 1.0)
    assert found["calibration_error"] == pytest.approx((0.1 + 0.8 + 0.2 + 0.4) / 4)

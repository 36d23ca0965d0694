"""The quality classifier measured: AUC, calibration and speed, beside fastText's and scikit-learn's on the same split.

A task is good text against other text, in pieces, split by document: every fourth is tested on, in four turns, and the
means are told. fastText has its default and two better settings, ours and scikit-learn's only what they are by default.
Speeds are of CPU seconds, all threads together. Prints and writes JSON.

    python benchmarks/classifier.py SHARED/data/pretrain --peer .venv/peers-data/bin/python
"""

import argparse
import bz2
import json
import lzma
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from llamita.data.classifier import Classifier, evaluate
from llamita.data.strings import Strings

OPENERS = {".xz": lzma.open, ".bz2": bz2.open}
SIDE_CHARS = 2_000_000
FOLDS = 4
TASKS = {
    "wikipedia, web; 2000 characters": ("wiki_demo.txt.xz", "c4_demo.jsonl.xz", 2000),
    "wikipedia, web; 300 characters": ("wiki_demo.txt.xz", "c4_demo.jsonl.xz", 300),
    "fairy tales, TinyStories; 500 characters": ("fairytales_en.jsonl.xz", "tinystories_en_sample.jsonl.xz", 500),
    "novels, technical pages; 500 characters": ("novels_en_100.jsonl.bz2", "techdocs_en.jsonl.xz", 500),
}
# Run by the peer's Python: pieces and labels from a file, what came of them to standard output.
PEER = """
import json, sys, time
import fasttext
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import SGDClassifier
from sklearn.metrics import roc_auc_score

train, test = json.load(open(sys.argv[1]))
clean = lambda text: " ".join(text.lower().split())
train, test = ([(clean(text), label) for text, label in rows] for rows in (train, test))
truth, size = [label for _, label in test], sum(len(text.encode()) for text, _ in train) / 1e6
size_test = sum(len(text.encode()) for text, _ in test) / 1e6
path = sys.argv[1] + ".txt"
open(path, "w").write("".join(f"__label__{label} {text}\\n" for text, label in train))
rows = {}
for lr, epochs in ((0.1, 5), (0.5, 25), (1.0, 25)):
    begun = time.process_time()
    try:  # fewer than 10 threads leave a part of the matrix as the memory was
        model = fasttext.train_supervised(path, lr=lr, epoch=epochs, wordNgrams=2, thread=10, verbose=0)
    except RuntimeError:
        rows[f"fasttext lr {lr}, {epochs} epochs"] = {}  # it met NaN
        continue
    middle = time.process_time()
    scores = [dict(zip(*model.predict(text, k=2))).get("__label__1", 0) for text, _ in test]
    rows[f"fasttext lr {lr}, {epochs} epochs"] = {
        "auc": roc_auc_score(truth, scores), "train MB/s": epochs * size / (middle - begun),
        "score MB/s": size_test / (time.process_time() - middle)}
begun = time.process_time()
vectors = HashingVectorizer(ngram_range=(1, 2), n_features=2**22, alternate_sign=False)
judge = SGDClassifier(loss="log_loss", random_state=0)
judge.fit(vectors.transform(text for text, _ in train), [label for _, label in train])
middle = time.process_time()
scores = judge.decision_function(vectors.transform(text for text, _ in test))
rows["scikit-learn"] = {
    "auc": roc_auc_score(truth, scores), "train MB/s": size / (middle - begun),
    "score MB/s": size_test / (time.process_time() - middle)}
print(json.dumps(rows))
"""


def documents(path: Path, size: int) -> list[list[str]]:
    """Pieces of `size` characters of each document, SIDE_CHARS at most in all."""
    with OPENERS[path.suffix](path, "rt", encoding="utf-8") as file:
        docs = [json.loads(line)["text"] if ".jsonl" in path.name else line for line in file if line.strip()]
    most = max(size, SIDE_CHARS // len(docs))
    cut = [[text[i : i + size] for i in range(0, min(len(text), most), size)] for text in docs]
    return [[piece for piece in parts if len(piece) > size // 2] for parts in cut]


def measured(work, num_bytes: int, times: int = 5) -> tuple[float, object]:
    """MB/s of a CPU second, the median of some runs after one that compiles."""
    result, seconds = work(), []
    for _ in range(times):
        begun = time.process_time()
        result = work()
        seconds.append(time.process_time() - begun)
    return round(num_bytes / 1e6 / float(np.median(seconds)), 1), result


def fold(sides: list[list[list[str]]], number: int) -> list[list[tuple[str, int]]]:
    """Pieces and labels to learn from, shuffled, and to test on."""
    halves: list[list[tuple[str, int]]] = [[], []]
    for label, docs in ((1, sides[0]), (0, sides[1])):
        for place, parts in enumerate(docs):
            halves[place % FOLDS == number] += [(piece, label) for piece in parts]
    random.Random(number).shuffle(halves[0])
    return halves


def ours(train: list[tuple[str, int]], test: list[tuple[str, int]]) -> dict[str, float]:
    strings, heldout = (Strings.of([text for text, _ in rows]) for rows in (train, test))
    labels, truth = (np.array([label for _, label in rows], np.float32) for rows in (train, test))
    speed, model = measured(lambda: Classifier.train(strings, labels), 10 * len(strings.data), 3)
    scoring, scores = measured(lambda: model.score(heldout), len(heldout.data))
    return evaluate(scores, truth) | {"train MB/s": speed, "score MB/s": scoring}


def theirs(peer: str, halves: list[list[tuple[str, int]]]) -> dict[str, dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "task.json"
        path.write_text(json.dumps(halves))
        done = subprocess.run([peer, "-c", PEER, str(path)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def compare(sides: list[list[list[str]]], peer: str) -> dict:
    folds = [fold(sides, number) for number in range(FOLDS)]
    found = [{"ours": ours(*halves)} | theirs(peer, halves) for halves in folds]
    means: dict = {"pieces": sum(len(parts) for docs in sides for parts in docs)}
    for judge in found[0]:
        rows = [each[judge] for each in found if each[judge]]
        means[judge] = {name: round(float(np.mean([row[name] for row in rows])), 4) for name in rows[0]}
        means[judge]["aucs"] = [round(row["auc"], 4) for row in rows]
    return means


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--peer", required=True, help="a Python with fasttext and scikit-learn")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/classifier.json"))
    args = parser.parse_args()
    row: dict = {
        "command": f"python {sys.argv[0]} {args.texts.name} --peer python",
        "machine": {"device": platform.machine(), "python": platform.python_version()},
        "tasks": {},
    }
    for name, (good, bad, size) in TASKS.items():
        row["tasks"][name] = compare([documents(args.texts / side, size) for side in (good, bad)], args.peer)
        print(name, json.dumps(row["tasks"][name], indent=1), flush=True)
    args.out.write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main()

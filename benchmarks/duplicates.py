"""Near duplicates: recall beside theory, precision after verification, speed, and the works that two collections share.

    python benchmarks/duplicates.py PRETRAIN_FOLDER [--peers PYTHON]

PRETRAIN_FOLDER holds c4_demo, techdocs_en, novels_en_100 and novels_en_eltec; PYTHON has datasketch. Truth is the exact
Jaccard similarity of word 5-grams. Writes benchmarks/results/duplicates.json.
"""

import argparse
import bz2
import json
import lzma
import random
import statistics
import subprocess
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import numpy as np

from llamita.data import duplicates, lines, minhash, substrings
from llamita.data.strings import Strings
from llamita.runtime import machine

RESULT = Path(__file__).parent / "results" / "duplicates.json"
RATES = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.07, 0.1, 0.15)
BINS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 1.0001)
SAME = 0.75  # exact similarity from which a pair counts as a duplicate when precision is judged


def rows(path: Path) -> list[dict]:
    with (bz2 if path.suffix == ".bz2" else lzma).open(path, "rt") as file:
        return [json.loads(line) for line in file]


def jaccard(a: set, b: set) -> float:
    return len(a & b) / len(a | b)


def edited(words: list[str], rate: float, rng: random.Random, vocabulary: list[str]) -> list[str]:
    """Each word replaced, dropped or doubled with probability `rate`."""
    found = []
    for word in words:
        if rng.random() >= rate:
            found.append(word)
        elif (kind := rng.randrange(3)) == 0:
            found.append(rng.choice(vocabulary))
        elif kind == 1:
            found += [word, rng.choice(vocabulary)]
    return found


def pairs(folder: Path, count: int) -> tuple[list[str], list[str]]:
    """Real passages of 200 words and more, and an edit of each, at rates that spread the similarities."""
    rng = random.Random(0)
    texts = [row["text"] for name in ("c4_demo.jsonl.xz", "techdocs_en.jsonl.xz") for row in rows(folder / name)]
    words = [text.split() for text in texts]
    vocabulary = [word for text in words[:300] for word in text]
    passages = [text[i : i + 400] for text in words for i in range(0, len(text) - 200, 400)]
    rng.shuffle(passages)
    first, second = [], []
    for number in range(count):
        passage = passages[number % len(passages)]
        first.append(" ".join(passage))
        second.append(" ".join(edited(passage, rng.choice(RATES), rng, vocabulary)))
    return first, second


def recall_and_precision(folder: Path, count: int) -> dict:
    first, second = pairs(folder, count)
    by_bin: list[dict] = []
    truth = np.array([jaccard(minhash.shingles(a), minhash.shingles(b)) for a, b in zip(first, second, strict=True)])
    (a, sketches_a), (b, sketches_b) = (minhash.signed(Strings.of(texts)) for texts in (first, second))
    hit = (minhash.bands(a) == minhash.bands(b)).any(axis=1)
    by_signature, estimates = (a == b).mean(axis=1), minhash.similarity(sketches_a, sketches_b)
    found = {"pairs": len(truth), "bias": float((by_signature - truth).mean()),
             "rmse": float(np.sqrt(((by_signature - truth) ** 2).mean())),
             "rmse in theory": float(np.sqrt((truth * (1 - truth)).mean() / minhash.NUM_HASHES)),
             "rmse of sketches": float(np.sqrt(((estimates - truth) ** 2).mean())), "bins": by_bin}  # fmt: skip
    for low, high in pairwise(BINS):
        inside = (truth >= low) & (truth < high)
        theory = float(minhash.recall(truth[inside]).mean())
        by_bin.append({"similarity": [low, min(high, 1.0)], "pairs": int(inside.sum()),
                       "recall": float(hit[inside].mean()), "theory": theory})  # fmt: skip
    kept = hit & (estimates >= 0.8)
    found["candidates precision"] = float((truth[hit] >= SAME).mean())
    found["verified precision"] = float((truth[kept] >= SAME).mean())
    return found


def searched(texts: list[str]) -> tuple[np.ndarray, np.ndarray, dict]:
    """Verified pairs of some documents, all bands together, their similarities and how it went."""
    signatures, sketches = minhash.signed(Strings.of(texts))
    banded = minhash.bands(signatures)
    groups = [duplicates.same(banded[:, band]) for band in range(minhash.NUM_BANDS)]
    found = [duplicates.verified(group, sketches, 0.8) for group in groups]
    edges, first = np.unique(np.concatenate([pairs for pairs, _ in found]), axis=0, return_index=True)
    similarity = np.concatenate([alike for _, alike in found])[first]
    root = duplicates.clusters(len(texts), edges)
    sizes = np.bincount(root, minlength=len(texts))
    return edges, similarity, {"candidates": len(np.unique(np.concatenate(groups), axis=0)), "pairs": len(edges),
                               "clusters": int((sizes > 1).sum()), "largest": int(sizes.max())}  # fmt: skip


def one_collection(folder: Path, count: int) -> dict:
    """Passages and ten edits of each in one collection: what is found of the pairs that are at least 0.85 alike, whose
    groups hold strangers too, and whether chains join what is not alike.
    """
    rng = random.Random(1)
    passages = list(dict.fromkeys(pairs(folder, count)[0]))
    words = [text.split() for text in passages]
    vocabulary = [word for text in words[:300] for word in text]
    texts = [text for passage in words for text in
             (passage, *(edited(passage, rate, rng, vocabulary) for rate in RATES[:10]))]  # fmt: skip
    edges, _, found = searched([" ".join(text) for text in texts])
    grams = [minhash.shingles(" ".join(text)) for text in texts]
    by_pair = {tuple(edge) for edge in edges.tolist()}
    root = duplicates.clusters(len(texts), edges)
    group = len(RATES[:10]) + 1
    alike = [(a, b) for start in range(0, len(texts), group) for a in range(start, start + group)
             for b in range(a + 1, start + group) if jaccard(grams[a], grams[b]) >= 0.85]  # fmt: skip
    exact = np.array([jaccard(grams[a], grams[b]) for a, b in by_pair])
    strangers = [jaccard(grams[a], grams[root[a]]) < 0.5 for a in range(len(texts)) if root[a] != a]
    return {"documents": len(texts), **found, "precision": float((exact >= SAME).mean()), "alike": len(alike),
            "alike in one cluster": float(np.mean([root[a] == root[b] for a, b in alike])),
            "members less than 0.5 like the first": float(np.mean(strangers))}  # fmt: skip


def shared_text(folder: Path) -> dict:
    """Precision on real documents: every verified pair beside its exact similarity."""
    texts = [row["text"] for name in ("c4_demo.jsonl.xz", "techdocs_en.jsonl.xz", "tinystories_en_sample.jsonl.xz",
                                      "fairytales_en.jsonl.xz") for row in rows(folder / name)]  # fmt: skip
    edges, _, found = searched(texts)
    exact = [jaccard(minhash.shingles(texts[a]), minhash.shingles(texts[b])) for a, b in edges.tolist()]
    return {"documents": len(texts), **found, "precision": float(np.mean(np.array(exact) >= SAME))}


def novels(folder: Path) -> dict:
    """Whole novels of the two English collections: pairs and their exact similarity, and which of them are found.

    Looked at are all pairs of one with the other whose sketches share a number: of those 0.02 alike 99 in 100.
    """
    first, second = (rows(folder / f"novels_en_{name}.jsonl.bz2") for name in ("100", "eltec"))
    texts = [row["text"] for row in first + second]
    edges, _, found = searched(texts)
    by_pair = {tuple(edge) for edge in edges.tolist()}
    sketches = minhash.signed(Strings.of(texts))[1]
    every = np.array([(a, b) for a in range(len(first)) for b in range(len(first), len(texts))])
    estimates = duplicates.similarities(every, sketches)
    listed = []
    for (a, b), estimate in zip(every.tolist(), estimates.tolist(), strict=True):
        if estimate == 0:
            continue
        one, other = (minhash.shingles(texts[number]) for number in (a, b))
        if (exact := jaccard(one, other)) > 0.02:
            listed.append({
                "first": first[a]["id"], "other": f"{second[b - len(first)]['id']}: {second[b - len(first)]['title']}",
                "jaccard": round(exact, 3), "estimate": round(estimate, 3), "found": (a, b) in by_pair,
                "of the shorter": round(len(one & other) / min(len(one), len(other)), 3),
            })  # fmt: skip
    return {**found, "in both": sorted(listed, key=lambda pair: -pair["jaccard"])}


def speeds(folder: Path) -> dict:
    """MB a CPU second, medians of five."""
    texts = [text for row in rows(folder / "novels_en_100.jsonl.bz2")[:30] for text in cut(row["text"])]
    strings = Strings.of(texts)
    size = len(strings.data) / 1e6
    small = Strings.of(texts[:1000])

    def speed(work, size: float = size) -> float:
        work()
        taken = []
        for _ in range(5):
            began = time.process_time()
            work()
            taken.append(time.process_time() - began)
        return round(size / statistics.median(taken), 1)

    hashed = lines.hashes(strings)
    often = lines.frequent([hashed], 1)
    return {
        "megabytes": round(size, 1), "documents": len(texts),
        "signatures": speed(lambda: minhash.signed(strings)),
        "exact hashes": speed(lambda: duplicates.exact_hashes(strings)),
        "line hashes": speed(lambda: lines.hashes(strings)),
        "frequent lines": speed(lambda: lines.frequent([hashed], 6)),
        "lines cut": speed(lambda: lines.without(strings, often)),
        "substrings": speed(lambda: substrings.repeated(small, 200), len(small.data) / 1e6),
    }  # fmt: skip


def cut(text: str, size: int = 5000) -> list[str]:
    return [text[i : i + size] for i in range(0, len(text), size)]


DATASKETCH = """
import json, re, sys, time
from datasketch import MinHash
texts = json.load(open(sys.argv[1]))
began = time.process_time()
for text in texts:
    words = re.findall(r"\\w+", text.lower())
    signature = MinHash(num_perm=112)
    signature.update_batch([" ".join(words[i : i + 5]).encode() for i in range(max(1, len(words) - 4))])
seconds = time.process_time() - began
print(sum(len(text.encode()) for text in texts) / 1e6 / seconds)
"""


def datasketch(python: str, folder: Path) -> float:
    texts = [text for row in rows(folder / "novels_en_100.jsonl.bz2")[:2] for text in cut(row["text"])]
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(texts, file)
        file.flush()
        done = subprocess.run([python, "-c", DATASKETCH, file.name], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return round(float(done.stdout), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--peers", default="")
    parser.add_argument("--pairs", type=int, default=30000)
    args = parser.parse_args()
    speed = speeds(args.folder)
    found = {"command": "python benchmarks/duplicates.py PRETRAIN_FOLDER --peers PYTHON", "machine": machine(),
             "MB/s": speed}  # fmt: skip
    if args.peers:
        speed["datasketch signatures"] = datasketch(args.peers, args.folder)
    print(speed, flush=True)
    found["edited pairs"] = recall_and_precision(args.folder, args.pairs)
    print(json.dumps(found["edited pairs"], indent=1), flush=True)
    found["one collection"] = one_collection(args.folder, args.pairs // 60)
    print(found["one collection"], flush=True)
    found["shared text"] = shared_text(args.folder)
    print(found["shared text"], flush=True)
    found["novels"] = novels(args.folder)
    print(json.dumps(found["novels"], indent=1)[:3000], flush=True)
    RESULT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

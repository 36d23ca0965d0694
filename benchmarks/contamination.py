"""Decontamination measured: evaluation items hidden in clean text, as they are and edited, and what else is flagged.

Recall is by kind of edit, over items that can be looked for, the same number of every set; false alarms are by corpus,
a document at most 4,000 characters long, with their texts to be judged. Seeded; prints and writes JSON.

    python benchmarks/contamination.py EVAL_FOLDER CLEAN.jsonl[.xz] [CLEAN.txt ...]
"""

import argparse
import bz2
import json
import lzma
import platform
import random
import re
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np

from llamita.data.contamination import Index, Item, read_items
from llamita.data.strings import Strings

ITEMS_OF_A_SET = 50
CHARS = 4000
OPENERS = {".xz": lzma.open, ".bz2": bz2.open}
THRESHOLDS = (0.5, 0.6, 0.7, 0.8)


def some_words_changed(share: float):
    """Words chosen at random: another word, a typo (two letters swapped), or nothing, a third each."""

    def edit(parts: tuple[str, ...], rng: random.Random) -> str:
        words = re.split(r"(\s+)", "\n".join(parts))
        for i in rng.sample(range(0, len(words), 2), round(share * ((len(words) + 1) // 2))):
            word = words[i]
            kind = rng.randrange(3)
            if kind == 0:
                words[i] = rng.choice(("river", "seven", "quickly", "another", "green"))
            elif kind == 1 and len(word) > 3:
                k = rng.randrange(1, len(word) - 1)
                words[i] = word[: k - 1] + word[k] + word[k - 1] + word[k + 1 :]
            else:
                words[i] = ""
        return "".join(words)

    return edit


def clause_dropped(parts: tuple[str, ...], rng: random.Random) -> str:
    words = "\n".join(parts).split(" ")
    size = len(words) * 15 // 100
    first = rng.randrange(len(words) - size + 1)
    return " ".join(words[:first] + words[first + size :])


def rewrapped(parts: tuple[str, ...], rng: random.Random) -> str:
    words = " ".join(parts).split()
    return "\n".join("  ".join(words[i : i + 9]) for i in range(0, len(words), 9))


EDITS = {
    "verbatim": lambda parts, rng: "\n".join(parts),
    "upper case": lambda parts, rng: "\n".join(parts).upper(),
    "no punctuation": lambda parts, rng: re.sub(r"[^\w\s]", " ", "\n".join(parts)),
    "whitespace": rewrapped,
    "parts in another order": lambda parts, rng: "\n".join(rng.sample(parts, len(parts))),
    "longest part alone": lambda parts, rng: max(parts, key=len),
    "15% left out in one place": clause_dropped,
    "5% of words changed": some_words_changed(0.05),
    "10% of words changed": some_words_changed(0.1),
    "20% of words changed": some_words_changed(0.2),
}


def documents(path: Path) -> list[str]:
    """At most CHARS each."""
    with OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] if ".jsonl" in path.name else line for line in file if line.strip()]
    return [text[i : i + CHARS] for text in texts for i in range(0, len(text), CHARS)]


def recall(items: list[Item], index: Index, carrier: list[str], rng: random.Random) -> dict[str, dict]:
    by_set: dict[str, list[int]] = {}
    for number, item in enumerate(items):
        if number not in index.untestable:
            by_set.setdefault(re.sub(r"/(dev|test)/.*", "", item.set), []).append(number)
    chosen = [n for numbers in by_set.values() for n in rng.sample(numbers, min(ITEMS_OF_A_SET, len(numbers)))]
    found: dict[str, dict] = {}
    for kind, edit in EDITS.items():
        docs, missed = [], Counter()
        for number in chosen:
            text, at = rng.choice(carrier), rng.randrange(1000)
            docs.append(f"{text[:at]}\n{edit(items[number].parts, rng)}\n{text[at:]}")
        hits = index.find(Strings.of(docs))
        pairs = set(zip(hits.document.tolist(), hits.item.tolist(), strict=True))
        missed.update(items[n].set.rpartition("/")[2] for d, n in enumerate(chosen) if (d, n) not in pairs)
        found[kind] = {
            "items": len(chosen),
            "found": len(chosen) - missed.total(),
            "missed": dict(missed.most_common(8)),
        }
    return found


def alarms(path: Path, index: Index) -> dict:
    docs = documents(path)
    strings = Strings.of(docs)
    seconds = []
    for _ in range(3):
        begun = time.process_time()
        hits = index.find(strings)
        seconds.append(time.process_time() - begun)
    rows = index.rows(strings, hits, [str(i) for i in range(len(docs))])
    size = len(strings.data) / 1e6
    flagged = {str(t): len({row["document"] for row in rows if row["coverage"] >= t}) for t in THRESHOLDS}
    return {
        "documents": len(docs),
        "MB": round(size, 2),
        "MB/s": round(size / float(np.median(seconds)), 1),
        "documents flagged, by coverage": flagged,
        "hits": [
            f"{row['coverage']} {index.items[row['item']][0].rpartition('/')[2]} {index.items[row['item']][1]}: "
            + " ".join(row["excerpt"].split())[:120]
            for row in rows
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("evals", type=Path)
    parser.add_argument("clean", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/contamination.json"))
    args = parser.parse_args()
    begun = time.process_time()
    items = read_items([args.evals])
    index = Index.of(items, coverage=min(THRESHOLDS))
    seconds = time.process_time() - begun
    row: dict = {
        "command": " ".join(["python", sys.argv[0], *(Path(word).name for word in sys.argv[1:])]),
        "machine": {"device": platform.machine(), "python": platform.python_version()},
        "index": {
            "items": len(items),
            **Counter(index.untestable.values()),
            "passages": len(index.owners),
            "words": len(index.table.words),
            "MB": round(sum(array.nbytes for array in index.table) / 1e6, 1),
            "seconds": round(seconds, 1),
        },
    }
    index.find(Strings.of(["compile first"]))
    row["clean"] = {path.name: alarms(path, index) for path in args.clean}
    carrier = documents(args.clean[0])
    row["recall"] = {str(t): recall(items, Index.of(items, coverage=t), carrier, random.Random(5)) for t in THRESHOLDS}
    args.out.write_text(json.dumps(row, indent=1, ensure_ascii=False) + "\n")
    shown = {
        name: {key: value for key, value in facts.items() if key != "hits"} for name, facts in row["clean"].items()
    }
    print(json.dumps(row | {"clean": shown}, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()

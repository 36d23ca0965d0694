"""Encoding speed with one vocabulary: llamita's bulk and plain encoders beside tiktoken, HF tokenizers and gigatoken.

Every engine and number of cores gets a process of its own, pinned to its cores; engines take turns, ROUNDS times, and
the medians are given. The first pass is over text that the engine has not seen; the repeat is over the same again.
Documents are cut to about 4,000 characters. Writes one JSON row.

    python benchmarks/tokenizer_encode.py VOCABULARY TEXT [TEXT ...]
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from llamita.data.read import documents
from llamita.runtime import machine
from llamita.tokenizer import Tokenizer
from llamita.tokenizer.bulk import Bulk

ENGINES = ("llamita bulk", "gigatoken", "tiktoken", "llamita encode_batch", "hf")
ROUNDS, DOCUMENT_CHARS, MAX_BYTES = 3, 4000, 10 * 10**6


def cut(text: str) -> list[str]:
    found, start = [], 0
    while start < len(text):
        end = text.find("\n", start + DOCUMENT_CHARS)
        end = len(text) if end < 0 else end + 1
        found.append(text[start:end])
        start = end
    return found


def engine_of(name: str, tokenizer: Tokenizer, folder: Path, cores: int):
    """A function from documents to (ids, lengths), as the library gives them, made to numpy outside the clock."""
    if name == "llamita bulk":
        return Bulk(tokenizer).encode
    if name == "llamita encode_batch":
        return tokenizer.encode_batch
    if name == "tiktoken":
        return lambda docs: tokenizer._encoding.encode_ordinary_batch(docs, num_threads=cores)
    if name == "hf":
        from tokenizers import Tokenizer as HuggingFace

        theirs = HuggingFace.from_file(str(folder / "tokenizer.json"))
        return lambda docs: [row.ids for row in theirs.encode_batch_fast(docs, add_special_tokens=False)]
    import gigatoken

    engine = gigatoken.Tokenizer(folder / "tokenizer.json")
    return lambda docs: engine.encode_batch(docs, parallel=cores > 1)


def flat(rows) -> np.ndarray:
    if isinstance(rows, tuple):
        return rows[0]
    if isinstance(rows, list):
        return np.concatenate([np.array(row, np.uint32) for row in rows])
    return np.asarray(rows.layout.content.data)


def alone(name: str, folder: Path, cores: int) -> None:
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:cores]))
    os.environ["RAYON_NUM_THREADS"] = str(cores)
    docs = json.loads((folder / "docs.json").read_text())
    num_bytes = sum(len(doc.encode()) for doc in docs)
    encode = engine_of(name, Tokenizer.load(folder), folder, cores)
    encode(["warm up: import what is imported late"])
    seconds = []
    for _ in range(3):
        begun = time.perf_counter()
        rows = encode(docs)
        seconds.append(time.perf_counter() - begun)
    ids = flat(rows).astype(np.uint32)
    print(json.dumps({
        "first": num_bytes / 1e6 / seconds[0], "repeat": num_bytes / 1e6 / min(seconds[1:]),
        "ids": hashlib.sha256(ids.tobytes()).hexdigest()[:12], "tokens": len(ids),
    }))  # fmt: skip


def measured(folder: Path, cores: int) -> dict[str, dict]:
    runs: dict[str, list[dict]] = {name: [] for name in ENGINES}
    for _ in range(ROUNDS):
        for name in ENGINES:
            words = [sys.executable, __file__, str(folder), "--alone", name, "--cores", str(cores)]
            done = subprocess.run(words, capture_output=True, text=True, check=True)
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    assert len({run["ids"] for found in runs.values() for run in found}) == 1, "the engines disagree"
    return {
        name: {key: round(statistics.median(run[key] for run in found), 1) for key in ("first", "repeat")}
        for name, found in runs.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("vocabulary", type=Path)
    parser.add_argument("texts", nargs="*", type=Path)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/tokenizer_encode.json"))
    parser.add_argument("--alone", choices=ENGINES)
    parser.add_argument("--cores", type=int, default=1)
    args = parser.parse_args()
    if args.alone:
        return alone(args.alone, args.vocabulary, args.cores)
    row: dict = {"command": " ".join(["python", *sys.argv]), "machine": machine(), "unit": "MB/s, medians", "texts": {}}
    for text in args.texts:
        with tempfile.TemporaryDirectory() as name:
            folder, docs, size = Path(name), [], 0
            Tokenizer.load(args.vocabulary).save(folder)
            for doc in documents([text]):
                if size < MAX_BYTES:
                    docs += cut(doc.text)
                    size += len(doc.text.encode())
            (folder / "docs.json").write_text(json.dumps(docs))
            found = {f"{cores} cores": measured(folder, cores) for cores in (1, len(os.sched_getaffinity(0)))}
        row["texts"][text.name] = {"bytes": size, "documents": len(docs)} | found
        print(text.name, json.dumps(found, indent=1), flush=True)
        args.out.write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Raw text to shards: MB/s by stage on one core, wall time and memory on two, beside datatrove's same filters.

python benchmarks/data.py SHARED_DATA TOKENIZER [--peers PYTHON] [--megabytes 100]

SHARED_DATA holds pretrain/ and html/; PYTHON is the interpreter of an environment with datatrove, spacy and nltk.
Results go to benchmarks/results/data.json. Every build is a process of its own, its imports counted. `jsonl` and
`parquet` are of --megabytes of text, `jsonl_all` of all there is; `jsonl_further` is what each MB costs that the latter
has more, without what starting costs.
"""

import argparse
import bz2
import json
import lzma
import random
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet as pq

from llamita.runtime import machine

RESULT = Path(__file__).parent / "results" / "data.json"
CHARS = 5000  # of a document cut from a book, as long as a web page


def opened(path: Path):
    return (bz2 if path.suffix == ".bz2" else lzma).open(path, "rt")


def documents(shared: Path) -> Iterator[dict]:
    """Pages, stories, articles, technical documents, and books cut to the length of pages."""
    for name in ("c4_demo.jsonl.xz", "techdocs_en.jsonl.xz", "tinystories_en_sample.jsonl.xz", "fairytales_en.jsonl.xz",
                 "tinystories_ru.jsonl.xz", "novels_multi_eltec.jsonl.bz2", "novels_en_100.jsonl.bz2"):  # fmt: skip
        with opened(shared / "pretrain" / name) as lines:
            for number, line in enumerate(lines):
                text = json.loads(line)["text"]
                for start in range(0, len(text), CHARS):
                    piece = text[start : start + CHARS]
                    yield {"text": piece, "id": f"{name}:{number}:{start}", "source": name.split(".")[0]}


def sample(shared: Path, num_bytes: float, seed: int = 0) -> list[dict]:
    """Documents of all sources in one order, until there are `num_bytes` of text or no more."""
    rows = list(documents(shared))
    random.Random(seed).shuffle(rows)
    taken, size = [], 0
    for row in rows:
        taken.append(row)
        size += len(row["text"].encode())
        if size >= num_bytes:
            break
    return taken


def write_jsonl(rows: list[dict], path: Path) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def write_mixed(rows: list[dict], shared: Path, folder: Path) -> int:
    """50 MB of everything: jsonl, parquet, compressed jsonl, plain text, Python code, HTML. Returns its bytes of input
    text."""
    folder.mkdir()
    third = len(rows) // 3
    write_jsonl(rows[:third], folder / "a.jsonl")
    pq.write_table(pyarrow.Table.from_pylist(rows[third : 2 * third]), folder / "b.parquet", row_group_size=1000)
    with lzma.open(folder / "c.jsonl.xz", "wt", preset=1) as file:
        file.writelines(json.dumps(row) + "\n" for row in rows[2 * third :])
    total = sum(len(row["text"].encode()) for row in rows)
    code = folder / "code"
    code.mkdir()
    for path in sorted(Path(json.__file__).parents[1].glob("*.py")):
        (code / path.name).write_bytes(path.read_bytes())
        total += path.stat().st_size
    with tarfile.open(shared / "html" / "article_extraction_benchmark.tar.bz2") as tar:
        pages = [member for member in tar.getmembers() if member.name.endswith(".html.gz")][:40]
        (folder / "html").mkdir()
        for member in pages:
            data = tar.extractfile(member).read()
            (folder / "html" / Path(member.name).name).write_bytes(data)
            total += len(data)
    return total


def run_build(recipe: str, paths: list[Path], tokenizer: Path, workers: int) -> dict:
    """A build by the command line in a process of its own: wall seconds, CPU seconds, peak memory of the tree."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "corpus"
        command = [sys.executable, "-m", "llamita", "data", "build", recipe, *map(str, paths), "--tokenizer",
                   str(tokenizer), "--out", str(out), "--workers", str(workers)]  # fmt: skip
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        began = time.perf_counter()
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        peak = 0
        while process.poll() is None:
            peak = max(peak, tree_memory(process.pid))
            time.sleep(0.05)
        wall = time.perf_counter() - began
        assert process.returncode == 0, command
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        times, facts = (json.loads((out / name).read_bytes()) for name in ("build-times.json", "build.json"))
        removed = {reason: found["docs"] for reason, found in facts["removed"].items()}
        return {"wall": wall, "cpu": cpu, "peak_mib": peak / 2**20, "times": times, "bytes": facts["read"]["bytes_in"],
                "kept": facts["kept"], "removed": removed}  # fmt: skip


def tree_memory(pid: int) -> int:
    """Proportional resident bytes of a process and all below it: what they take together."""
    total = 0
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        total += next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Pss:"))
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError, StopIteration):
        return total
    return total + sum(tree_memory(int(child)) for child in children)


DATATROVE = """
import json, sys, time
from datatrove.data import Document
from datatrove.pipeline.filters import C4QualityFilter, FineWebQualityFilter
from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter
filters = [GopherRepetitionFilter(), GopherQualityFilter(), C4QualityFilter(filter_no_terminal_punct=False),
           FineWebQualityFilter()]
docs = [Document(text=json.loads(line)["text"], id=str(i)) for i, line in enumerate(open(sys.argv[1]))]
filters[1].filter(docs[0])  # what is loaded at first use
began = time.process_time()
kept = 0
for doc in docs:
    results = (filter.filter(doc) for filter in filters)
    kept += all((r if isinstance(r, bool) else r[0]) for r in results)
seconds = time.process_time() - began
print(json.dumps({"seconds": seconds, "bytes": sum(len(d.text.encode()) for d in docs), "kept": kept}))
"""


def datatrove(python: str, rows: list[dict], folder: Path) -> dict:
    path = write_jsonl(rows, folder / "peer.jsonl")
    done = subprocess.run([python, "-c", DATATROVE, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    return found | {"mb_per_s": found["bytes"] / found["seconds"] / 1e6}


def middle(runs: list[dict]) -> dict:
    """The run of median CPU seconds."""
    return sorted(runs, key=lambda run: run["cpu"])[len(runs) // 2]


def timed(name: str, path: Path, tokenizer: Path, num_runs: int) -> dict:
    """The median of some builds with one worker."""
    runs = [run_build("web", [path], tokenizer, 1) for _ in range(num_runs)]
    run = middle(runs)
    found = {"mb_per_s_wall": [round(r["bytes"] / r["wall"] / 1e6, 2) for r in runs],
             "mb_per_s_cpu": round(run["bytes"] / run["cpu"] / 1e6, 2), **run}  # fmt: skip
    print(name, found["mb_per_s_wall"], found["mb_per_s_cpu"], json.dumps(run["times"]), run["peak_mib"], flush=True)
    return found


def further(less: dict, more: dict) -> dict:
    """What the MB cost that one build has more than another, and what both spend whatever there is to read."""
    num_bytes, seconds = more["bytes"] - less["bytes"], more["cpu"] - less["cpu"]
    fixed = less["cpu"] - less["bytes"] * seconds / num_bytes
    return {"mb": num_bytes / 1e6, "cpu_mb_per_s": round(num_bytes / seconds / 1e6, 2), "fixed_cpu_seconds": fixed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shared", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--peers", default="")
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    found: dict = {"command": "python benchmarks/data.py SHARED_DATA TOKENIZER --peers PYTHON", "machine": machine()}
    with tempfile.TemporaryDirectory() as folder:
        rows = sample(args.shared, args.megabytes * 10**6)
        jsonl = write_jsonl(rows, Path(folder) / "text.jsonl")
        parquet = Path(folder) / "text.parquet"
        pq.write_table(pyarrow.Table.from_pylist(rows), parquet, row_group_size=1000)
        whole = write_jsonl(sample(args.shared, float("inf")), Path(folder) / "all.jsonl")
        for name, path in (("jsonl", jsonl), ("parquet", parquet), ("jsonl_all", whole)):
            found[name] = timed(name, path, args.tokenizer, args.runs)
        found["jsonl_further"] = further(found["jsonl"], found["jsonl_all"])
        print("jsonl_further", found["jsonl_further"], flush=True)
        if args.peers:
            found["datatrove"] = datatrove(args.peers, rows[:400], Path(folder))
            print("datatrove", found["datatrove"], flush=True)
        mixed = sample(args.shared, 46 * 10**6, seed=1)
        size = write_mixed(mixed, args.shared, Path(folder) / "mixed")
        runs = [run_build("web", [Path(folder) / "mixed"], args.tokenizer, 2) for _ in range(args.runs)]
        walls = [round(run["wall"], 2) for run in runs]
        found["mixed"] = {
            "input_bytes": size,
            "wall_seconds": walls,
            "median": statistics.median(walls),
            **middle(runs),
        }
        print("mixed", size, walls, [run["peak_mib"] for run in runs], flush=True)
    RESULT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

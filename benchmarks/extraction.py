"""Main text of 181 real pages: ours, resiliparse alone and trafilatura, by the pages' text made by hand.

The pages and the measure are those of github.com/scrapinghub/article-extraction-benchmark: shingles of four words,
counts of each page scaled to one, precision and recall averaged over the pages that have any. Ours was tuned on the
half "tune" (by a hash of the page's id); "test" is the other. Speed is MB of HTML a CPU second, median of three passes.
trafilatura runs in the Python given, beside lxml_html_clean. Of folders of manuals only the speed is measured, on some
6 MB of each, chosen by hash; pages that are refused unread count for nothing. Writes one JSON; prints it.

    python benchmarks/extraction.py article_extraction_benchmark.tar.bz2 [--peers PYTHON] [--manuals FOLDER ...]
"""

import argparse
import hashlib
import json
import re
import statistics
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

RESULTS = Path(__file__).parent / "results/extraction.json"
WORD = re.compile(r"\w+")
PASSES = 3
MANUAL_BYTES = 6_000_000


def shingles(text: str) -> Counter:
    words = WORD.findall(text)
    return Counter(tuple(words[i : i + 4]) for i in range(max(1, len(words) - 3)) if words)


def score(truth: dict[str, str], found: dict[str, str]) -> dict[str, float]:
    precisions, recalls = [], []
    for key, text in truth.items():
        wanted, got = shingles(text), shingles(found[key])
        common = (wanted & got).total()
        if got:
            precisions.append(common / got.total())
        if wanted:
            recalls.append(common / wanted.total())
    precision, recall = statistics.mean(precisions), statistics.mean(recalls)
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return {"precision": precision, "recall": recall, "f1": f1}


def half_of(key: str) -> str:
    return ("tune", "test")[hashlib.sha256(key.encode()).digest()[0] & 1]


def read(path: Path) -> tuple[dict[str, bytes], dict[str, str]]:
    pages, truth = {}, {}
    with tarfile.open(path) as tar:
        for member in tar:
            name = Path(member.name)
            if name.name == "ground-truth.json":
                truth = {key: page["articleBody"] for key, page in json.load(tar.extractfile(member)).items()}
            elif name.suffix == ".html":
                pages[name.stem] = tar.extractfile(member).read()
    return pages, truth


def ours() -> Callable[[bytes], str]:
    from llamita.data.extract import main_text

    def run(html: bytes) -> str:
        try:
            return main_text(html)
        except ValueError:
            return ""

    return run


def resiliparse(**options) -> Callable[[bytes], str]:
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.encoding import detect_encoding
    from resiliparse.parse.html import HTMLTree

    def run(html: bytes) -> str:
        charset = detect_encoding(html, from_html_meta=True) or "utf-8"
        return extract_plain_text(HTMLTree.parse_from_bytes(html, charset), **options)

    return run


def trafilatura(**options) -> Callable[[bytes], str]:
    from trafilatura import extract

    return lambda html: extract(html, **options) or ""


EXTRACTORS: dict[str, Callable[[], Callable[[bytes], str]]] = {
    "llamita": ours,
    "resiliparse, all text": resiliparse,
    "resiliparse, main content": lambda: resiliparse(main_content=True),
    "resiliparse, main content, no alt texts, comments, dates": lambda: resiliparse(
        main_content=True, alt_texts=False, comments=False, post_meta=False
    ),
    "trafilatura": trafilatura,
    "trafilatura, no comments": lambda: trafilatura(include_comments=False),
    "trafilatura, favor precision": lambda: trafilatura(favor_precision=True),
    "trafilatura, fast, no comments": lambda: trafilatura(fast=True, include_comments=False),
}


def timed(name: str, pages: dict[str, bytes]) -> tuple[dict, dict[str, str]]:
    run = EXTRACTORS[name]()
    seconds = []
    for _ in range(PASSES):
        start = time.process_time()
        found = {key: run(html) for key, html in pages.items()}
        seconds.append(time.process_time() - start)
    megabytes = sum(map(len, pages.values())) / 1e6
    row: dict = {"MB per CPU second": round(megabytes / statistics.median(seconds), 1)}
    row["pages without text"] = sum(not text for text in found.values())
    return row, found


def measured(name: str, pages: dict[str, bytes], truth: dict[str, str]) -> dict:
    row, found = timed(name, pages)
    for half in ("tune", "test", "all"):
        chosen = {key: text for key, text in truth.items() if half in (half_of(key), "all")}
        row[half] = {name: round(value, 4) for name, value in score(chosen, found).items()}
    return row


def manuals(folder: Path) -> dict:
    from llamita.data.extract import MAX_BYTES, MAX_TAGS

    def order(path: Path) -> bytes:
        return hashlib.sha256(str(path.relative_to(folder)).encode()).digest()

    pages: dict[str, bytes] = {}
    for path in sorted((path for path in folder.rglob("*.html") if path.is_file()), key=order):
        html = path.read_bytes()
        if len(html) <= MAX_BYTES and html.count(b"<") <= MAX_TAGS:
            pages[str(path)] = html
        if sum(map(len, pages.values())) > MANUAL_BYTES:
            break
    row = {"pages": len(pages), "bytes": sum(map(len, pages.values()))}
    return row | {name: timed(name, pages)[0] for name in ("llamita", "resiliparse, main content")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tar", type=Path)
    parser.add_argument("--peers", help="a Python that has trafilatura")
    parser.add_argument("--manuals", type=Path, nargs="*", default=[], help="folders of HTML")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    pages, truth = read(args.tar)
    if args.only:
        print(json.dumps(measured(args.only, pages, truth)))
        return
    rows = {}
    for name in EXTRACTORS:
        if not name.startswith("trafilatura"):
            rows[name] = measured(name, pages, truth)
        elif args.peers:
            command = [args.peers, __file__, str(args.tar), "--only", name]
            rows[name] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        print(name, rows.get(name, "not measured: needs --peers"), file=sys.stderr)
    results = {"pages": len(pages), "bytes": sum(map(len, pages.values())), "extractors": rows}
    results["manuals"] = {folder.name: manuals(folder) for folder in args.manuals}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

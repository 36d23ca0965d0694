"""What a corpus of so many tokens takes: core-hours by stage, wall time, disk, memory, tasks. Pure arithmetic.

TB = 10^12 bytes; MB/s = 10^6 bytes that enter a stage in a CPU second of one core. Volumes go backwards from the tokens
wanted: kept = tokens x bytes a token, ruled = kept / share that deduplication leaves, raw = ruled / share that rules
leave, HTML = tokens / tokens a dump x bytes of a dump.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

TERA, GIGA, MEGA = 1e12, 1e9, 1e6

# FineWeb (arXiv 2406.17557): 15T tokens of 96 dumps of Common Crawl. Recalled: 36T before deduplication and its last
# filters, 20T between the two. Its first filters, language among them, had come before: raw is the least it can be.
DUMPS_PER_TOKEN = 96 / 15e12
HTML_BYTES_PER_DUMP = 400 * TERA  # unpacked: the upper end of the 200 to 400 TiB that FineWeb's authors name
DOC_TOKENS = 1000  # assumed: 15 G documents for 15T tokens
LZ4 = 0.70  # bytes on disk of a byte of text in Parquet; measured on 60 MB of books, pages and articles in two scripts
HASH_BYTES = (
    1232  # a document: 16 hashes of 12 bytes, 2 numbers of 8, a sketch of 256 of 4 (data/job.py, HASH and ROWS)
)
RECORD_BYTES, LEDGER_BYTES = 30, 150  # a document: data/shards.py; its row of the ledger is assumed
TOKEN_BYTES = 4
RESOLVE_BYTES = 64  # a document, in memory: the arrays of data/resolve.py
WORKER_BYTES = 0.5 * GIGA  # assumed: imports, kernels and a block of 4 MiB; goal: two workers below 1 GB
MATCH_BYTES = 3 * 512 * 2**20  # hashes, their numbers and their order (data/resolve.py)


class Speed(NamedTuple):
    mb_per_s: float
    source: str


@dataclass(frozen=True)
class Yields:
    """What share of the bytes each half of a build leaves, and how long a token is."""

    rules: float = 15 / 20
    dedup: float = 20 / 36
    bytes_per_token: float = 4.2
    source: str = "FineWeb as recalled, 36T -> 20T (duplicates) -> 15T (filters), without what went by language"


# What enters each stage. A build's own clock knows fewer stages than the trials of single parts do.
PARTS = {
    "extract": "html", "read": "raw", "language": "raw", "rules": "raw", "contamination": "ruled", "pii": "ruled",
    "hashes": "ruled", "dedup": "ruled", "lines": "kept", "encode": "kept", "shards": "kept",
}  # fmt: skip
BUILD = {
    "read": "raw", "match": "ruled", "resolve": "ruled", "lines": "ruled", "frequent": "ruled", "encode": "ruled",
    "shards": "ruled",
}  # fmt: skip
ONE_TASK = ("dedup", "resolve")  # decided once for the whole build

# Documents of benchmarks/data.py, each step alone, process CPU time, mean of two runs. benchmarks/results/data.json has
# the stage `read` whole, first calls counted: 14.5 MB/s of raw text.
TRIAL = "measured on 24 MB of web pages and books"
SPEEDS = {
    "extract": Speed(67.4, "articles, measured, benchmarks/results/extraction.json"),
    "read": Speed(98, f"jsonl, kinds, Parquet; {TRIAL}"),
    "language": Speed(53, TRIAL),
    "rules": Speed(54, f"with lines of C4; {TRIAL}"),
    "contamination": Speed(142, "measured, benchmarks/results/contamination.json"),
    "pii": Speed(478, TRIAL),
    "hashes": Speed(179, f"exact, address, 112 MinHashes; {TRIAL}"),
    "dedup": Speed(1143, "match and resolve of 20,573 documents, benchmarks/results/data.json"),
    "lines": Speed(224, f"hashed, counted, cut; {TRIAL}"),
    "encode": Speed(226, "measured, benchmarks/results/tokenizer_encode.json"),
    "shards": Speed(342, "20,573 documents, benchmarks/results/data.json"),
}


@dataclass(frozen=True)
class Row:
    stage: str
    input_bytes: float
    mb_per_s: float
    core_hours: float
    wall_hours: float
    worker_bytes: float
    """Peak memory of a worker."""
    source: str


@dataclass(frozen=True)
class Plan:
    tokens: float
    cores: int
    rows: list[Row]
    disk_bytes: dict[str, float]
    """What each kind of file takes; together the peak, just before the work folder goes."""
    builds: int
    """Corpora, each of the documents that are compared with one another."""
    documents: float
    parts: int
    shards: int
    assumptions: list[str]

    @property
    def core_hours(self) -> float:
        return sum(row.core_hours for row in self.rows)

    @property
    def wall_hours(self) -> float:
        return sum(row.wall_hours for row in self.rows)


def measured(times: Mapping[str, Any], facts: Mapping[str, Any]) -> tuple[dict[str, Speed], Yields]:
    """Speeds and yields of a build, of its `build-times.json` and `build.json`. Raises ValueError: it kept nothing."""
    kept = sum(share["bytes"] for share in facts["shares"].get("source", {}).values())
    read, tokens = facts["read"], facts["kept"]["tokens"]
    if not kept:
        raise ValueError("the corpus that is measured kept nothing: measure one that holds documents")
    source = f"measured, a build of {read['bytes_in'] / MEGA:,.1f} MB"
    speeds = {
        stage: Speed(spent["bytes"] / spent["cpu_seconds"] / MEGA, source)
        for stage, spent in times.items()
        if spent["cpu_seconds"]
    }
    return speeds, Yields(read["bytes"] / read["bytes_in"], kept / read["bytes"], kept / tokens, source)


def is_web(recipe: Mapping[str, Any]) -> bool:
    """Whether a recipe, as nested plain values, is for web pages: no other compares addresses."""
    return recipe["dedup"]["url"]


def stages(recipe: Mapping[str, Any]) -> dict[str, str]:
    """The PARTS that a recipe, as nested plain values, asks for."""
    dedup = recipe["dedup"]
    wanted = {
        "extract": is_web(recipe),
        "language": recipe["language"]["identify"],
        "rules": any(recipe["rules"][kind] for kind in ("prose", "code", "table")),
        "contamination": recipe["contamination"]["evals"],
        "pii": recipe["pii"],
        "dedup": dedup["exact"] or dedup["url"] or dedup["minhash"],
        "hashes": dedup["minhash"],
        "lines": dedup["lines_more_than"],
    }
    return {stage: volume for stage, volume in PARTS.items() if wanted.get(stage, True)}


def plan(
    tokens: float, cores: int, entering: Mapping[str, str], speeds: Mapping[str, Speed], yields: Yields, *,
    part_bytes: int, shard_tokens: int, dumps: bool,
) -> Plan:  # fmt: skip
    """What `tokens` kept tokens take on `cores` cores; `entering` = PARTS or BUILD, as far as they are wanted.

    `dumps`: the input is Common Crawl and each dump a build of its own, as FineWeb found better. Raises ValueError:
    no tokens, no cores.
    """
    if not (0 < tokens < math.inf and cores >= 1):
        raise ValueError(f"tokens must be more than 0 and cores at least 1, not {tokens} and {cores}")
    kept = tokens * yields.bytes_per_token
    ruled = kept / yields.dedup
    num_dumps = tokens * DUMPS_PER_TOKEN
    builds = max(1, round(num_dumps)) if dumps else 1
    html = num_dumps * HTML_BYTES_PER_DUMP
    volumes = {"kept": kept, "ruled": ruled, "raw": ruled / yields.rules, "html": html}
    docs = {name: volume / (DOC_TOKENS * yields.bytes_per_token) for name, volume in volumes.items()}
    memory = {"match": MATCH_BYTES} | dict.fromkeys(ONE_TASK, docs["ruled"] / builds * RESOLVE_BYTES)
    rows = []
    for stage, volume in entering.items():
        if stage in speeds:
            hours = volumes[volume] / (speeds[stage].mb_per_s * MEGA) / 3600
            at_once = min(cores, builds) if stage in ONE_TASK else cores
            rows.append(
                Row(stage, volumes[volume], speeds[stage].mb_per_s, hours, hours / at_once,
                    max(WORKER_BYTES, memory.get(stage, 0)), speeds[stage].source)
            )  # fmt: skip
    a_corpus = kept / yields.bytes_per_token * TOKEN_BYTES + docs["kept"] * (RECORD_BYTES + LEDGER_BYTES)
    disk = {
        "kept by rules, lz4": ruled * LZ4,
        "hashes": docs["ruled"] * HASH_BYTES,
        "ids before they are shards": a_corpus,
        "removed, lz4": (volumes["raw"] - kept) * LZ4,
        "corpus": a_corpus,
    }
    return Plan(
        tokens, cores, rows, disk, builds, docs["kept"], math.ceil(volumes["raw"] / part_bytes),
        math.ceil(tokens / shard_tokens), assumptions(yields, volumes, dumps, builds),
    )  # fmt: skip


def assumptions(yields: Yields, volumes: Mapping[str, float], dumps: bool, builds: int) -> list[str]:
    lines = [
        f"{yields.bytes_per_token:.2f} bytes a token, rules leave {yields.rules:.0%} of the bytes and deduplication "
        f"{yields.dedup:.0%}: {yields.source}",
        f"documents of {DOC_TOKENS:,} tokens: 15 G of them are 15T tokens",
        f"text in Parquet takes {LZ4:.0%} of its bytes (lz4, measured on 60 MB); hashes {HASH_BYTES} bytes a document",
    ]
    if dumps:
        lines.append(
            f"a dump of Common Crawl gives {1 / DUMPS_PER_TOKEN / GIGA:,.0f} G tokens (FineWeb, arXiv 2406.17557: 15T "
            f"of 96) and is {HTML_BYTES_PER_DUMP / TERA:,.0f} TB of HTML at most; it is read as a stream, not stored: "
            f"{volumes['html'] / TERA:,.0f} TB in all"
        )
        what = f"{builds} builds, a dump each" if builds > 1 else "one build, of one dump or less of it"
        lines.append(
            f"{what}: FineWeb found global deduplication no better (section 3.4), and the one task that decides holds "
            f"{RESOLVE_BYTES} bytes a document"
        )
    return lines


def text(plan: Plan) -> list[str]:
    """The plan as lines for a person."""
    lines = [
        f"{'stage':14}{'input TB':>12}{'MB/s/core':>11}{'core-hours':>13}{'wall hours':>13}{'GB a worker':>13}  source"
    ]
    lines += [
        f"{row.stage:14}{_amount(row.input_bytes / TERA):>12}{row.mb_per_s:>11,.1f}{_amount(row.core_hours):>13}"
        f"{_amount(row.wall_hours):>13}{_amount(row.worker_bytes / GIGA):>13}  {row.source}"
        for row in plan.rows
    ]
    lines.append(f"{'total':37}{_amount(plan.core_hours):>13}{_amount(plan.wall_hours):>13}  on {plan.cores:,} cores")
    lines += ["", f"{'disk, TB':37}"] + [
        f"{name:37}{_amount(size / TERA):>13}" for name, size in plan.disk_bytes.items()
    ]
    lines.append(f"{'peak, if all builds run at once':37}{_amount(sum(plan.disk_bytes.values()) / TERA):>13}")
    lines += [
        "", f"{plan.tokens:,.0f} tokens, {plan.documents:,.0f} documents in {plan.builds:,} "
        f"{'build' if plan.builds == 1 else 'builds'}: {plan.parts:,} parts to read, {plan.shards:,} shards",
    ]  # fmt: skip
    return [*lines, "", *plan.assumptions]


def _amount(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

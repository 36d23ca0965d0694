"""Stages `shards` and `finish`: the encoded parts become shards, mixed by key, and the corpus gets its papers.

A group is some consecutive parts; its documents are dealt to its shards by slices of the range of keys.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from llamita.config import save
from llamita.data.collect import READ
from llamita.data.contamination import Index
from llamita.data.curate import MAX_SAMPLES, sample
from llamita.data.encode import ENCODE, KEY, forget
from llamita.data.engine import Facts, Stage, Tick, one
from llamita.data.job import Job
from llamita.data.resolve import FREQUENT, LINES, MATCH, RESOLVE
from llamita.data.shards import COLUMNS, RECORD, SHARD_TOKENS, SPLITS, TOKEN, VERSION, Manifest, Shard, write_shard

if TYPE_CHECKING:
    import pyarrow

GROUP_TOKENS = 16 * SHARD_TOKENS
MAX_NAMES = 2**16
TOP = 2**64


def border(job: Job) -> int:
    """Keys below it are held out: the share of all keys, moved so far that neither split is empty.

    A single document is trained on.
    """
    share = int(job.recipe.heldout_share * TOP)
    ends = [facts["keys"] for facts in ENCODE.facts(job) if facts["keys"]]
    if not ends:
        raise ValueError(f"there is no text to build a corpus from: {why_nothing(job)}")
    least, most = min(low for low, _ in ends), max(high for _, high in ends)
    if least == most:
        return least
    return min(max(share, least + 1), most)


def why_nothing(job: Job) -> str:
    """What became of all documents, for the user who has none left."""
    sums: Counter[str] = Counter()
    for facts in (*READ.facts(job), *ENCODE.facts(job)):
        sums.update(facts["removed"]["docs"])
        sums.update({reason: found["count"] for reason, found in facts.get("skipped", {}).items()})
    return ", ".join(f"{count:,} {reason}" for reason, count in sums.most_common(5)) or "no file was found"


def groups(job: Job) -> list[list[int]]:
    """Consecutive parts of at most GROUP_TOKENS together, or one larger part."""
    found: list[list[int]] = []
    held = 0
    for part, facts in enumerate(ENCODE.facts(job)):
        if not found or held + facts["tokens"] > GROUP_TOKENS:
            found.append([])
            held = 0
        found[-1].append(part)
        held += facts["tokens"]
    return found


def num_groups(job: Job) -> int:
    return len(groups(job))


def names(job: Job) -> dict[str, list[str]]:
    """What the indices of each column stand for. Raises ValueError where they are too many."""
    found = {}
    every = list(ENCODE.facts(job))
    for column in COLUMNS:
        found[column] = sorted({name for facts in every for name in facts["shares"].get(column, {})})
        if len(found[column]) > MAX_NAMES:
            raise ValueError(
                f"more than {MAX_NAMES:,} values of {column}, {found[column][0]!r} is one: give rows fewer"
            )
    return found


def shards(job: Job, number: int, tick: Tick) -> Facts:
    """The shards of one group, numbered from 0 in the group until `finish` knows all groups."""
    forget()
    parts, middle = groups(job)[number], border(job)
    keys = [job.load("encode", part, "keys") for part in parts]
    written: dict[str, list[Shard]] = {split: [] for split in SPLITS}
    folder = job.folder / "shards" / f"group-{number:06d}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    index = {column: {name: i for i, name in enumerate(known)} for column, known in names(job).items()}
    count = 0
    for split, low, high in (("train", middle, TOP), ("heldout", 0, middle)):
        tokens = sum(int(part["tokens"][slice_of(part, low, high)].sum()) for part in keys)
        slices = -(-tokens // SHARD_TOKENS)
        for i in range(slices):
            start, end = (low + (high - low) * edge // slices for edge in (i, i + 1))
            chosen = Chosen(job, parts, [part[slice_of(part, start, end)] for part in keys])
            if len(chosen.table):
                ledger = chosen.ledger()
                written[split].append(write_shard(folder, count, chosen.tokens(), records(ledger, index), ledger))
                count += 1
                tick({"share": (i + 1) / slices})
    return {"shards": {split: [vars(shard) for shard in found] for split, found in written.items()}}


def slice_of(keys: np.ndarray, low: int, high: int) -> slice:
    """Where in sorted keys those of low <= key < high stand."""
    start = np.searchsorted(keys["key"], np.uint64(low))
    return slice(int(start), len(keys) if high == TOP else int(np.searchsorted(keys["key"], np.uint64(high))))


class Chosen:
    """The documents of one shard: rows of KEY from several parts, in the order of their keys."""

    def __init__(self, job: Job, parts: list[int], chosen: list[np.ndarray]):
        self.job, self.parts = job, parts
        self.part = np.repeat(np.arange(len(parts)), [len(rows) for rows in chosen])
        self.table = np.concatenate(chosen) if chosen else np.empty(0, KEY)
        order = np.argsort(self.table["key"], kind="stable")
        self.part, self.table, self.order = self.part[order], self.table[order], order

    def tokens(self) -> Iterator[np.ndarray]:
        held = {
            i: np.memmap(self.job.path("encode", self.parts[i], "tok"), TOKEN, "r") for i in set(self.part.tolist())
        }
        columns = (column.tolist() for column in (self.part, self.table["start"], self.table["tokens"]))
        for i, start, length in zip(*columns, strict=True):
            yield held[i][start : start + length]

    def ledger(self) -> "pyarrow.Table":
        import pyarrow
        import pyarrow.parquet as pq

        found, places = [], []
        for i, part in enumerate(self.parts):
            mine = np.flatnonzero(self.part == i)
            if len(mine):
                whole = pq.read_table(self.job.path("encode", part, "ledger.parquet"))
                found.append(whole.take(self.table["row"][mine]))
                places.append(mine)
        order = np.argsort(np.concatenate(places), kind="stable")
        return pyarrow.concat_tables(found).take(order).combine_chunks()


def records(ledger: "pyarrow.Table", index: dict[str, dict[str, int]]) -> np.ndarray:
    found = np.empty(len(ledger), RECORD)
    found["end"] = np.cumsum(ledger["num_tokens"].to_numpy())
    found["bytes"], found["id"] = ledger["num_bytes"].to_numpy(), ledger["id"].to_numpy()
    for column in COLUMNS:
        found[column] = [index[column][name] for name in ledger[column].to_pylist()]
    return found


def finish(job: Job, number: int, tick: Tick) -> Facts:
    """Numbers the shards through and writes everything else that a corpus folder holds."""
    splits: dict[str, list[Shard]] = {split: [] for split in SPLITS}
    count = 0
    for group, facts in enumerate(SHARDS.facts(job)):
        for split in SPLITS:
            for fields in facts["shards"][split]:
                shard = Shard(**fields)
                moved = Shard(**{**fields, "number": count})
                for suffix in ("tok", "doc", "parquet"):
                    source = shard.path(job.folder / "shards" / f"group-{group:06d}", suffix)
                    if source.exists():  # else moved by a run that was killed after it
                        source.rename(moved.path(job.corpus, suffix))
                splits[split].append(moved)
                count += 1
    gather_removed(job)
    tokenizer, columns, recipe = job.tokenizer, names(job), job.recipe
    manifest = Manifest(
        VERSION, tokenizer.fingerprint, tokenizer.vocab_size, TOKEN.str, recipe.seed, recipe.heldout_share, recipe.name,
        recipe.fingerprint, columns["source"], columns["lang"], columns["kind"], splits,
    )  # fmt: skip
    save(recipe, job.corpus / "recipe.toml")
    (job.corpus / "build.json").write_text(json.dumps(papers(job), indent=1, ensure_ascii=False))
    (job.corpus / "build-times.json").write_text(json.dumps(times(job), indent=1))
    (job.corpus / "manifest.json").write_text(manifest.to_json())
    return {"shards": count}


def gather_removed(job: Job) -> None:
    """Every removed document with its reason: a file for each part and each of the two stages that remove."""
    folder = job.corpus / "removed"
    folder.mkdir(exist_ok=True)
    for part in range(job.num_parts):
        for stage in ("read", "encode"):
            source = job.path(stage, part, "removed.parquet")
            if source.exists():
                source.rename(folder / f"part-{part:06d}-{stage}.parquet")


def papers(job: Job) -> dict[str, Any]:
    """What the build did: counts, removals by rule with samples, shares, evaluation items, near duplicates."""
    read, encoded, resolved = list(READ.facts(job)), list(ENCODE.facts(job)), next(RESOLVE.facts(job))
    removed: dict[str, Any] = {}
    for facts in (*read, *encoded):
        for reason, docs in facts["removed"]["docs"].items():
            entry = removed.setdefault(reason, {"docs": 0, "bytes": 0, "samples": []})
            entry["docs"] += docs
            entry["bytes"] += facts["removed"]["bytes"][reason]
            entry["samples"] = sample(entry["samples"] + facts["removed"]["samples"][reason])
    skipped: dict[str, Any] = {}
    for facts in read:
        for reason, said in facts["skipped"].items():
            entry = skipped.setdefault(reason, {"count": 0, "examples": []})
            entry["count"] += said["count"]
            entry["examples"] = (entry["examples"] + said["examples"])[:MAX_SAMPLES]
    return {
        "read": {name: sum(facts[name] for facts in read) for name in ("docs_in", "bytes_in", "docs", "bytes")},
        "removed": removed,
        "skipped": skipped,
        "kept": {"docs": sum(facts["docs"] for facts in encoded), "tokens": sum(facts["tokens"] for facts in encoded)},
        "cut_bytes": sum(facts["cut_bytes"] for facts in encoded),
        "shares": total_shares(encoded),
        "duplicates": resolved["duplicates"],
        "pairs": resolved["pairs"],
        "contamination": evaluation_items(job, [hit for facts in read for hit in facts["hits"]]),
    }


def evaluation_items(job: Job, hits: list[dict[str, Any]]) -> dict[str, Any]:
    """Set by set and item by item, what of the evaluations was found; empty where the recipe names none."""
    return Index.load(job.index).report(hits) if job.recipe.contamination.evals else {}


def total_shares(encoded: list[Facts]) -> dict[str, dict[str, dict[str, int]]]:
    """Documents, bytes and tokens by each value of source, language, kind and licence."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for facts in encoded:
        for column, values in facts["shares"].items():
            for value, sums in values.items():
                entry = found.setdefault(column, {}).setdefault(value, {"docs": 0, "bytes": 0, "tokens": 0})
                for what, number in sums.items():
                    entry[what] += number
    return {column: dict(sorted(values.items())) for column, values in sorted(found.items())}


def times(job: Job) -> dict[str, Any]:
    """CPU seconds of each stage, and the bytes that entered it. Differs from run to run."""
    read = list(READ.facts(job))
    entering = sum(facts["bytes_in"] for facts in read)
    kept = sum(facts["bytes"] for facts in read)
    found = {}
    for stage in (READ, MATCH, RESOLVE, LINES, FREQUENT, ENCODE, SHARDS):
        seconds = sum(facts["cpu_seconds"] for facts in stage.facts(job))
        found[stage.name] = {"cpu_seconds": round(seconds, 3), "bytes": entering if stage is READ else kept}
    return found


SHARDS = Stage("shards", num_groups, shards)
FINISH = Stage("finish", one, finish)

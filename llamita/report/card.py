"""A corpus's data card: `card.md` for hubs and `card.html` for people, of the same facts. Nothing is fetched."""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from llamita.report.units import FORBIDDEN, count, short

SHOWN_VALUES, SHOWN_SAMPLES, SHOWN_ITEMS, SAMPLE_CHARS, LABEL_CHARS = 30, 3, 20, 300, 120
COLUMNS = {"source": "Sources", "kind": "Kinds", "lang": "Languages", "license": "Licences"}
SPLIT_NAMES = {"train": "training", "heldout": "held out"}
LANGUAGE_CODE = re.compile(r"[a-z]{2,3}")
# A hub sorts data sets by these classes of rows.
SIZES = ["n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B", "10B<n<100B",
         "100B<n<1T", "n>1T"]  # fmt: skip


@dataclass(frozen=True)
class Bar:
    """A line of a table with its bar: `width` in percent of the longest."""

    name: str
    cells: list[str]
    width: float


def bars(rows: list[tuple[str, float, list[str]]]) -> list[Bar]:
    """Of (name, what is drawn, what is written)."""
    longest = max((value for _, value, _ in rows), default=0) or 1
    return [Bar(short(name, LABEL_CHARS), cells, 100 * value / longest) for name, value, cells in rows]


def composition(shares: Mapping[str, Mapping[str, int]]) -> list[Bar]:
    """Documents, bytes, tokens, bytes per token and share of the tokens by value; the smallest as one line."""
    total = sum(share["tokens"] for share in shares.values()) or 1
    rows = sorted(shares.items(), key=lambda item: (-item[1]["tokens"], item[0]))
    rest = rows[SHOWN_VALUES:]
    if rest:
        sums = {what: sum(share[what] for _, share in rest) for what in ("docs", "bytes", "tokens")}
        rows = [*rows[:SHOWN_VALUES], (f"{len(rest):,} others", sums)]
    return bars([
        (name or "not known", share["tokens"],
         [f"{share['docs']:,}", count(share["bytes"]), count(share["tokens"]),
          f"{share['bytes'] / max(1, share['tokens']):.2f}", f"{share['tokens'] / total:.1%}"])
        for name, share in rows
    ])  # fmt: skip


def removals(removed: Mapping[str, Mapping[str, Any]], docs_in: int) -> list[Bar]:
    rows = sorted(removed.items(), key=lambda item: (-item[1]["docs"], item[0]))
    return bars([
        (reason, gone["docs"], [f"{gone['docs']:,}", f"{gone['docs'] / max(1, docs_in):.1%}", count(gone["bytes"])])
        for reason, gone in rows
    ])  # fmt: skip


def powers(histogram: Mapping[int, int]) -> list[Bar]:
    """A histogram by powers of two, without a gap."""
    spans = range(min(histogram, default=0), max(histogram, default=-1) + 1)
    total = sum(histogram.values())
    return bars([
        (f"{2**b:,}" if b == 0 else f"{2**b:,} to {2 ** (b + 1) - 1:,}", histogram.get(b, 0),
         [f"{histogram.get(b, 0):,}", f"{histogram.get(b, 0) / total:.1%}"])
        for b in spans
    ])  # fmt: skip


def samples(removed: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[tuple[str, str]]]]:
    """A few removed documents of each reason: (name, beginning)."""
    return [
        (
            reason,
            [
                (short(one["name"], LABEL_CHARS), short(one["text"], SAMPLE_CHARS))
                for one in gone["samples"][:SHOWN_SAMPLES]
            ],
        )
        for reason, gone in sorted(removed.items())
    ]


def contamination(report: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """For each evaluation set: items, found, too short or too common to be looked for."""
    return [
        (
            name,
            [
                f"{facts['items']:,}",
                f"{facts['found']:,}",
                f"{len(facts['too short']):,}",
                f"{len(facts['too common']):,}",
            ],
        )
        for name, facts in sorted(report.get("sets", {}).items())
    ]


def found_items(report: Mapping[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """Evaluation items that were found: set, id, documents, how much of the item, an excerpt."""
    return [
        (
            item["set"],
            str(item["id"]),
            f"{item['documents']:,}",
            f"{item['coverage']:.0%}",
            short(item["excerpt"], SAMPLE_CHARS),
        )
        for item in report.get("items", [])[:SHOWN_ITEMS]
    ]


def view(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Everything the templates show, as plain values; `facts` as `ledger.papers` gives them."""
    build, manifest = facts["build"], facts["manifest"]
    read, kept, splits = build["read"], build["kept"], manifest["splits"]
    shares = {column: build["shares"].get(column, {}) for column in COLUMNS}
    kept_bytes = sum(split["bytes"] for split in splits.values())
    tokens = max(1, kept["tokens"])
    figures = [
        ("documents", count(kept["docs"]), f"of {read['docs_in']:,} read"),
        ("tokens", count(kept["tokens"]), f"{kept_bytes / tokens:.2f} bytes each"),
        ("text", f"{count(kept_bytes)}B", f"of {count(read['bytes_in'])}B read"),
        ("kept", f"{kept_bytes / max(1, read['bytes_in']):.1%}", "of the bytes"),
        ("held out", f"{splits['heldout']['tokens'] / tokens:.1%}", f"{splits['heldout']['docs']:,} documents"),
    ]
    return {
        "name": facts["name"],
        "manifest": manifest,
        "fingerprint": facts["fingerprint"],
        "figures": figures,
        "splits": [(SPLIT_NAMES[name], [f"{split[what]:,}" for what in ("docs", "tokens", "bytes")])
                   for name, split in splits.items()],
        "shares": [(title, composition(shares[column])) for column, title in COLUMNS.items()],
        "removed": removals(build["removed"], read["docs_in"]),
        "samples": samples(build["removed"]),
        "skipped": [(reason, f"{found['count']:,}", short(found["examples"][0], LABEL_CHARS))
                    for reason, found in sorted(build["skipped"].items())],
        "cut_bytes": build["cut_bytes"],
        "duplicates": [(way, f"{number:,}") for way, number in build["duplicates"].items()],
        "pairs": [(short(pair["first"], LABEL_CHARS), short(pair["other"], LABEL_CHARS), f"{pair['similarity']:.2f}")
                  for pair in build["pairs"][:SHOWN_ITEMS]],
        "clusters": powers(facts["clusters"]),
        "lengths": powers(facts["lengths"]),
        "contamination": contamination(build["contamination"]),
        "items": found_items(build["contamination"]),
        "recipe": facts["recipe"],
        "languages": [code for code in shares["lang"] if LANGUAGE_CODE.fullmatch(code)],
        "size": SIZES[min(len(SIZES) - 1, max(0, int(math.log10(max(1, kept["docs"]))) - 2))],
    }  # fmt: skip


def cell(value: str) -> str:
    """A text from anywhere inside a table of Markdown: one line, nothing in it is markup."""
    return re.sub(r"([\\`*_{}\[\]()#+!|<>~&@:$-])", r"\\\1", " ".join(value.split())) or " "


def render(facts: Mapping[str, Any]) -> tuple[str, str]:
    """The card as Markdown and as HTML text, whose policy allows no request and no script."""
    loader = jinja2.PackageLoader("llamita", "report")
    house = jinja2.Environment(
        loader=loader, autoescape=jinja2.select_autoescape(["html"]), undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    house.filters["cell"] = cell
    shown = view(facts)
    style = Markup(loader.get_source(house, "page.css")[0])
    markdown = house.get_template("card.md.jinja").render(**shown)
    html = house.get_template("card.html").render(style=style, **shown)
    return markdown.translate(FORBIDDEN), html.translate(FORBIDDEN)


def write(facts: Mapping[str, Any], folder: Path) -> list[Path]:
    """Writes `card.md` and `card.html` into a corpus folder and returns their paths."""
    written = []
    for name, content in zip(("card.md", "card.html"), render(facts), strict=True):
        path = folder / name
        part = path.with_name(f"{name}.part")
        part.write_text(content, encoding="utf-8")
        os.replace(part, path)
        written.append(path)
    return written

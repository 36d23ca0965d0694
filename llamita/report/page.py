"""One self-contained HTML page of a run: nothing is fetched, so it can be mailed and kept."""

import base64
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from llamita.report.read import PARTS, Run, Stage, read
from llamita.report.svg import Series, chart, with_median
from llamita.report.units import FORBIDDEN, cell, count, duration, facts, number, scientific, short

MAX_PROMPTS, MAX_SAMPLES, MAX_EVENTS, MAX_TEXT = 6, 6, 200, 100_000

# What a shape's fields are called in plain words, in the order of the page; others keep their names.
WORDS = {
    "num_params": "parameters",
    "num_matmul_params": "weights that each token meets",
    "num_layers": "layers",
    "dim": "width",
    "num_heads": "query heads",
    "num_kv_heads": "key-value heads",
    "head_dim": "width of a head",
    "ffn_dim": "feed-forward width",
    "vocab_size": "vocabulary",
    "tied": "output head shares the embedding",
    "max_seq_len": "longest context, tokens",
    "rope_theta": "RoPE base",
    "rope_scaling": "RoPE scaling",
    "norm_eps": "RMSNorm epsilon",
    "train_flops_per_token": "training FLOPs per token",
    "kv_bytes_per_token": "KV cache per token, bytes",
}
COMPRESSORS = {"xz": "xz -9e", "bzip2": "bzip2 -9", "gzip": "gzip -9"}


def _last(stage: Stage, kind: str, column: str) -> float:
    """The last finite value that a stage logged in a column, or NaN."""
    values = stage.table(kind)[column]
    values = values[np.isfinite(values)]
    return float(values[-1]) if len(values) else np.nan


def _shape(run: Run) -> dict[str, Any]:
    return next((stage.settings["shape"] for stage in run.stages.values() if stage.settings.get("shape")), {})


def _first(*values: Any) -> float:
    """The first of the values that is a finite number, or NaN."""
    return next((number(value) for value in values if np.isfinite(number(value))), np.nan)


def _seconds(run: Run) -> list[tuple[str, float, str]]:
    """(stage, seconds, note): as results.json tells, else the time that each stage logged last."""
    stages = [
        (item.get("name"), number(item.get("seconds")), item.get("note")) for item in run.results.get("stages", [])
    ]
    stages = stages or [(stage.name, _last(stage, "train", "elapsed"), "") for stage in run.stages.values()]
    return [(str(name), seconds, str(note or "")) for name, seconds, note in stages if seconds >= 0]


def headline(run: Run) -> dict[str, Any]:
    """The key figures as (label, value, note), the compression bars, and a sentence on the shape."""
    stage = next(iter(run.stages.values()))
    shape, results = _shape(run), run.results
    params = _first(results.get("parameters"), shape.get("num_params"))
    tokens = _first(results.get("tokens"), _last(stage, "train", "tokens"))
    bits = _first(results.get("bits_per_byte"), _last(stage, "eval", "bits_per_byte"))
    speed = _first(results.get("tokens_per_second"), tokens / (_last(stage, "train", "elapsed") or np.nan))
    memory = _first(results.get("peak_memory_gib"), _last(stage, "train", "memory_gib"))
    heldout = number(results.get("heldout_bytes"))
    wall = sum(seconds for _, seconds, _ in _seconds(run)) or np.nan
    figures = [
        ("parameters", params, count, f"{params:,.0f}"),
        ("tokens trained on", tokens, count, f"{tokens / params:.3g} a parameter" if params > 0 else ""),
        (
            "bits per byte",
            bits,
            "{:.3f}".format,
            f"{heldout / 1e6:.1f} MB held out" if heldout > 0 else "held-out text",
        ),
        ("tokens per second", speed, "{:,.0f}".format, "while training"),
        ("wall time", wall, duration, "all stages"),
        ("peak memory", memory, "{:.2f} GiB".format, ""),
    ]
    rivals = [("this model", bits), *((name, number(results.get(key))) for key, name in COMPRESSORS.items())]
    rivals = [rival for rival in rivals if np.isfinite(rival[1])]
    longest = max((value for _, value in rivals), default=1.0)
    bars = [(name, f"{value:.3f}", 100 * value / longest) for name, value in rivals]
    return {
        "params": count(params) if np.isfinite(params) else "",
        "figures": [(label, show(value), note) for label, value, show, note in figures if np.isfinite(value)],
        "bars": bars if len(bars) > 1 else [],
        "sentence": _sentence(shape),
    }


def _sentence(shape: dict[str, Any]) -> str:
    """The shape in words, when the run logged enough of it."""
    needed = ("num_layers", "dim", "num_heads", "num_kv_heads", "ffn_dim", "vocab_size")
    if not all(np.isfinite(number(shape.get(name))) for name in needed):
        return ""
    layers, dim, heads, kv_heads, ffn_dim, vocab = (f"{shape[name]:,}" for name in needed)
    return (
        f"{layers} layers of width {dim}, {heads} query heads on {kv_heads} key-value heads, "
        f"feed-forward width {ffn_dim}, and a vocabulary of {vocab} tokens."
    )


def curves(stage: Stage, results: dict[str, Any]) -> dict[str, Any]:
    """The charts of one stage, the loss first, and remarks on what they lack."""
    train, evals = stage.table("train"), stage.table("eval")
    tokens = np.concatenate([train["tokens"], evals["tokens"]])
    first, last = float(tokens.min()), float(tokens.max())
    span = (0.0 if first <= 0.2 * last else first, max(last, first + 1))

    def logged(column: str, kind: str = "raw", factor: float = 1.0) -> Series:
        return Series("logged", kind, train["tokens"], train[column] * factor, train["step"])

    def evaluated(column: str) -> Series:
        return Series("held out", "dots", evals["tokens"], evals[column], evals["step"])

    rules = {COMPRESSORS[key]: number(results.get(key)) for key in ("gzip", "xz")}
    speed, mfu = with_median(logged("tokens_per_second")), with_median(logged("mfu", factor=100))
    charts = [
        chart("Loss", "nats per token", [*with_median(logged("loss")), evaluated("loss")], span),
        chart("Bits per byte", "held-out text", [evaluated("bits_per_byte")], span, rules=rules),
        chart("Learning rate", "", [logged("lr", "line")], span, zero=True),
        chart("Gradient norm", "before clipping", with_median(logged("grad_norm")), span, zero=True),
        chart("Speed", "tokens per second", speed, span, zero=True),
        chart("MFU", "% of the machine's peak", mfu, span, zero=True),
        chart("Memory", "GiB", [logged("memory_gib", "line")], span, zero=True),
    ]
    notes = []
    lost = train["step"][~np.isfinite(train["loss"])]
    if len(lost):
        lines = f"{len(lost):,} of {len(train['step']):,} logged lines"
        notes.append(f"The loss of {lines} is not a finite number, first at step {lost[0]:,.0f}; gaps stand there.")
    if np.isfinite(train["forward"]).any():
        parts = sorted(((float(np.nanmean(train[part])), part) for part in PARTS), reverse=True)
        notes.append(f"Of the time, by mean: {', '.join(f'{part} {share:.1%}' for share, part in parts)}.")
    names = ("loss", "bits per byte", "learning rate", "gradient norm", "speed", "MFU", "memory")
    if absent := [name for name, one in zip(names, charts, strict=True) if one is None]:
        notes.append(f"Not logged in this stage: {', '.join(absent)}.")
    return {"name": stage.name, "charts": [one for one in charts if one], "notes": notes}


def samples(run: Run) -> list[dict[str, Any]]:
    """For each prompt of each stage its texts over time, thinned; a prompt that a text repeats is cut off."""
    groups = []
    for stage in run.stages.values():
        for prompt, rows in list(stage.samples.items())[:MAX_PROMPTS]:
            chosen = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), MAX_SAMPLES)).astype(int))
            texts = [(f"{rows[i][0]:,}", short(rows[i][1].removeprefix(prompt).strip("\n"))) for i in chosen]
            groups.append({"stage": stage.name, "prompt": short(prompt), "texts": texts, "num": len(rows)})
    return groups


def proof(run: Run) -> dict[str, Any]:
    """The proof as a table of measures by reader, what else it tells, and the digests of the files."""
    told = run.proof.get("readers")
    readers = told if isinstance(told, dict) else {}
    found = {name: reading for name, reading in readers.items() if isinstance(reading, dict)}
    measures = dict.fromkeys(key for reading in found.values() for key in reading)
    return {
        "readers": list(found),
        "measures": [(key.replace("_", " "), [cell(one.get(key)) for one in found.values()]) for key in measures],
        "absent": [f"{name}: {cell(reading)}" for name, reading in readers.items() if name not in found],
        "facts": facts({key: value for key, value in run.proof.items() if key not in ("readers", "sha256")}),
        "files": facts({"sha256 of": run.proof.get("sha256", {})}),
    }


def settings(run: Run) -> list[dict[str, Any]]:
    """For each stage its settings as (name, value, source, whether it differs from the default)."""
    tables = []
    for stage in run.stages.values():
        rows = []
        for name, value, source in stage.settings.get("values", []):
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            rows.append((name, text, source, source != "default"))
        if rows:
            tables.append({"stage": stage.name, "rows": rows})
    return tables


def cost(run: Run) -> dict[str, Any]:
    """Time by stage as (name, time, share in percent, note), their sum, and FLOPs where they are given."""
    stages = _seconds(run)
    total = sum(seconds for _, seconds, _ in stages)
    rows = [(name, duration(seconds), 100 * seconds / (total or 1.0), note) for name, seconds, note in stages]
    flops = number(run.results.get("train_flops"))
    return {"rows": rows, "total": duration(total), "flops": scientific(flops) if flops > 0 else ""}


def view(run: Run) -> dict[str, Any]:
    """Everything the template shows, as plain values."""
    stages, told = list(run.stages.values()), _shape(run)
    shape = {WORDS.get(name, name): told[name] for name in sorted(told, key=[*WORDS, *told].index)}
    machines = [stage.settings["machine"] for stage in stages if stage.settings.get("machine")]
    logged = [stage for stage in stages if any(stage.rows.values())]
    examples = [(item.get("prompt", ""), item.get("reply", "")) for item in run.results.get("chat_examples", [])]
    return {
        "run": run,
        "headline": headline(run),
        "stages": [curves(stage, run.results if stage is stages[0] else {}) for stage in logged],
        "samples": samples(run),
        "settings": settings(run),
        "toml": short(run.toml, MAX_TEXT),
        "shape": facts(shape),
        "machine": facts(machines[0]) if machines else [],
        "proof": proof(run) if run.proof else None,
        "chat": [(short(prompt), short(reply)) for prompt, reply in examples],
        "cost": cost(run),
        "events": [(stage, step, short(message)) for stage, step, message in run.events[-MAX_EVENTS:]],
        "num_lines": sum(len(stage.rows["train"]) for stage in stages),
    }


def render(run: Run) -> str:
    """The page as HTML text. Its policy allows the one script by its hash, and no request at all."""
    loader = jinja2.PackageLoader("llamita", "report")
    house = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    script, style = (Markup(loader.get_source(house, name)[0]) for name in ("page.js", "page.css"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    html = house.get_template("template.html").render(script=script, style=style, digest=digest, **view(run))
    return html.translate(FORBIDDEN)


def write(run_folder: Path) -> Path:
    """Write `report.html` into a run folder and return its path. Raises ValueError for a bad run folder."""
    html = render(read(run_folder))
    page = run_folder / "report.html"
    part = page.with_suffix(".html.part")
    part.write_text(html, encoding="utf-8")
    os.replace(part, page)
    return page

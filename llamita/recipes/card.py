"""A model card: what the run, or the model that was imported, knows of itself, and nothing else."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llamita import config, log
from llamita.data.shards import Manifest
from llamita.formats import gguf
from llamita.model.shape import Shape
from llamita.recipes import stages
from llamita.train import state
from llamita.train.run import Run

_LICENSE = re.compile(r"[\w.\-]{1,80}")
MAX_CARD_BYTES = 1 << 20


@dataclass(frozen=True)
class Facts:
    """What is known of a model beside its weights; lines are Markdown list items without their dash."""

    name: str
    license: str = ""
    training: list[str] = field(default_factory=list)
    scores: list[str] = field(default_factory=list)


def known(path: Path, license: str = "") -> Facts:
    """Facts of a run folder, or of a model with a licence in its card or its metadata.

    Raises ValueError for a `license` that is no identifier.
    """
    if license and not _LICENSE.fullmatch(license):
        raise ValueError(f"{license!r:.80} is no licence's identifier: write it as apache-2.0")
    if (path / "run.toml").is_file():
        return Facts(path.resolve().name, license, [*_of_base(path), *_training(path)], _scores(path))
    name = path.resolve().name if path.is_dir() else path.resolve().stem
    return Facts(name, license or _stated_license(path), [f"converted from `{path.name}`"])


def _stated_license(path: Path) -> str:
    """What the source says, if it is an identifier: in the front matter of its card, or in a GGUF file's metadata."""
    stated = ""
    if path.suffix == ".gguf":
        stated = str(gguf.read_fields(path).get("general.license", ""))
    elif (path / "README.md").is_file() and (path / "README.md").stat().st_size < MAX_CARD_BYTES:
        first, _, rest = (path / "README.md").read_text("utf-8", errors="replace").partition("---\n")
        lines = rest.partition("\n---")[0].splitlines() if not first else []
        stated = next((line.partition(":")[2].strip() for line in lines if line.startswith("license:")), "")
    return stated if _LICENSE.fullmatch(stated) else ""


def _of_base(folder: Path) -> list[str]:
    """What the model that this run started from knows, where it still lies there."""
    if not (folder / stages.BASE).is_file():
        return []
    base = Path((folder / stages.BASE).read_text())
    found = known(base) if (base / "run.toml").is_file() else Facts(base.name)
    scores = [f"{score} (before fine-tuning)" for score in found.scores]
    return [f"fine-tuned from `{base.name}`", *found.training, *scores]


def _training(folder: Path) -> list[str]:
    found = stages.newest(folder)
    run = config.load(Run, found / "run.toml")
    counters = state.counters(found)
    lines = [
        f"recipe `{run.name}`: {counters.step:,} steps of {run.batch_size} rows of {run.data.seq_len} tokens, "
        f"{counters.tokens:,} tokens learnt from, {run.precision}, {run.optim.kind}",
        f"{counters.tokens * run.shape.train_flops_per_token(run.data.seq_len):.3g} FLOPs "
        f"in {log.duration(counters.elapsed)} of training",
    ]
    if run.data.corpus and (Path(run.data.corpus) / "manifest.json").is_file():
        manifest = Manifest.read(Path(run.data.corpus))
        languages = ", ".join(lang for lang in manifest.langs if lang) or "not stated"
        sources = [source for source in manifest.sources if source]
        lines.append(f"data: sources {', '.join(sources[:20]) or 'not named'}; languages {languages}; "
                     f"{manifest.heldout_share:.0%} of the documents held out")  # fmt: skip
    return lines


def _scores(folder: Path) -> list[str]:
    """The last evaluation that the run wrote down."""
    rows = [row for row in log.read(folder / "metrics.jsonl") if row.get("kind") == "eval"]
    if not rows:
        return []
    shown = {name: value for name, value in rows[-1].items() if isinstance(value, float)}
    return [f"held-out {name.replace('_', ' ')}: {value:.4f}" for name, value in shown.items()]


def proof_lines(proof: dict[str, Any]) -> list[str]:
    """What each reader found, a line each."""
    lines = []
    for reader, said in proof["readers"].items():
        numbers = said if isinstance(said, str) else ", ".join(f"{key} {_short(value)}" for key, value in said.items())
        lines.append(f"{reader}: {numbers}")
    return [*lines, f"logits: {proof['logits']}"] if "logits" in proof else lines


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else ", ".join(value) if isinstance(value, list) else str(value)


def text(shape: Shape, proof: dict[str, Any], facts: Facts, notes: list[str]) -> str:
    """The card as Markdown with the front matter that hubs read."""
    front = ["---", *([f"license: {facts.license}"] if facts.license else []), "library_name: transformers",
             "pipeline_tag: text-generation", "tags: [llama, llamita]", "---"]  # fmt: skip
    rope = f"theta {shape.rope_theta:g}" + (f", {shape.rope_scaling}" if shape.rope_scaling else "")
    sections = {
        f"# {facts.name}": [
            f"a plain Llama 3 of {shape.num_params:,} parameters ({proof['format']}, {', '.join(proof['kinds'])})",
            f"{shape.num_layers} layers, width {shape.dim}, {shape.num_heads} heads over {shape.num_kv_heads} KV "
            f"heads, feed-forward {shape.ffn_dim}, {shape.vocab_size:,} tokens, "
            f"{'tied' if shape.tied else 'untied'} head",
            f"context {shape.max_seq_len:,} tokens, rotary {rope}",
            f"licence: {facts.license or 'not stated'}",
        ],
        "## Training": facts.training,
        "## Scores": facts.scores,
        "## Proof": [*proof_lines(proof), *notes],
    }
    body = [line for head, items in sections.items() if items for line in ("", head, "", *(f"- {i}" for i in items))]
    return "\n".join([*front, *body]) + "\n"

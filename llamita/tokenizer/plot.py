"""A comparison of vocabularies as a picture."""

import importlib
from pathlib import Path

import numpy as np

from llamita.tokenizer.compare import Comparison, Group

PLOT_ROWS = 100
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555", "#8c510a")


def check(path: str | Path) -> None:
    """ValueError if no plot can be written to `path`: another suffix, no such folder, or no matplotlib."""
    path = Path(path)
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f"{path}: no kind of plot; give a name that ends in .png, .svg or .pdf")
    if not path.parent.is_dir() or path.is_dir():
        raise ValueError(f"{path}: no place for a file; give one in a folder that is there")
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError:
        raise ValueError("matplotlib is not installed; run: pip install 'llamita[plot]'") from None


def plot(comparison: Comparison, path: str | Path) -> None:
    """Draw bytes per token by language, the best of the first vocabulary on top, into a .png, .svg or .pdf file.

    At most the PLOT_ROWS languages with the most text. ValueError as by `check`.
    """
    check(path)
    from matplotlib.figure import Figure

    shown = list(comparison.languages.items())[:PLOT_ROWS] if len(comparison.languages) > 1 else []
    rows = sorted(((_dots(group), lang or "?") for lang, group in shown), reverse=True)
    values = np.array([_dots(comparison.overall), *(dots for dots, _ in rows)])
    y = np.array([0.0, *(1.6 + i for i in range(len(rows)))])
    figure = Figure(figsize=(8, 1.8 + 0.2 * y[-1]), layout="constrained")
    axes = figure.subplots()
    axes.hlines(y, values.min(axis=1), values.max(axis=1), color="#d0d0d0", linewidth=2, zorder=1)
    for i, name in enumerate(comparison.vocabularies):
        label = f" {name}  {values[0, i]:.2f}".replace("$", r"\$")  # with the space, as "_..." would be left out
        colour, marker = _COLOURS[i % len(_COLOURS)], "oDs^"[i // len(_COLOURS) % 4]
        size = 30 if i else 75  # so that the rim of the first is seen behind an equal one
        axes.scatter(values[:, i], y, size, color=colour, marker=marker, linewidth=0, zorder=2, label=label)
    # 1 is the floor: every byte a token
    axes.set(xlim=(min(0.9, values.min() - 0.1), values.max() + 0.1), ylim=(y[-1] + 0.8, -0.8), axisbelow=True)
    axes.set_yticks(y, ["overall", *(lang for _, lang in rows)], parse_math=False)
    axes.get_yticklabels()[0].set_fontweight("bold")
    axes.grid(color="#ececec", linewidth=0.8)
    axes.tick_params(length=0, labelsize=9, labeltop=True)
    axes.spines[:].set_visible(False)
    title = "Bytes per token" + f", {PLOT_ROWS} largest languages" * (len(comparison.languages) > PLOT_ROWS)
    legend = figure.legend(loc="outside upper left", ncols=3, frameon=False, title=title, alignment="left")
    legend.get_title().set(weight="bold", size=12)
    figure.savefig(path, dpi=150)


def _dots(group: Group) -> list[float]:
    return [cost.bytes_per_token or 0.0 for cost in group.vocabularies.values()]

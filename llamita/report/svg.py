"""Line charts as numbers: paths, ticks and read-outs in a box of 1000 x 1000 that the page stretches.

The page draws lines in an SVG without aspect ratio and sets text in HTML: letters keep their size on a phone.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llamita.report.units import PREFIXES, count, exact, power

BOX = 1000
NUM_BUCKETS = 300  # about as many columns of pixels as a chart on a phone has; keeps any run's page small
MIN_SMOOTHED = 20  # fewer lines than this are shown as they are


@dataclass(frozen=True)
class Series:
    """One curve: x = tokens, y = values (both [num_points], NaN makes a gap); kind names its CSS class."""

    name: str
    kind: str
    x: np.ndarray
    y: np.ndarray
    step: np.ndarray


@dataclass(frozen=True)
class Chart:
    """All that the template needs. Ticks and rules are (place in percent, label)."""

    title: str
    unit: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    paths: list[tuple[str, str]]
    legend: list[tuple[str, str, str]]
    where: str
    hover: list[dict[str, Any]]
    rules: list[tuple[float, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def thin(values: np.ndarray) -> np.ndarray:
    """Indices of at most 2 NUM_BUCKETS + 1 points that keep every peak: least and greatest of each bucket."""
    if len(values) <= 2 * NUM_BUCKETS:
        return np.arange(len(values))
    keep = {len(values) - 1}
    for bucket in np.array_split(np.arange(len(values)), NUM_BUCKETS):
        finite = bucket[np.isfinite(values[bucket])]
        keep |= {finite[values[finite].argmin()], finite[values[finite].argmax()]} if len(finite) else {bucket[0]}
    return np.array(sorted(keep))


def running_median(series: Series) -> Series:
    """The running median of 1/40 of the lines, one-sided at the end only: neither spikes nor NaN pull it."""
    num = len(series.y)
    half = max(2, num // 80)
    centres = np.unique(np.linspace(0, num - 1, min(num, NUM_BUCKETS)).astype(int))
    middle = np.full(len(centres), math.nan)
    for i, centre in enumerate(centres):
        reach = min(half, centre)
        window = series.y[centre - reach : centre + reach + 1]
        window = window[np.isfinite(window)]
        if len(window):
            middle[i] = np.median(window)
    name = f"median of {2 * half + 1}"
    return Series(name, "line", series.x[centres], middle, series.step[centres])


def with_median(series: Series) -> list[Series]:
    """The series, faint, and its running median; the series alone when it is short."""
    if len(series.y) < MIN_SMOOTHED:
        return [Series(series.name, "line", series.x, series.y, series.step)]
    return [series, running_median(series)]


def ticks(low: float, high: float, num: int = 5) -> list[float]:
    """At most num + 1 round numbers from low to high: multiples of 1, 2, 2.5 or 5 times a power of ten."""
    rough = (high - low) / num
    decade = 10.0 ** math.floor(math.log10(rough))
    step = next(m * decade for m in (1, 2, 2.5, 5, 10) if m * decade >= rough * 0.999)
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between low and high that lie about evenly on a logarithmic axis."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    marks = (1, 1.5, 2, 3, 4, 6, 8) if high < 12 * low else (1, 2, 5) if high < 100 * low else (1,)
    places = [m * 10.0**k for k in decades for m in marks if low <= m * 10.0**k <= high]
    return places[:: 1 + len(places) // 9]


def _labels(values: list[float], log: bool = False) -> tuple[list[str], str]:
    """Labels with one prefix, on a linear axis with equal decimals; and the power of ten that they count."""
    top = max(abs(value) for value in values)
    factor, prefix = next((pair for pair in PREFIXES if top >= pair[0]), (1.0, ""))
    scale = ""
    if 0 < top < 0.01:
        exponent = math.floor(math.log10(top))
        factor, scale = 10.0**exponent, power(exponent)
    short = [f"{value / factor:.6g}" for value in values]
    decimals = max(len(text.partition(".")[2]) for text in short)
    shown = short if log else [f"{value / factor:.{decimals}f}" for value in values]
    return [text + prefix if value else "0" for value, text in zip(values, shown, strict=True)], scale


def _range(series: list[Series], zero: bool) -> tuple[float, float]:
    """The y range, without margins: all points, but a few spikes far above the rest may not flatten it."""
    values = [one.y[np.isfinite(one.y)] for one in series]
    low, tops = min(float(finite.min()) for finite in values), []
    for one, finite in zip(series, values, strict=True):
        top, most = float(finite.max()), float(np.quantile(finite, 0.995))
        tops.append(most if one.kind == "raw" and top - low > 1.5 * (most - low) else top)
    return (min(0.0, low) if zero else low), max(tops)


def _scale(series: list[Series], zero: bool) -> tuple[float, float, bool, Callable[[Any], Any]]:
    """The y range with margins, whether it is logarithmic (if it spans a factor of 3), values -> 0 .. 1."""
    low, high = _range(series, zero)
    if not zero and 0 < 3 * low < high:
        low, high = low / 1.05, high * 1.05
        return low, high, True, lambda v: np.log(np.clip(v, low, high) / low) / math.log(high / low)
    margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    low, high = low - (0 if zero else margin), high + margin
    return low, high, False, lambda v: (np.clip(v, low, high) - low) / (high - low)


def _path(x: np.ndarray, y: np.ndarray, dots: bool) -> str:
    """An SVG path through the points in box units; NaN lifts the pen, and a lone point becomes a dot."""
    parts, pen_down = [], False
    for i, (across, down) in enumerate(zip(x, y, strict=True)):
        if not math.isfinite(down):
            pen_down = False
            continue
        lone = dots or (not pen_down and (i + 1 == len(y) or not math.isfinite(y[i + 1])))
        parts.append(f"{'L' if pen_down and not dots else 'M'}{across:.1f},{down:.1f}{'h0' if lone else ''}")
        pen_down = True
    return "".join(parts)


def _drawn(one: Series, across: np.ndarray, down: np.ndarray) -> tuple[list[tuple[str, str]], dict[str, Any], str]:
    """A thinned series in box units as paths, hover points and its last value."""
    shown = np.flatnonzero(np.isfinite(one.y))
    paths = [(one.kind, _path(across, down, dots=one.kind == "dots"))]
    if one.kind == "dots":
        paths.insert(0, ("link", _path(across, down, dots=False)))
    if len(shown) == 1:
        paths[-1] = (one.kind + " lone", paths[-1][1])
    points = [[round(across[i]), round(down[i]), exact(one.y[i])] for i in shown]
    where = [f"step {one.step[i]:,.0f} \u00b7 {count(one.x[i])} tokens" for i in shown]
    return paths, {"points": points, "where": where}, points[-1][2]


def chart(
    title: str,
    unit: str,
    series: list[Series],
    span: tuple[float, float],
    *,
    zero: bool = False,
    rules: dict[str, float] | None = None,
) -> Chart | None:
    """A chart of the series over the tokens of `span`; None when no value of theirs is finite.

    `zero`: the y axis begins at 0. `rules`: named level lines; those beyond the data are left out.
    """
    series = [one for one in series if np.isfinite(one.y).any()]
    if not series:
        return None
    first, last = span
    low, high, log, up = _scale(series, zero)
    paths, legend, hover, notes = [], [], [], []
    for one in series:
        chosen = thin(one.y)
        few = Series(one.name, one.kind, one.x[chosen], one.y[chosen], one.step[chosen])
        lines, points, value = _drawn(few, BOX * (few.x - first) / (last - first), BOX * (1 - up(few.y)))
        paths += lines
        hover.append(points)
        legend.append((one.kind, one.name, value))
        if above := int((one.y > high).sum()):
            verb = "point lies" if above == 1 else "points lie"
            notes.append(f"{above} {verb} above the frame; the highest is {exact(np.nanmax(one.y))}.")
    x_values, y_values = ticks(first, last, 3), (log_ticks if log else ticks)(low, high)
    y_labels, factor = _labels(y_values, log)
    return Chart(
        title=title,
        unit=", ".join(part for part in (unit, factor, "log scale" if log else "") if part),
        x_ticks=[
            (100 * (v - first) / (last - first), label) for v, label in zip(x_values, _labels(x_values)[0], strict=True)
        ],
        y_ticks=[(100 * up(v), label) for v, label in zip(y_values, y_labels, strict=True)],
        paths=paths,
        legend=legend,
        where=hover[0]["where"][-1],
        hover=hover,
        rules=[(100 * up(v), name) for name, v in (rules or {}).items() if low < v < high],
        notes=notes,
    )

"""Numbers as a reader wants them: counts, durations, table cells."""

import json
import math
from typing import Any

PREFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
_SUPERSCRIPT = str.maketrans("0123456789-", "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b")
# Characters that HTML forbids; tab and line feed stay, carriage returns go.
FORBIDDEN = {code: "\ufffd" for code in (*range(9), *range(11, 32), *range(127, 160), *range(0xD800, 0xE000))}
FORBIDDEN[13] = ""


def number(value: Any) -> float:
    """`value` as a finite float; NaN for all else (null, text, absent, infinite)."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan


def count(value: float) -> str:
    """Three significant digits and a prefix: 5242880 -> 5.24M, B = 10^9, T = 10^12."""
    for factor, prefix in PREFIXES:
        if abs(value) >= factor:
            scaled = value / factor
            return f"{scaled:.{2 if abs(scaled) < 10 else 1 if abs(scaled) < 100 else 0}f}{prefix}"
    return f"{value:.3g}"


def exact(value: float) -> str:
    """Whole numbers with separators, others with four significant digits."""
    if abs(value) >= 1e9:
        return f"{value:.4g}"
    return f"{value:,.0f}" if abs(value) >= 1000 or value == round(value) else f"{value:#.4g}"


def power(exponent: int) -> str:
    """`10^exponent` in superscript digits."""
    return "10" + str(exponent).translate(_SUPERSCRIPT)


def scientific(value: float) -> str:
    """1.5e15 -> 1.50 x 10^15, typeset."""
    exponent = math.floor(math.log10(value))
    return f"{value / 10**exponent:.2f} \u00d7 {power(exponent)}"


def duration(seconds: float) -> str:
    """Seconds in the two largest units that matter: 372 -> 6 min 12 s."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86_400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86_400} d {whole % 86_400 // 3600} h"


def cell(value: Any) -> str:
    """Any JSON value for a table of facts."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def facts(value: dict, prefix: str = "") -> list[tuple[str, str]]:
    """A nested dict as (label, text) pairs, in its order."""
    pairs: list[tuple[str, str]] = []
    for key, item in value.items():
        label = prefix + str(key).replace("_", " ")
        pairs += facts(item, f"{label}: ") if isinstance(item, dict) else [(label, cell(item))]
    return pairs


def short(text: Any, limit: int = 1000) -> str:
    """At most `limit` characters of a text."""
    whole = str(text)
    return whole if len(whole) <= limit else whole[:limit] + " \u2026"

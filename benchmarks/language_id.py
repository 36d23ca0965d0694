"""Language identification measured: accuracy by length and language, what is accepted of languages it does not know.

Sentences of 75 languages, and paragraphs of the Universal Declaration of Human Rights (UDHR): those in languages
outside LANGUAGES are all to be refused; in languages that the sentences lack they are "more". Varieties that short
texts do not tell apart count as one. A sentence cut to N characters (N / 2 in Chinese and Japanese) is counted from
0.9 N characters on. "und" is wrong. LANGUAGES was fitted on every other sentence and paragraph, half 0; all figures
are of half 1. "best 45" = those with the best accuracy in half 0. "Never seen" = fitted without any text in them, on
half of the languages outside, and applied to the other; of SPLITS random halves the mean, the least and the most.
"New Testaments": texts in NEW languages, which the declarations lack.

    python benchmarks/language_id.py FOLDER [--fit]     # FOLDER = .../data; --fit prints LANGUAGES instead
"""

import argparse
import bz2
import json
import platform
import resource
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from llamita.data import language
from llamita.data.script import scripts
from llamita.data.strings import Strings

RESULTS = Path(__file__).parent / "results/language_id.json"
SENTENCES = "multilingual/langid_sentences.jsonl.bz2"
LENGTHS = (20, 50, 100, 0)  # characters; 0 = all of it
HALVED = ("zh", "ja")
MIN_CASES = 20
# UDHR's codes that are a language of ours, or part of its macrolanguage; and texts in a script it is not written in.
SAME = {"als": "sq", "azb": "az", "cat": "ca", "hau": "ha", "zlm": "id", "cnr": "hr", "prs": "fa"} | dict.fromkeys(
    ("wuu", "yue", "gan", "hak", "hsn", "cjy", "nan"), "zh"
)
OTHER_SCRIPT = ("vie_han", "tgl_tglg", "khk_mong", "mly_arab", "uzn_cyrl")
NEW = "ake amu bsn cjp kbh chq cop dik gbi jac dop nhg pot rom syr shi tmh ppk usp wal djk".split()
UNKNOWN = "und"
Table = dict[str, tuple[int, float, float]]
GRID = np.linspace(0, 0.8, 81)
PRICE = 0.02  # of one text of others accepted, in shares of a language lost
PRIOR = 3  # others never seen, as sure as all others are
MARGIN = 0.06  # how much less sure own texts may be than those seen
MAX_LOSS, MAX_ENGLISH_LOSS = 0.15, 0.003  # most pages are English
MIN_RATE = 0.1  # of function words; rarer ones tell nothing
SPLITS = 8


class Cases:
    """Texts with what they are in, their length and half, and what was found."""

    def __init__(self, rows: list[tuple[str, str, str, int, int]]):
        """Rows = text, name, language, length, half."""
        self.texts, self.names, langs, lengths, halves = map(list, zip(*rows, strict=True))
        self.langs, self.lengths, self.halves = np.array(langs), np.array(lengths), np.array(halves)
        batches = [Strings.of(self.texts[i : i + language.BATCH]) for i in range(0, len(rows), language.BATCH)]
        parts = [language.weigh(batch) for batch in batches]
        found = [label for part in parts for label in part.label]
        self.weighed = language.Weighed(found, *map(np.concatenate, zip(*(part[1:] for part in parts), strict=True)))
        self.scripts = [script for batch in batches for script in scripts(batch)]
        self.groups = np.array([language.group_of(label) for label in found])
        self.right = self.groups == self.langs
        self.written = np.array(list(map(language.is_written_in, found, self.scripts)))
        self.accepted = self.accepted_now()

    def accepted_now(self) -> np.ndarray:
        return language.accepted(self.weighed, self.scripts)


def read(path: Path) -> Iterator[dict]:
    with bz2.open(path) as lines:
        yield from map(json.loads, lines)


def sentences(folder: Path) -> Cases:
    rows = []
    for i, row in enumerate(read(folder / SENTENCES)):
        group = language.group_of(row["lang"])
        for length in LENGTHS if group in language.LANGUAGES else ():
            chars = length // 2 if group in HALVED else length
            if len(row["text"]) >= 0.9 * chars:
                rows.append((row["text"][: chars or None].strip(), row["lang"], group, length, i % 2))
    return Cases(rows)


def declarations(folder: Path) -> tuple[Cases, Cases]:
    """Paragraphs in languages of ours, and in others: at most 40 of each text, of 60 characters and more."""
    known, others = [], []
    for row in read(folder / "multilingual/udhr.jsonl.bz2"):
        code = row["lang"].split("-")[0]
        group = language.group_of(SAME.get(code, code))
        if code == UNKNOWN or row["id"] in OTHER_SCRIPT:
            continue
        paragraphs = [text for part in row["text"].split("\n") if len(text := part.strip()) >= 60]
        for i, text in enumerate(paragraphs[:40]):
            for length in LENGTHS:
                case = (text[: length or None].strip(), row["id"], group, length, i % 2)
                (known if group in language.LANGUAGES else others).append(case)
    return Cases(known), Cases(others)


def to_fit(inside: list[Cases], name: str) -> tuple[Cases, np.ndarray]:
    """Texts in a language, those of the first that has enough."""
    for cases in inside:
        own = (cases.langs == name) & (cases.lengths == 100) & (cases.halves == 0)
        if own.sum() >= MIN_CASES // 2:
            break
    return cases, own


def usual(inside: list[Cases]) -> Table:
    """LANGUAGES without thresholds."""
    table = {}
    for name in sorted(language.LANGUAGES):
        cases, own = to_fit(inside, name)
        score = max(1, round(float(np.median(cases.weighed.score[own]))))
        own &= cases.right
        rate = round(float(cases.weighed.function_words[own].sum() / max(1, cases.weighed.words[own].sum())), 2)
        table[name] = score, rate if rate >= MIN_RATE else 0.0, 0.0
    return table


def fitted(inside: list[Cases], others: Cases) -> Table:
    """LANGUAGES with thresholds that lose least, where each of others accepted costs PRICE of a language.

    Others are those taken for it, and for what was never seen PRIOR more, spread over all confidences as all others
    together are. No language loses more than MAX_LOSS of its texts.
    """
    table, sure = dict(language.LANGUAGES), language.confidence_of(others.weighed)
    sures = {id(cases): language.confidence_of(cases.weighed) for cases in inside}
    outside = (others.lengths == 0) & (others.halves == 0) & others.written
    prior = PRIOR * accepted_from(sure[outside]) / outside.sum()
    for name in table:
        cases, own = to_fit(inside, name)
        kept = np.sort(sures[id(cases)][own & cases.right])
        losses = np.searchsorted(kept, GRID + MARGIN) / len(kept)
        losses += PRICE * (accepted_from(sure[outside & (others.groups == name)]) + prior)
        most = kept[int((MAX_ENGLISH_LOSS if name == "en" else MAX_LOSS) * len(kept))]
        table[name] = *table[name][:2], max(0.0, round(float(min(GRID[losses.argmin()], most)), 2))
    return table


def accepted_from(confidences: np.ndarray) -> np.ndarray:
    """How many there are from each point of GRID on."""
    return len(confidences) - np.searchsorted(np.sort(confidences), GRID)


def accuracies(cases: Cases, length: int, half: int) -> dict[str, float]:
    """By language that has enough texts of that length."""
    by_language = {}
    for name in sorted(set(cases.langs.tolist())):
        own = (cases.langs == name) & (cases.lengths == length) & (cases.halves == half)
        if own.sum() >= MIN_CASES:
            by_language[name] = float((cases.right & cases.accepted)[own].mean())
    return by_language


def accepted_of_others(others: Cases) -> dict:
    table: dict = {"languages": len(set(others.langs.tolist())), "texts": int((others.lengths == 0).sum())}
    for length in LENGTHS:
        which = (others.lengths == length) & (others.halves == 1)
        table[f"{length or 'all'} characters"] = round(float(others.accepted[which].mean()), 4)
    counts: dict[str, int] = defaultdict(int)
    for i in np.flatnonzero(others.accepted & (others.lengths == 0)).tolist():
        counts[f"{others.names[i]} as {others.groups[i]}"] += 1
    table["most often"] = dict(sorted(counts.items(), key=lambda item: -item[1])[:30])
    return table


def accepted_of_never_seen(inside: list[Cases], others: Cases) -> dict[str, list[float]]:
    """By length: the mean, the least and the most of SPLITS."""
    shipped, paragraphs = dict(language.LANGUAGES), others.halves
    names, which = np.unique(others.langs, return_inverse=True)
    shares = np.zeros((SPLITS, len(LENGTHS)))
    for split in range(SPLITS):
        sides = (np.random.default_rng(split).permutation(len(names)) % 2)[which]
        accepted = np.zeros(len(sides), bool)
        for side in (0, 1):
            others.halves = sides ^ side
            use(fitted(inside, others))
            accepted |= (sides != side) & others.accepted_now()
        shares[split] = [accepted[others.lengths == length].mean() for length in LENGTHS]
    use(shipped)
    others.halves = paragraphs
    summed = np.stack([shares.mean(0), shares.min(0), shares.max(0)], axis=1).round(4).tolist()
    return {f"{length or 'all'} characters": row for length, row in zip(LENGTHS, summed, strict=True)}


def testaments(folder: Path) -> dict:
    """Texts of 300 characters in NEW languages, at most 40 each."""
    texts = defaultdict(list)
    for row in read(folder / "multilingual/bible_nt.jsonl.bz2"):
        if row["iso639_2"] in NEW and len(texts[row["iso639_2"]]) < 40:
            texts[row["iso639_2"]].append(row["text"][:300])
    counts = {name: sum(map(UNKNOWN.__ne__, language.identify(Strings.of(parts))[0])) for name, parts in texts.items()}
    return {"languages": len(texts), "texts": sum(map(len, texts.values())), "accepted": counts}


def use(table: Table) -> None:
    language.LANGUAGES.update(table)
    language.THRESHOLDS.update({name: threshold for name, (_, _, threshold) in table.items()})


def varieties(cases: Cases) -> dict[str, float]:
    """How often the variety itself is right, of 100 characters, where the language is."""
    table = {}
    names, found = np.array(cases.names), np.array(cases.weighed.label)
    for name in ("nn", "hr", "sr"):
        own = (names == name) & (cases.lengths == 100) & cases.right
        table[name] = round(float((found == name)[own].mean()), 3)
    return table


def long_documents(folder: Path, chars: int) -> dict[str, float]:
    """Sentences of one language joined up to so many characters: the share that is found, by language."""
    joined: dict[str, list[str]] = defaultdict(list)
    for row in read(folder / SENTENCES):
        joined[language.group_of(row["lang"])].append(row["text"])
    table = {}
    for name, texts in sorted(joined.items()):
        if name in language.LANGUAGES:
            whole = "\n".join(texts)
            parts = [whole[i : i + chars] for i in range(0, len(whole) - chars + 1, chars)][:100]
            found = language.identify(Strings.of(parts))[0]
            table[name] = round(sum(language.group_of(label) == name for label in found) / len(found), 4)
    return table


def speeds(folder: Path) -> dict[str, float]:
    """MB per CPU second of texts of 5 kB, scripts counted too; median of five passes."""
    table = {}
    for title, path in (("English", "novels_en_eltec"), ("17 languages", "novels_multi_eltec")):
        whole = [row["text"].encode() for row in read(folder / f"pretrain/{path}.jsonl.bz2")]
        parts = [text[i : i + 5000] for text in whole for i in range(0, 100_000, 5000)]
        strings = Strings.of([part.decode(errors="ignore") for part in parts if part][:4000])
        seconds = []
        for _ in range(5):
            start = time.process_time()
            found, _ = language.identify(strings, scripts(strings))
            seconds.append(time.process_time() - start)
        table[title] = round(len(strings.data) / 1e6 / statistics.median(seconds), 1)
        if title == "English":
            table["English found in it"] = round(found.count("en") / len(found), 4)
    return table


def measured(folder: Path) -> dict:
    sentence = Strings.of(["Wie schnell ein Modell geladen ist, das merkt man erst beim ersten Satz."])
    scripts(sentence)  # numba itself is not counted
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    language.identify(sentence)
    megabytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    own = sentences(folder)
    more, others = declarations(folder)
    chosen = accuracies(own, 100, 0)
    order = sorted(chosen, key=lambda name: (-chosen[name], name))
    by_length = {length: accuracies(own, length, 1) for length in LENGTHS}
    macro = {
        title: {
            f"{length or 'all'} characters": round(statistics.mean(row[name] for name in names if name in row), 4)
            for length, row in by_length.items()
        }
        for title, names in (("best 40", order[:40]), ("best 45", order[:45]), ("all", order))
    }
    only_there = set(more.langs.tolist()) - set(own.langs.tolist())
    long = {chars: long_documents(folder, chars) for chars in (1000, 5000)}
    return {
        "machine": platform.machine(),
        "macro accuracy": macro,
        "best 45": order[:45],
        "languages": len(order),
        "accepted of languages outside": accepted_of_others(others),
        "accepted of languages outside, never seen": accepted_of_never_seen([own, more], others),
        "accepted of languages outside, New Testaments": testaments(folder),
        "documents of joined sentences": {
            f"{chars} characters": {
                "macro accuracy": round(statistics.mean(row.values()), 4),
                "below 0.98": {name: share for name, share in row.items() if share < 0.98},
            }
            for chars, row in long.items()
        },
        "by language: 20, 50, 100, all characters": {
            name: [round(by_length[length].get(name, np.nan), 3) for length in LENGTHS] for name in sorted(order)
        },
        "more, UDHR paragraphs only": {
            name: round(share, 3) for name, share in accuracies(more, 0, 1).items() if name in only_there
        },
        "varieties told apart": varieties(own),
        "MB per CPU second": speeds(folder),
        "MB of memory the first call adds at its peak": round(megabytes),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--fit", action="store_true")
    args = parser.parse_args()
    if args.fit:
        more, others = declarations(args.folder)
        inside = [sentences(args.folder), more]
        use(usual(inside))
        table = fitted(inside, others)
        print(", ".join(f'"{name}": {row}' for name, row in table.items()))
        return
    table = measured(args.folder)
    RESULTS.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(table, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()

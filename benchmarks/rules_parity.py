"""Do our rules decide as datatrove 0.10.1's filters do? Share of documents with the same decision, rule by rule.

datatrove's side runs in the Python given: each filter once a rule, all its other rules off. Documents are those of the
shared text: all of c4_demo and wiki_demo, half of techdocs_en and tinystories, fairy tales and novels cut to 5,000
characters. Writes one JSON; prints it.

    python benchmarks/rules_parity.py shared/data/pretrain --peers PYTHON
"""

import argparse
import bz2
import json
import lzma
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

RESULTS = Path(__file__).parent / "results/rules_parity.json"
SOURCES = {  # every n-th document
    "c4_demo.jsonl.xz": 1,
    "wiki_demo.txt.xz": 1,
    "techdocs_en.jsonl.xz": 2,
    "fairytales_en.jsonl.xz": 2,
    "tinystories_en_sample.jsonl.xz": 2,
    "novels_en_100.jsonl.bz2": 20,
}
LONGEST = 5000
UNCUT = ("c4_demo.jsonl.xz", "wiki_demo.txt.xz", "techdocs_en.jsonl.xz")
WHY = {
    "gopher-quality@1": "Words: spaCy knows English abbreviations, contractions, units and emoticons one by one.",
    "gopher-repetition@1": "Words, as above; n-grams are compared word by word, not as joined text.",
    "c4@1": "Words and abbreviations, as above: a full stop that spaCy leaves in a word ends no sentence there.",
    "fineweb@1": "Words, as above; white space at the end of a line is not looked at.",
}


def texts_of(path: Path) -> Iterator[str]:
    with (lzma if path.suffix == ".xz" else bz2).open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            text = json.loads(line)["text"] if ".jsonl" in path.name else line.rstrip("\n")
            size = len(text) if path.name in UNCUT else LONGEST
            yield from (text[i : i + size] for i in range(0, len(text), size))


def documents(folder: Path) -> list[str]:
    return [text for name, step in SOURCES.items() for text in islice(texts_of(folder / name), 0, None, step)]


def peer_rules() -> dict[str, Callable[[str], bool]]:
    """datatrove's decision, True = kept, of each of our rules."""
    from datatrove.data import Document
    from datatrove.pipeline.filters import (
        C4QualityFilter,
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
    )

    def alone(kind: type, off: dict, **on) -> Callable[[str], bool]:
        rule = kind(**(off | on))

        def kept(text: str) -> bool:
            try:
                return rule.filter(Document(text=text, id="")) is True
            except (ZeroDivisionError, ValueError):  # no word, no line
                return False

        return kept

    names = "min_doc_words max_doc_words min_avg_word_length max_avg_word_length max_symbol_word_ratio "
    names += "max_bullet_lines_ratio max_ellipsis_lines_ratio max_non_alpha_words_ratio min_stop_words"
    quality = dict.fromkeys(names.split())
    repetition = dict.fromkeys(["dup_line_frac", "dup_para_frac", "dup_line_char_frac", "dup_para_char_frac"])
    repetition |= {"top_n_grams": (), "dup_n_grams": ()}
    switches = "remove_citations filter_no_terminal_punct filter_lorem_ipsum filter_javascript filter_curly_bracket"
    c4 = dict.fromkeys([*switches.split(), "filter_policy"], False)
    lines_only = dict.fromkeys(["remove_citations", "filter_javascript", "filter_policy"], True)
    fineweb = {"line_punct_thr": -1, "short_line_thr": 2, "char_duplicates_ratio": 2, "new_line_ratio": float("inf")}
    rules = {
        "gopher-quality@1:words": alone(GopherQualityFilter, quality, min_doc_words=50, max_doc_words=100_000),
        "gopher-quality@1:mean_word_length": alone(
            GopherQualityFilter, quality, min_avg_word_length=3, max_avg_word_length=10
        ),
        "gopher-quality@1:hash_ratio+ellipsis_ratio": alone(GopherQualityFilter, quality, max_symbol_word_ratio=0.1),
        "gopher-quality@1:bullet_lines": alone(GopherQualityFilter, quality, max_bullet_lines_ratio=0.9),
        "gopher-quality@1:ellipsis_lines": alone(GopherQualityFilter, quality, max_ellipsis_lines_ratio=0.3),
        "gopher-quality@1:alpha_words": alone(GopherQualityFilter, quality, max_non_alpha_words_ratio=0.8),
        "gopher-quality@1:stop_words": alone(GopherQualityFilter, quality, min_stop_words=2),
        "gopher-repetition@1:dup_lines": alone(GopherRepetitionFilter, repetition, dup_line_frac=0.3),
        "gopher-repetition@1:dup_paragraphs": alone(GopherRepetitionFilter, repetition, dup_para_frac=0.3),
        "gopher-repetition@1:dup_line_chars": alone(GopherRepetitionFilter, repetition, dup_line_char_frac=0.2),
        "gopher-repetition@1:dup_paragraph_chars": alone(GopherRepetitionFilter, repetition, dup_para_char_frac=0.2),
    }
    for n, most in {2: 0.2, 3: 0.18, 4: 0.16}.items():
        name = f"gopher-repetition@1:top_{n}_gram"
        rules[name] = alone(GopherRepetitionFilter, repetition, top_n_grams=((n, most),))
    for n, most in {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.1}.items():
        name = f"gopher-repetition@1:dup_{n}_gram"
        rules[name] = alone(GopherRepetitionFilter, repetition, dup_n_grams=((n, most),))
    rules |= {
        "c4@1:sentences": alone(C4QualityFilter, c4 | lines_only),
        "c4@1:curly_bracket": alone(C4QualityFilter, c4, filter_curly_bracket=True, min_num_sentences=-1),
        "fineweb@1:punctuated_lines": alone(FineWebQualityFilter, fineweb, line_punct_thr=0.12),
        "fineweb@1:short_lines": alone(FineWebQualityFilter, fineweb, short_line_thr=0.67),
        "fineweb@1:dup_full_line_chars": alone(FineWebQualityFilter, fineweb, char_duplicates_ratio=0.1),
        "fineweb-code@1:dup_full_line_chars": alone(FineWebQualityFilter, fineweb, char_duplicates_ratio=0.01),
        "fineweb@1:newlines_per_word": alone(FineWebQualityFilter, fineweb, new_line_ratio=0.3),
    }
    return rules


def peer_lines(text: str) -> str:
    """What datatrove's C4 filter leaves of a text, its rules for whole documents off, as FineWeb runs it."""
    from datatrove.data import Document
    from datatrove.pipeline.filters import C4QualityFilter

    document = Document(text=text, id="")
    off = dict.fromkeys(["filter_no_terminal_punct", "filter_lorem_ipsum", "filter_curly_bracket"], False)
    C4QualityFilter(min_num_sentences=-1, **off).filter(document)
    return document.text


def peer() -> None:
    """Reads JSON lines, texts; writes for each a JSON line: the rules that keep it, and what C4's lines leave."""
    rules = peer_rules()
    for line in sys.stdin:
        text = json.loads(line)
        print(json.dumps([{name: rule(text) for name, rule in rules.items()}, peer_lines(text)]))


def peer_decisions(python: str, texts: list[str]) -> tuple[dict[str, list[bool]], list[str]]:
    """Which texts each rule keeps, and the edited texts."""
    given = "".join(json.dumps(text) + "\n" for text in texts)
    command = [python, "-W", "ignore", __file__, "--peer"]
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {name: [kept[name] for kept, _ in rows] for name in rows[0][0]}, [edited for _, edited in rows]


def our_decisions(names: list[str], texts: list[str]) -> tuple[dict[str, list[bool]], list[str]]:
    """The same of ours. C4's rules are asked of what its lines leave; `+` joins rules that datatrove has as one."""
    import numpy as np

    from llamita.data import presets
    from llamita.data.c4 import c4_lines
    from llamita.data.measure import measure
    from llamita.data.strings import Strings

    strings = Strings.of(texts)
    edited = c4_lines(strings)
    columns, of_edited = measure(strings), measure(edited)
    rules = dict(presets.rules(list(presets.PRESETS)))
    kept = {}
    for name in names:
        preset, _, ours = name.partition(":")
        from_columns = of_edited if preset == "c4@1" else columns
        masks = [presets.mask(from_columns, rules[f"{preset}:{rule}"], ["en"] * len(texts)) for rule in ours.split("+")]
        kept[name] = np.all(masks, axis=0).tolist()
    return kept, edited.texts()


def agreement(theirs: list, ours: list) -> float:
    return sum(a == b for a, b in zip(theirs, ours, strict=True)) / len(theirs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pretrain", type=Path)
    parser.add_argument("--peers", required=True, help="a Python that has datatrove, spacy and nltk")
    args = parser.parse_args()
    texts = documents(args.pretrain)
    start = time.perf_counter()
    theirs, their_lines = peer_decisions(args.peers, texts)
    peer_seconds = time.perf_counter() - start
    ours, our_lines = our_decisions(list(theirs), texts)
    rows: dict[str, dict] = {}
    for name, kept in theirs.items():
        share = agreement(kept, ours[name])
        rows[name] = {"agreement": round(share, 5), "datatrove drops": kept.count(False)}
        rows[name] |= {"we drop": ours[name].count(False)} | ({"why": WHY[name.split(":")[0]]} if share < 1 else {})
    results = {
        "documents": len(texts),
        "characters": sum(map(len, texts)),
        "datatrove, seconds": round(peer_seconds, 1),
        "c4_lines, texts alike": round(agreement(their_lines, our_lines), 5),
        "rules": rows,
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    peer() if sys.argv[1:] == ["--peer"] else main()

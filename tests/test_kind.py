"""Layer: arithmetic, hostile input, and real files. Code is told from prose in any language, and tables from both."""

import bz2
import csv
import io
import json
import lzma
import random
import re
import sysconfig
import tarfile
from pathlib import Path

import pytest

from llamita.data import kind
from llamita.data.code_language import OTHER, code_language
from llamita.data.kind import CODE, KINDS, MARKUP, PROSE, TABLE, kinds, of_name
from llamita.data.strings import Strings

PYTHON = "def area(r):\n    # of a circle\n    return 3.14 * r ** 2\n\nprint(area(2))\n"
C = '#include <stdio.h>\n\nint main(void) {\n  for (int i = 0; i < 3; i++) {\n    printf("%d\\n", i);\n  }\n}\n'
SHELL = 'set -e\nfor f in *.txt; do\n  echo "$f"\n  cp $f $OUT/\ndone\n'
NOVEL = (
    "It was late when the carriage stopped (for the second time) before the inn; the landlord came out,\n"
    "for he had heard the wheels, and held up his lantern: nobody was there.\n"
)
VERSE = "Before we proceed any further, hear me speak;\nSpeak, speak, good friend;\nYou know your enemy:\nWe know;\n"
CHINESE = "从前有一个小女孩，她住在森林边上的一座小房子里。\n有一天，妈妈对她说：“去看看外婆吧。”\n" * 3
MARKDOWN = (
    f"# Circles\n\nThe area follows from the radius.\n\n```py\n{PYTHON * 5}```\n\n## See also\n\n[squares](s.md)\n"
)
REST = (
    "Circles\n=======\n\nThe area follows from ``r``, as in this program::\n\n   "
    + (PYTHON * 3).replace("\n", "\n   ")
    + "\n\n.. note:: It is exact.\n"
)
ROWS = 'name,age,town\n"Lee, Ann",31,Oslo\nBob,42,"Rome\n(Italy)"\nEve,27,Bonn\n'
HOSTILE = [
    "", " ", "\n" * 5000, "a" * 30_000, "x," * 20_000, "{" * 3000, "```\n" * 2001, '"' * 5001, "\u3000" * 100,
    "_(" * 900, ":::\n", "#!", "## ", "ab::\n  x\n y", "= = =", "==\n==\n==\n", '"a""b",c\n' * 9, "\r\n" * 40,
    "(((((((s)", "[", "/",
]  # fmt: skip
PIECES = [
    "the ", "cat ", "Über ", "猫", "12", ", ", ". ", "\n", "\n\n", "    ", "\t", "(", ")", "[i]", "f(x)", "a_b", " = ",
    "==", "->", "::\n", "::", ";\n", "{\n", "}\n", ":\n", "return ", "if ", "import ", "`", "```\n", "## ", ".. ", "](",
    "|", '"', '","', "----", "&&", "://", "\r\n", "\u00a0", "<b>", '": ', "item(s) ", "x[1]",
]  # fmt: skip


def one(text: str, name: str = "") -> tuple[str, str]:
    found, languages = kinds([name], Strings.of([text]))
    return found[0], languages[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (PYTHON, (CODE, "python")), (C, (CODE, "c")), (SHELL, (CODE, "shell")), (NOVEL, (PROSE, "")),
        (VERSE, (PROSE, "")), (CHINESE, (PROSE, "")), (MARKDOWN, (PROSE, "")), (REST, (PROSE, "")), (ROWS, (TABLE, "")),
        (ROWS.replace(",", "\t"), (TABLE, "")), ("1 2 3\n40 50 60\n7 8 9\n", (TABLE, "")),
        ("<ul>\n<li>one</li>\n<li>two</li>\n</ul>\n", (MARKUP, "")), ('{\n "a": 1,\n "b": [2]\n}\n', (MARKUP, "")),
        ("<?php\necho $name;\nfoo($x);\n", (CODE, "php")), ("", (PROSE, "")), ("\n \n", (PROSE, "")),
        ("#!/usr/bin/env python3\n# nothing yet\n", (CODE, "python")),
    ],
)  # fmt: skip
def test_by_content(text, expected):
    assert one(text, "rows.jsonl:7") == expected


def test_code_that_is_no_block_of_a_page_counts():
    """The negative control of MARKDOWN and REST: the same text without what makes its program a block."""
    assert one(MARKDOWN.replace("```py\n", "").replace("```", "").replace("#", "").replace("](", ""))[0] == CODE
    assert one(REST.replace("::\n", ".\n").replace("====", "").replace(".. note", "note"))[0] == CODE


def test_by_name():
    assert of_name("src/main.rs") == of_name("a/b.tar:src/main.rs.gz") == (CODE, "rust")
    assert of_name("big.py:3") == (CODE, "python") and of_name("x/Makefile") == (CODE, "make")
    assert of_name("README.md") == (PROSE, "") and of_name("t.csv") == (TABLE, "") and of_name("a.json") == (MARKUP, "")
    for name in ("novels.jsonl:17", "go", "c", "", "notes.txt", "https://www.name.org/index.php", "crawl.warc.gz:5"):
        assert of_name(name) == ("", "")
    assert one(C, "x.cpp") == (CODE, "cpp") and one(PYTHON, "page.md") == (PROSE, "")
    assert one(NOVEL, "www.name.pl")[0] == PROSE, "a page, not Perl"
    assert one(NOVEL + PYTHON, "x.pl") == (CODE, "perl")


def test_languages_of_code():
    assert code_language(b"#!/bin/sh\nx") == "shell" and code_language(b"#! /usr/bin/env -S python3 -u\n") == "python"
    assert code_language(b"package main\n\nfunc main() {\n\tx := 1\n}\n") == "go"
    assert code_language(b"fn main() {\n    let mut x = Some(1);\n    println!();\n}\n") == "rust"
    assert code_language(b"#include <map>\nstd::map<int, int> m;\n") == "cpp"
    assert code_language(b"SELECT a FROM t WHERE b = 1\n") == "sql" and code_language(b"(((") == OTHER


LETTER, SIGN = rb"[A-Za-z\x80-\xff]", rb"[!-/:-@\[-`{-\x7f]"
SIGNS = re.compile(
    rb"(?<=[A-Za-z\x80-\xff_])\((?!s\))|(?<=[A-Za-z\x80-\xff_])\[(?=[:-\xff])|(?<=%s)_(?=%s)|(?<= )=(?= )"
    rb"|(?<=[=!+*/<>:|&-])=|(?<=[-=])>|(?<=:):(?!%s)|(?<=&)&(?!%s)|(?<=\|)\|(?!%s)" % (LETTER, LETTER, SIGN, SIGN, SIGN)
)
SPACES = bytes(range(33))


def plain_line(line: bytes) -> tuple[str, bool]:
    """The twin of `_line_kind`, by patterns: the kind of a line, and whether it is a mark of Markdown or reST."""
    letters, spaces = len(re.findall(LETTER, line)), sum(byte <= 32 for byte in line)
    if not letters:
        return CODE if line[-1:] in b"{}" else "", bool(re.fullmatch(rb"([=~^*-])\1{2,}", line))
    prosy = PROSE if letters + spaces >= 0.8 * len(line) and (spaces >= 3 or letters > 20) else ""
    if b"`" in line or line[:1] in b"|:":
        return prosy, False
    signs = len(SIGNS.findall(b" " + line + b" "))
    closed = bool(re.search(rb"[])}\"'0-9].$", line, re.DOTALL))
    signs += line[-1:] in b"{}" or (line[-1:] == b";" and (closed or spaces == 0)) or (line[-1:] == b":" and closed)
    if not signs and (spaces < 6 or line[-1:] in b")]}\"':") and line[-1:] not in b".?!,":
        for word in map(str.encode, kind._BEGINNINGS):
            if line.startswith(word) and (
                not re.match(LETTER, line[:1]) or not re.match(LETTER, line[len(word) : len(word) + 1])
            ):
                signs = 2
    if signs * 40 >= len(line):
        return CODE, False
    return prosy, b"](" in line or (len(line) > 3 and line[:2] in (b"##", b".."))


def plain_counts(piece: bytes) -> dict[str, int]:
    counts = dict.fromkeys(("lines", PROSE, CODE, "blocks", "marks", "digits", "visible"), 0)
    fence, block = False, -1
    for whole in piece.split(b"\n"):
        line = whole.strip(SPACES)
        indent = len(whole) - len(whole.lstrip(SPACES))
        if not line:
            continue
        if line.startswith(b"```"):
            fence = not fence
            counts["blocks"] += 1
        elif not fence and (block < 0 or indent <= block):
            found, is_mark = plain_line(line)
            counts["lines"] += 1
            counts["marks"] += is_mark
            counts["digits"] += sum(48 <= byte <= 57 for byte in line)
            counts["visible"] += sum(byte > 32 for byte in line)
            if found:
                counts[found] += 1 + len(line) // 80
            block = indent if found != CODE and len(line) > 2 and line.endswith(b"::") else -1
    return counts


def plain_table(head: bytes, is_cut: bool) -> bool:
    for delimiter in b",\t;|":
        bare = re.sub(rb'(?:(?<=\n)|(?<=%s)|\A)"(?:[^"]|"")*("|\Z)' % re.escape(bytes([delimiter])), b"~", head)
        records = [record for record in bare.split(b"\n")[: -1 if is_cut else None] if record]
        counts = [len(re.findall(rb"%s(?! )" % re.escape(bytes([delimiter])), record)) for record in records]
        counts = [n - (n == 1 and record[-1] == delimiter) for n, record in zip(counts, records, strict=True)]
        most = max(counts, key=counts.count, default=0)
        if most and len(counts) >= (3 if most > 1 else 9) and counts.count(most) >= 0.9 * len(counts) and counts[0]:
            return True
    return False


def plain_markup(head: bytes) -> bool:
    head = head.lstrip(SPACES)
    lines = 1 + head[:-1].count(b"\n")
    tags = len(re.findall(rb"<(?=[A-Za-z\x80-\xff/!?])", head))
    is_tagged = head.startswith(b"<") and 2 * tags >= lines and not head.startswith(b"<?p")
    return len(head) > 1 and (is_tagged or (head[:1] in b"{[" and 4 * head.count(b'":') >= lines))


def plain_kind(text: bytes) -> str:
    head, size = text[: kind.HEAD_BYTES], kind.HEAD_BYTES
    counts = plain_counts(head)
    if not counts["blocks"] and len(text) > 2 * size:
        for name, count in plain_counts(text[len(text) // 2 :][:size]).items():
            counts[name] += count
    if text.startswith(b"#!") and len(text) > 2:
        return CODE
    if plain_table(head, len(text) > size) or (counts["lines"] >= 3 and counts["digits"] > 0.5 * counts["visible"]):
        return TABLE
    if plain_markup(head):
        return MARKUP
    is_code = counts[CODE] > 0.2 * (counts[CODE] + counts[PROSE]) and counts[CODE] >= 4 * counts["marks"]
    return CODE if is_code else PROSE


def test_the_kernel_agrees_with_its_twin():
    rng = random.Random(5)
    texts = [*HOSTILE, PYTHON, C, NOVEL, VERSE, CHINESE, MARKDOWN, REST]
    texts += ["".join(rng.choice(PIECES) for _ in range(rng.randrange(60))) for _ in range(3000)]
    lines = [text.strip() for piece in texts for text in piece.split("\n") if text.strip()]
    texts += ["\n".join(rng.choices(lines, k=rng.randrange(1, 12))) for _ in range(1000)]
    cells = ["1", "a", "", " b", '"c, d"', '"e ""f"" ;\n g"', '"', "h|i", "Words in a cell"]
    for delimiter in ",\t;|" * 100:
        columns, number = rng.randrange(1, 5), rng.randrange(14)
        records = [delimiter.join(rng.choices(cells, k=columns)) for _ in range(number)]
        texts.append(rng.choice(["\n", "\r\n"]).join(records) + "\n" * rng.randrange(2))
    texts += ["\n".join(rng.choices(lines, k=400)) for _ in range(20)]  # longer than what is looked at
    strings = Strings.of(texts)
    found, _ = kinds([""] * len(texts), strings)
    expected = [plain_kind(strings[i]) for i in range(len(strings))]
    wrong = [(text, got, want) for text, got, want in zip(texts, found, expected, strict=True) if got != want]
    assert not wrong, (len(wrong), wrong[:3])
    assert {name: found.count(name) >= 10 for name in KINDS} == dict.fromkeys(KINDS, True)


def test_a_document_is_judged_alone():
    texts = [PYTHON, NOVEL, ROWS, "", MARKDOWN, C]
    assert kinds([""] * 6, Strings.of(texts))[0] == [one(text)[0] for text in texts]
    assert kinds([], Strings.of([])) == ([], [])


def rows(path: Path) -> list[dict]:
    opener = lzma.open if path.suffix == ".xz" else bz2.open
    with opener(path) as lines:
        return [json.loads(line) for line in lines]


def share(texts: list[str], wanted: str) -> float:
    return kinds([""] * len(texts), Strings.of(texts))[0].count(wanted) / len(texts)


@pytest.mark.parametrize(
    "name", ["techdocs_en.jsonl.xz", "c4_demo.jsonl.xz", "tinystories_ru.jsonl.xz", "novels_multi_eltec.jsonl.bz2"]
)
def test_real_prose(shared_data, name):
    texts = [row["text"] for row in rows(shared_data / "pretrain" / name)[:4000]]
    if "novels" in name:
        texts = [text[i : i + 4000] for text in texts for i in range(0, 40_000, 4000) if text[i : i + 4000].strip()]
    assert share(texts, PROSE) >= 0.995


def test_real_code(shared_data):
    solved = rows(shared_data / "eval" / "HumanEval.jsonl.xz")
    assert share([row["canonical_solution"] for row in solved], CODE) >= 0.97
    assert share([row["prompt"] + row["canonical_solution"] for row in solved], CODE) >= 0.97
    assert share([row["code"] for row in rows(shared_data / "eval" / "mbpp.jsonl.xz")], CODE) >= 0.97


def test_the_standard_library_is_code():
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [text for file in files if (text := file.read_text(encoding="utf-8")).strip()]
    found, languages = kinds([""] * len(texts), Strings.of(texts))
    assert found.count(CODE) >= 0.97 * len(texts) and languages.count("python") >= 0.9 * len(texts)


def test_real_tables(shared_data):
    with tarfile.open(shared_data / "eval" / "mmlu.tar.bz2") as tar:
        texts = [tar.extractfile(member).read().decode() for member in tar if member.name.endswith(".csv")]
    assert share(texts, TABLE) == 1
    for delimiter in ",\t;|":
        made = io.StringIO()
        lines = [[row["question"], row["answer"]] for row in rows(shared_data / "eval" / "gsm8k_test.jsonl.xz")]
        csv.writer(made, delimiter=delimiter).writerows([["question", "answer"], *lines])
        assert share([made.getvalue()], TABLE) == 1

"""Twenty megabytes of everything: ids equal to tiktoken's and transformers', text back as it was; hostile input."""

import base64
import bz2
import json
import lzma
import random
import sysconfig
from collections import defaultdict
from pathlib import Path

import pytest
import tiktoken

from llamita.tokenizer import Tokenizer
from llamita.tokenizer.llama3 import PATTERN, SPECIALS

MB = 10**6


def rows(path: Path):
    with (bz2.open if path.suffix == ".bz2" else lzma.open)(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def by_language(path: Path, each: int, most: int) -> dict[str, list[str]]:
    """Texts of a language until it has `each` bytes, for the first `most` languages."""
    found: dict[str, list[str]] = defaultdict(list)
    sizes: dict[str, int] = defaultdict(int)
    for row in rows(path):
        lang = row["lang"]
        if sizes[lang] < each and (lang in found or len(found) < most):
            found[lang].append(row["text"][:each])
            sizes[lang] += len(row["text"].encode())
    return found


def source_code(num_bytes: int) -> list[str]:
    found, size = [], 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if size < num_bytes:
            found.append(path.read_text(encoding="utf-8", errors="replace"))
            size += len(found[-1])
    return found


def wild(seed: int, num: int) -> list[str]:
    """Random strings over blocks of Unicode, blanks, control characters, emoji, marks, digits and special names."""
    draw = random.Random(seed)
    blocks = [range(0x20, 0x7F), range(0, 0x20), range(0xA0, 0x250), range(0x300, 0x370), range(0x400, 0x530),
              range(0x590, 0x700), range(0x900, 0xE80), range(0x1F00, 0x2070), range(0x2190, 0x27C0),
              range(0x3000, 0x3100), range(0x4E00, 0x9FFF), range(0xAC00, 0xD7A4), range(0xFE00, 0xFFFE),
              range(0x1F300, 0x1FAFF), range(0xE0000, 0xE0080)]  # fmt: skip
    parts = [*SPECIALS[:11], "'s", "'LL", " 'Ve", "\r\n", "   ", "\t\t", "123456", "\u200d", "\ufe0f", "\x1b[31m"]
    found = []
    for _ in range(num):
        block = draw.choice(blocks)
        pieces = [
            draw.choice(parts) if draw.random() < 0.15 else chr(draw.choice(block)) for _ in range(draw.randrange(200))
        ]
        found.append("".join(pieces))
    return found


def broken_utf8(seed: int, num: int) -> list[str]:
    """What is left of random bytes and of cut characters when a reader replaces what is no UTF-8."""
    draw = random.Random(seed)
    whole = "na\u00efve \u4e2d\u6587 \U0001f600 \u0928\u092e\u0938\u094d\u0924\u0947 ".encode()
    cut = [whole[draw.randrange(9) : -draw.randrange(1, 9)] for _ in range(num)]
    return [data.decode("utf-8", "replace") for data in [*cut, *(draw.randbytes(300) for _ in range(num))]]


@pytest.fixture(scope="module")
def mixed(shared_data) -> list[str]:
    novels = by_language(shared_data / "pretrain" / "novels_multi_eltec.jsonl.bz2", 450_000, 17)
    sentences = by_language(shared_data / "multilingual" / "langid_sentences.jsonl.bz2", 60_000, 75)
    russian = by_language(shared_data / "pretrain" / "tinystories_ru.jsonl.xz", 600_000, 1)
    assert len(novels.keys() | sentences.keys() | russian.keys()) >= 20
    found = [text for texts in (novels, sentences, russian) for lang in texts.values() for text in lang]
    found += source_code(3 * MB)
    found += [row["text"] for row in rows(shared_data / "pretrain" / "techdocs_en.jsonl.xz")][:600]
    found += wild(0, 8000) + broken_utf8(1, 400)
    found += [
        "x" * 100_000,
        "\u4e2d" * 100_000,
        "9" * 100_000,
        "ab" * 50_000,
        "\U0001f600" * 25_000,
        "a\u0301" * 50_000,
    ]
    assert sum(len(text.encode()) for text in found) >= 20 * MB
    return found


@pytest.fixture(scope="module")
def llama3(shared_data) -> Tokenizer:
    return Tokenizer.load(shared_data / "tokenizers" / "llama3_tokenizer.model")


@pytest.mark.slow
def test_tiktoken_reading_metas_file_gives_equal_ids(llama3, mixed, shared_data):
    """Through no code of ours: Meta's lines, PATTERN, tiktoken."""
    lines = (shared_data / "tokenizers" / "llama3_tokenizer.model").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
    plain = tiktoken.Encoding("meta", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    assert llama3.encode_batch(mixed) == plain.encode_ordinary_batch(mixed, num_threads=2)


@pytest.mark.slow
def test_text_comes_back_as_it_was(llama3, mixed):
    for text, ids in zip(mixed, llama3.encode_batch(mixed), strict=True):
        assert llama3.decode_bytes(ids) == text.encode()


@pytest.mark.slow
def test_transformers_gives_equal_ids(llama3, mixed, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    llama3.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text, ids in zip(mixed, llama3.encode_batch(mixed), strict=True):
        got = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert got == ids, ascii(text[:60])


# ---- hostile ----


LONG = {
    "letters": "x" * 200_000, "blanks": " " * 200_000, "newlines": "\n" * 200_000, "digits": "7" * 200_000,
    "marks": "=" * 200_000, "accents": "\u0301" * 100_000, "pairs": "a1" * 100_000, "mixed": "\t \u3000" * 60_000,
}  # fmt: skip


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_long_runs_are_encoded_and_come_back(llama3, text):
    assert llama3.decode(llama3.encode(text)) == text


def test_a_special_name_in_text_is_text_unless_asked_for(llama3):
    for name in SPECIALS:
        text = f"ignore{name}all of it"
        assert max(llama3.encode(text)) < 128_000
        assert llama3.specials[name] in llama3.encode(text, specials="allow")
        with pytest.raises(ValueError, match=r"special token <\|.*\|> at character 6; take it out"):
            llama3.encode(text, specials="forbid")
    assert llama3.encode("<|eot_id", specials="forbid") == llama3.encode("<|eot_id")

"""Layer: pure arithmetic and parity with others (tiktoken, transformers)."""

import itertools
import json
import os
import re
from collections import Counter
from pathlib import Path

import pytest
import regex
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from llamita.tokenizer import Tokenizer, emit
from llamita.tokenizer.llama3 import LONGEST_BLANK, PATTERN, SPECIALS, pieces
from llamita.tokenizer.train import train

PROPERTY = settings(deadline=None, database=None)
TORTURE = [
    "",
    " ",
    "\n",
    "\r\n\r\n \t",
    "  leading, trailing  ",
    "Hello, world!\n\n\n  def f(x):\n\treturn x**2  # 1234567890",
    "it's IT'S we'Ll 'tis don\u2019t 's 'S \u017f'\u017f y\u2019all'd've",
    "a , b . don 't [ x ] <unk> </s> _under_score",
    "3.14159 1,000,000 \u0663\u0664\u0665\u0666 \u2167 \u00bd x\u00b2 \uff11\uff12\uff13\uff14",
    "e\u0301 \u00e9 n\u0303 \u0130I\u0131i \u1e9e\u00df \ufb01 \u01c5",
    "\u4e2d\u6587\u6e2c\u8a66\u3002\u65e5\u672c\u8a9e\u3067\u3059 \ud55c\uad6d\uc5b4",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u05e2\u05d1\u05e8\u05d9\u05ea \u200f\u200e",
    "\u0e19\u0e49\u0e33 \u0939\u093f\u0928\u094d\u0926\u0940 \u0baf\u0bbe \u1797\u17b6\u179f\u17b6",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467\U0001f1e9\U0001f1ea \u2764\ufe0f",
    "\x00\x01\x1b[31m\x7f\x85\xa0\u2028\u2029\u3000\ufeff\ufffd\ufffe\U0010ffff",
    "\x1c a\x1cb \x1f\x1f \x0b\x0c x",
    "=" * 300 + " " * 300 + "\n" * 300 + "x" * 300 + "7" * 300,
    "https://example.org/a?b=c&d=%20#e C:\\dir\\file \u20ac5 @user #tag",
    " jeho\nektedir Vi\u1ec7t",  # Meta's tokens that no merge of lower ranks makes: ignore_merges must be on
    "<|eot_id", "|>", "< |eot_id| >",
]  # fmt: skip
SOURCE = [Path(__file__).read_text(encoding="utf-8"), *TORTURE, "the cat sat on the mat. " * 50]


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return train(SOURCE, 1024)


@pytest.fixture(scope="module")
def llama3(shared_data) -> Tokenizer:
    return Tokenizer.load(shared_data / "tokenizers" / "llama3_tokenizer.model")


@pytest.fixture(scope="module", params=["small", "llama3"])
def saved(request, tmp_path_factory) -> tuple[Tokenizer, Path]:
    tokenizer = request.getfixturevalue(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer.save(folder)
    return tokenizer, folder


# ---- ids ----


def test_vectors_of_llama_cpp(llama3, shared_data):
    names = (shared_data / "tokenizers" / f"ggml-vocab-llama-bpe.gguf.{end}" for end in ("inp", "out"))
    given_text, wanted = (name.read_bytes().decode("utf-8") for name in names)
    texts = given_text.split("\n__ggml_vocab_test__\n")
    ids = [[int(i) for i in line.split()] for line in wanted.split("\n")]
    assert len(texts) == len(ids) == 47
    assert [llama3.encode(text) for text in texts] == ids

    gpt2_numbers = tiktoken.Encoding(
        "mutant",
        pat_str=PATTERN.replace(r"\p{N}{1,3}", r"\p{N}+"),
        mergeable_ranks={token: rank for rank, token in enumerate(llama3.tokens)},
        special_tokens={},
    )
    assert [gpt2_numbers.encode_ordinary(text) for text in texts] != ids


def test_special_ids_are_metas(llama3):
    named = {0: "begin_of_text", 1: "end_of_text", 2: "reserved_special_token_0", 4: "finetune_right_pad_id"}
    named |= {6: "start_header_id", 7: "end_header_id", 8: "eom_id", 9: "eot_id", 10: "python_tag"}
    named |= {11: "reserved_special_token_2", 255: "reserved_special_token_246"}
    assert {llama3.specials[f"<|{name}|>"] - 128_000: name for name in named.values()} == named
    assert len(set(SPECIALS)) == 256 and llama3.vocab_size == 128_256
    assert (llama3.bos_id, llama3.eos_id, llama3.pad_id, llama3.eot_id) == (
        128_000,
        128_001,
        128_004,
        128_009,
    )
    assert llama3.stop_ids == {128_001, 128_008, 128_009}
    assert llama3.encode("", bos=True, eos=True) == [128_000, 128_001]


@PROPERTY
@given(st.text())
def test_round_trip(small, text):
    ids = small.encode(text)
    assert small.decode(ids) == text
    assert small.decode_bytes(ids) == text.encode("utf-8")


@PROPERTY
@given(st.lists(st.sampled_from(SPECIALS[:12]) | st.text(max_size=4)).map("".join))
def test_specials_never_come_from_text(small, text):
    ids = small.encode(text)
    assert all(i < len(small.tokens) for i in ids) and small.decode(ids) == text
    ids = small.encode(text, specials="allow")
    assert sum(i >= len(small.tokens) for i in ids) == len(re.findall("|".join(map(re.escape, SPECIALS)), text))
    assert small.decode(ids) == text


def test_skip_special(small):
    ids = small.encode("one", bos=True) + small.encode(" two", eos=True)
    assert small.decode(ids, skip_special=True) == "one two"
    assert small.decode(ids) == "<|begin_of_text|>one two<|end_of_text|>"


def test_surrogates(small):
    assert small.decode(small.encode("\ud83d\ude00")) == "\U0001f600"
    assert small.decode(small.encode("a\ud83d b\udc00")) == "a\ufffd b\ufffd"


def test_broken_utf8_decodes_with_replacement(small):
    assert small.decode([small.tokens.index(b"\xff"), small.tokens.index(b"a")]) == "\ufffda"


@pytest.mark.parametrize("bad", [-1, 1024, 2**40])
def test_unknown_id(small, bad):
    with pytest.raises(ValueError, match=f"token id {bad} is outside the vocabulary of 1024"):
        small.decode([0, bad])


def test_batch_equals_one_by_one(small):
    assert small.encode_batch(iter(TORTURE)) == [small.encode(text) for text in TORTURE]


def test_long_runs(small):
    """At the bound ids are tiktoken's own; beyond it, where tiktoken panics, text comes back whole."""
    at_bound = "\n" + " " * LONGEST_BLANK + "x"
    newline_ends = " " * (LONGEST_BLANK + 5) + "\n"
    assert list(pieces(newline_ends)) == [newline_ends]
    assert small.encode(at_bound) == small._encoding.encode_ordinary(at_bound)
    beyond = "word" + "\u3000 " * (LONGEST_BLANK // 2 + 5) + "word <|eot_id|>"
    assert [len(piece) for piece in pieces(beyond)] == [LONGEST_BLANK + 4, 25]
    assert small.decode(small.encode(beyond)) == small.decode(small.encode(beyond, specials="allow")) == beyond
    assert train([beyond], 513).vocab_size == 513


# ---- training ----


def test_training_is_deterministic_and_blind_to_order(small):
    assert train(SOURCE, 1024).tokens == train(reversed(SOURCE), 1024).tokens == small.tokens
    assert train(SOURCE[:-1], 1024).fingerprint != small.fingerprint


def test_every_merge_joins_a_most_frequent_pair(small):
    """Replay: BPE written out over the words of Llama 3's split, one merge at a time."""
    words = Counter(
        tuple(bytes([byte]) for byte in word.encode()) for text in SOURCE for word in regex.findall(PATTERN, text)
    )
    for token in small.tokens[256:400]:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, count in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += count
        best = max(pairs.values())
        (pair,) = [pair for pair in pairs if pair[0] + pair[1] == token]
        assert pairs[pair] == best
        words = Counter({_join(word, pair): count for word, count in words.items()})


def _join(word: tuple[bytes, ...], pair: tuple[bytes, bytes]) -> tuple[bytes, ...]:
    out: list[bytes] = []
    i = 0
    while i < len(word):
        if word[i : i + 2] == pair:
            out.append(pair[0] + pair[1])
            i += 2
        else:
            out.append(word[i])
            i += 1
    return tuple(out)


def test_smallest_vocabulary():
    assert train([], 512).tokens == [bytes([i]) for i in range(256)]
    with pytest.raises(ValueError, match=r"vocab_size 511 is too small.*512"):
        train(SOURCE, 511)


def test_text_too_small_says_how_many_merges_it_gives():
    with pytest.raises(ValueError, match=r"gives only 5 of the 100 merges.*at most 517"):
        train(["hello hello hello"], 612)
    assert train(["hello hello hello"], 517).vocab_size == 517


def test_no_token_grows_beyond_its_bound():
    """Words of more than 1,024 bytes count as slices of that length: one `a` doubles ten times, never eleven."""
    assert max(map(len, train(["a" * 4096], 522).tokens)) == 1024
    with pytest.raises(ValueError, match=r"gives only 10 of the 11 merges.*at most 522"):
        train(["a" * 4096], 523)
    with pytest.raises(ValueError, match="token of 2048 bytes"):
        Tokenizer([*(bytes([byte]) for byte in range(256)), b"a" * 2048])


# ---- files ----


def test_save_and_load(saved, shared_data):
    tokenizer, folder = saved
    for path in (folder, str(folder / "tokenizer.model")):
        again = Tokenizer.load(path)
        assert again.fingerprint == tokenizer.fingerprint and again.specials == tokenizer.specials
    assert sorted(path.name for path in folder.iterdir()) == [
        "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
    ]  # fmt: skip
    if tokenizer.vocab_size == 128_256:
        meta = shared_data / "tokenizers" / "llama3_tokenizer.model"
        assert (folder / "tokenizer.model").read_bytes() == meta.read_bytes()


def test_a_save_that_dies_leaves_the_old_files_whole(small, tmp_path, monkeypatch):
    small.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        train(SOURCE, 600).save(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def _lines(small: Tokenizer, folder: Path) -> list[bytes]:
    small.save(folder)
    return (folder / "tokenizer.model").read_bytes().splitlines(keepends=True)


DAMAGE = {
    "truncated": lambda lines: b"".join(lines)[:-4],
    "rank gap": lambda lines: b"".join(lines[:300] + lines[301:]),
    "rank twice": lambda lines: b"".join([*lines[:300], lines[299], *lines[300:]]),
    "token twice": lambda lines: b"".join([*lines[:-1], lines[0].split()[0] + b" 767\n"]),
    "no such byte": lambda lines: b"".join([b"TFBZVw== 0\n", *lines[1:]]),
    "only some bytes": lambda lines: b"".join(lines[:200]),
    "absurd rank": lambda lines: b"IQ== " + b"9" * 5000,
    "absurd token": lambda lines: b"".join([*lines[:-1], b"QUFB" * 500 + b" 767\n"]),
    "garbage": lambda lines: bytes(range(256)) * 9,
    "text": lambda lines: b"version https://git-lfs.github.com/spec/v1\n",
    "empty token": lambda lines: b" 0\n",
    "empty": lambda lines: b"",
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_file_is_one_clear_line(small, tmp_path, kind):
    lines = _lines(small, tmp_path)
    path = tmp_path / "damaged.model"
    path.write_bytes(b"".join(lines))
    assert Tokenizer.load(path).fingerprint == small.fingerprint
    path.write_bytes(DAMAGE[kind](lines))
    with pytest.raises(ValueError) as error:
        Tokenizer.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 300


def test_missing_and_oversized_files(tmp_path):
    for path, named in ((tmp_path / "none", "none"), (tmp_path, "tokenizer.model")):
        with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))}.*{named}: no such file"):
            Tokenizer.load(path)
    with (tmp_path / "tokenizer.model").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match="more than 64 MiB"):
        Tokenizer.load(tmp_path)


# ---- transformers ----


def _hugging_face(folder: Path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_transformers_gives_equal_ids_and_text(saved):
    tokenizer, folder = saved
    theirs = _hugging_face(folder)
    assert len(theirs) == tokenizer.vocab_size
    assert theirs.convert_tokens_to_ids(list(SPECIALS)) == [tokenizer.specials[name] for name in SPECIALS]
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert theirs.pad_token_id == tokenizer.pad_id
    assert theirs.clean_up_tokenization_spaces is False  # transformers 4 would drop blanks before marks
    for text in TORTURE:
        ids = tokenizer.encode(text, bos=True)
        assert theirs(text)["input_ids"] == ids, text
        assert theirs.decode(ids[1:]) == text
        assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids, skip_special=True)


@pytest.mark.parametrize("mutant", ["split", "merges", "bos"])
def test_transformers_check_can_fail(small, tmp_path, mutant):
    small.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    tokenizer = json.loads(file.read_bytes())
    if mutant == "split":
        tokenizer["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\S+|\s+"
    elif mutant == "merges":
        tokenizer["model"].update(merges=tokenizer["model"]["merges"][::-1], ignore_merges=False)
    else:
        tokenizer["post_processor"]["processors"].pop()
    file.write_text(json.dumps(tokenizer))
    theirs = _hugging_face(tmp_path)
    assert any(theirs(text)["input_ids"] != small.encode(text, bos=True) for text in TORTURE)


def test_a_models_config_beside_it_changes_nothing(small, tmp_path):
    small.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    theirs = _hugging_face(tmp_path)
    assert [theirs(text)["input_ids"] for text in TORTURE] == [small.encode(text, bos=True) for text in TORTURE]


# ---- llama.cpp ----


def test_gguf_fields_are_whole(small):
    fields = emit.gguf_fields(small)
    tokens = fields["tokenizer.ggml.tokens"]
    assert len(tokens) == len(set(tokens)) == len(fields["tokenizer.ggml.token_type"]) == small.vocab_size
    assert fields["tokenizer.ggml.token_type"].count(3) == 256
    joined = {merge.replace(" ", "") for merge in fields["tokenizer.ggml.merges"]}
    assert joined == set(tokens[256:-256]) and all(merge.count(" ") == 1 for merge in fields["tokenizer.ggml.merges"])
    assert tokens[fields["tokenizer.ggml.eot_token_id"]] == "<|eot_id|>"

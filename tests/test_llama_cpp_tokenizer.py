"""Layer: parity of the tokenizer's ids with llama.cpp's, from the GGUF fields alone. Peer lane."""

import random
import re
from pathlib import Path

import gguf
import pytest

from llamita.tokenizer import Tokenizer, emit
from llamita.tokenizer.llama3 import SPECIALS
from llamita.tokenizer.train import train
from tests import llama_cpp_peer
from tests.llama_cpp_peer import LlamaCpp
from tests.test_tokenizer import SOURCE, TORTURE

pytestmark = pytest.mark.peer

# Known difference 1. llama.cpp v0.5.0 has the tables of Unicode 15.1, tiktoken 0.14.0 (Rust's regex) those of
# 16.0. What 16.0 brought in is a letter or a number to us and to Meta's code, and nothing yet to llama.cpp.
UNICODE_16 = {
    "Cyrillic, Tje": (0x1C89, 0x1C8A),
    "Latin, rams horn to s with diagonal stroke": (0xA7CB, 0xA7CD),
    "Latin, lambda": (0xA7DA, 0xA7DC),
    "Todhri": (0x105C0, 0x105F3),
    "Garay digits and capitals": (0x10D40, 0x10D65),
    "Garay small letters": (0x10D6F, 0x10D85),
    "Arabic Extended-C": (0x10EC2, 0x10EC4),
    "Tulu-Tigalari, a to ii": (0x11380, 0x11389),
    "Tulu-Tigalari, ee": (0x1138B, 0x1138B),
    "Tulu-Tigalari, ai": (0x1138E, 0x1138E),
    "Tulu-Tigalari, oo to lla": (0x11390, 0x113B5),
    "Tulu-Tigalari, avagraha": (0x113B7, 0x113B7),
    "Tulu-Tigalari, repha": (0x113D1, 0x113D1),
    "Tulu-Tigalari, pluta": (0x113D3, 0x113D3),
    "Myanmar Extended-C": (0x116D0, 0x116E3),
    "Sunuwar letters": (0x11BC0, 0x11BE0),
    "Sunuwar digits": (0x11BF0, 0x11BF9),
    "Egyptian Hieroglyphs Extended-A": (0x13460, 0x143FA),
    "Gurung Khema letters": (0x16100, 0x1611D),
    "Gurung Khema digits": (0x16130, 0x16139),
    "Kirat Rai letters": (0x16D40, 0x16D6C),
    "Kirat Rai digits": (0x16D70, 0x16D79),
    "Khitan Small Script, 18CFF": (0x18CFF, 0x18CFF),
    "Outlined digits": (0x1CCF0, 0x1CCF9),
    "Ol Onal letters": (0x1E5D0, 0x1E5ED),
    "Ol Onal sign and digits": (0x1E5F0, 0x1E5FA),
}
NEWER = {point for first, last in UNICODE_16.values() for point in range(first, last + 1)}
# Known difference 2. Case folding makes s of the long s, so `(?i:'s)` matches it; llama.cpp only lowers case.
LONG_S = 0x17F
# Known difference 3. For every vocabulary with this split llama.cpp tidies the text of a list of ids, and no GGUF
# field turns that off: it takes the space out of " ." and " 's". One token at a time, as it generates, it does not.
TIDIED = re.compile(r" [?!.,']")

BLANKS = " \t\n\r\x0b\x0c\x85\xa0\u1680\u2003\u2028\u2029\u202f\u205f\u3000\x1c\x1d\x1e\x1f\u200b\ufeff\u180e"
MARKS = "'.,;:!?-_()[]{}<>|/\\@#$%^&*+=~\"`\u2019\u2014\u3002\u060c\u0964\u20ac\u00ab"
DIGITS = "0123456789\u0663\u0967\u0e53\uff11\u2167\u00bd\u00b2\U0001d7d8"
EMOJI = "\U0001f600\U0001f468\U0001f469\U0001f3fb\U0001f1e9\U0001f1ea\u200d\ufe0f\u2764\u2728"
CONTRACTIONS = [
    "'s", "'S", "'t", "'T", "'re", "'RE", "'rE", "'ve", "'Ve", "'vE", "'m", "'M", "'ll", "'LL", "'lL", "'Ll", "'d",
    "'D", "'l", "'r", "'v", "''s", "''", "\u2019s", "'\u017f",
]  # fmt: skip
SCRIPTS = {
    "Latin": (0x41, 0x250), "marks": (0x300, 0x370), "Greek": (0x370, 0x400), "Cyrillic": (0x400, 0x530),
    "Armenian and Hebrew": (0x530, 0x600), "Arabic": (0x600, 0x700), "Indic": (0x900, 0xE00), "Thai": (0xE01, 0xE5C),
    "Georgian and Jamo": (0x10A0, 0x1200), "Ethiopic": (0x1200, 0x1380), "Khmer": (0x1780, 0x1800),
    "kana": (0x3041, 0x3100), "Han": (0x4E00, 0xA000), "Hangul": (0xAC00, 0xD7A4), "fullwidth": (0xFF00, 0xFFF0),
    "controls": (0, 0x20), "more controls": (0x7F, 0xA0), "symbols": (0x2070, 0x2C00), "emoji": (0x1F300, 0x1FB00),
    "Gothic to Deseret": (0x10330, 0x10450), "mathematics": (0x1D400, 0x1D800), "Han, plane 2": (0x20000, 0x2A000),
}  # fmt: skip


def gguf_file(fields: dict, path: Path) -> Path:
    """A file of metadata alone, as llama.cpp's own ggml-vocab-*.gguf are."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in fields.items():
        kind = {list: "array", bool: "bool", int: "uint32", str: "string"}[type(value)]
        getattr(writer, f"add_{kind}")(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module", params=["self-trained", "Meta's"])
def tokenizer(request) -> Tokenizer:
    if request.param == "self-trained":
        return train(SOURCE, 1024)
    return Tokenizer.load(request.getfixturevalue("shared_data") / "tokenizers" / "llama3_tokenizer.model")


@pytest.fixture(scope="module")
def peer(tokenizer, tmp_path_factory) -> LlamaCpp:
    return LlamaCpp(gguf_file(emit.gguf_fields(tokenizer), tmp_path_factory.mktemp("gguf") / "vocab.gguf"))


def unequal(tokenizer: Tokenizer, peer: LlamaCpp, texts: list[str]) -> list[str]:
    """The texts whose ids are not llama.cpp's."""
    return [a for a, b, c in zip(texts, tokenizer.encode_batch(texts), peer.tokenize(texts), strict=True) if b != c]


def test_hand_picked_texts(tokenizer, peer):
    assert unequal(tokenizer, peer, TORTURE) == []


def test_text_of_ids(tokenizer, peer):
    texts = [text for text in TORTURE if not TIDIED.search(text)]
    assert len(texts) >= len(TORTURE) - 3
    assert peer.detokenize(tokenizer.encode_batch(texts)) == texts
    assert peer.detokenize([tokenizer.encode("a , b . c 's d")]) == ["a, b. c's d"]


def test_vocabulary_and_special_tokens(tokenizer, peer):
    specials = list(tokenizer.specials.values())
    assert (peer.bos, peer.eos, peer.eot) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eot_id)
    assert peer.n_vocab == tokenizer.vocab_size and peer.add_bos is True
    assert peer.eog == tokenizer.stop_ids
    assert peer.control == specials
    assert peer.tokenize(["".join(SPECIALS), "a<|eot_id|> b"], special=True) == [
        specials, [*tokenizer.encode("a"), tokenizer.eot_id, *tokenizer.encode(" b")]
    ]  # fmt: skip
    assert peer.detokenize([specials]) == ["".join(SPECIALS)]


def _fuzz(tokenizer: Tokenizer, count: int) -> list[str]:
    """Strings of up to 25 scraps: contractions, tokens in a row, one character of any kind, runs from one script."""
    chance = random.Random(20240418)
    points = [point for point in range(0x110000) if point not in NEWER and not 0xD800 <= point < 0xE000]
    pools = [BLANKS, BLANKS, MARKS, DIGITS, DIGITS, EMOJI]
    pools += ["".join(map(chr, range(*script))) for script in SCRIPTS.values()]

    def scrap() -> str:
        kind = chance.random()
        if kind < 0.2:
            return chance.choice(CONTRACTIONS) + chance.choice(["", "x", "S", " "])
        if kind < 0.5:
            return b"".join(chance.choices(tokenizer.tokens, k=chance.randint(1, 5))).decode("utf-8", "ignore")
        if kind < 0.6:
            return chr(chance.choice(points))
        return "".join(chance.choices(chance.choice(pools), k=chance.choice([1, 1, 2, 3, 9, 40])))

    texts = ["".join(scrap() for _ in range(chance.randint(1, 25))) for _ in range(count)]
    texts += [letters * (100_000 // len(letters)) for letters in ("x", "ab", "\u00e9", "\u4e2d", "\U00010400")]
    texts += ["".join(chance.choices(letters, k=100_000)) for letters in ("etaoinshrdlu", "ab", "0123456789", BLANKS)]
    return texts


def test_fuzz(tokenizer, peer):
    texts = [text for text in _fuzz(tokenizer, 800) if NEWER.isdisjoint(map(ord, text))]
    assert len(texts) > 790 and len(set(texts)) > 700 and max(map(len, texts)) == 100_000
    assert unequal(tokenizer, peer, texts) == []


def _telltale() -> Tokenizer:
    """A vocabulary in which any character joins an `a` before it or a 1, ! or z behind it, if the split lets it."""
    one = [bytes([byte]) for byte in range(256)]
    joined = [b"a" + byte for byte in one] + [byte + after for byte in one for after in (b"1", b"!", b"z")]
    return Tokenizer(list(dict.fromkeys(one + joined)))


def test_every_code_point(tmp_path):
    """Letter, number, blank or other, and what case folding makes of it: all as in llama.cpp but those listed."""
    tokenizer = _telltale()
    peer = LlamaCpp(gguf_file(emit.gguf_fields(tokenizer), tmp_path / "vocab.gguf"))

    def line(point: int) -> str:
        return "a{0}\n{0}1\n{0}!\n'{0}z\n'l{0}z\n".format(chr(point))

    starts = [start for start in range(0, 0x110000, 64) if not 0xD800 <= start < 0xE000]
    blocks = {"".join(map(line, range(start, start + 64))): start for start in starts}
    suspects = [start + i for block, start in blocks.items() for i in range(64)]
    assert len(suspects) == 0x110000 - 2048
    odd = unequal(tokenizer, peer, list(blocks))
    lines = {line(point): point for block in odd for point in range(blocks[block], blocks[block] + 64)}
    assert {lines[text] for text in unequal(tokenizer, peer, list(lines))} == NEWER | {LONG_S}


@pytest.mark.parametrize("mutant", ["split", "merges", "types"])
def test_these_checks_can_fail(tokenizer, mutant, tmp_path):
    fields = emit.gguf_fields(tokenizer)
    if mutant == "split":
        fields["tokenizer.ggml.pre"] = "gpt-2"
    elif mutant == "merges":
        fields["tokenizer.ggml.merges"].reverse()
    else:
        fields["tokenizer.ggml.token_type"] = [1] * tokenizer.vocab_size
    peer = LlamaCpp(gguf_file(fields, tmp_path / "vocab.gguf"))
    if mutant == "types":
        assert peer.control != list(tokenizer.specials.values())
    else:
        assert unequal(tokenizer, peer, TORTURE) != []


def test_where_it_is_not_installed_the_reason_says_how(monkeypatch, tmp_path):
    monkeypatch.setattr(llama_cpp_peer, "LIBRARY", tmp_path / "none")
    with pytest.raises(pytest.skip.Exception, match=r"make \.venv/peers"):
        LlamaCpp(tmp_path / "vocab.gguf")

"""Ids of whole corpora, exactly `Tokenizer.encode`'s, on all cores: through gigatoken where it is installed.

Five to twenty times as fast as tiktoken on a first pass (LOG.md, `benchmarks/tokenizer_encode.py`).
"""

import json
import mmap
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import chain
from typing import Any

import numpy as np
from numba import njit

from llamita.tokenizer import emit
from llamita.tokenizer.llama3 import LONGEST_BLANK, NUM_SPECIALS, Tokenizer, pieces

# gigatoken keeps every word it has met, in a table for each thread, and offers no way to forget: only a new engine
# (0.37 s) frees them, and the work space of a huge word, 22 times its size. So the resident memory that its calls leave
# behind is added up, and beyond KEPT_BYTES the engine is renewed; at worst, while its tables double, it holds about
# twice as much for a moment. Real text leaves 8 MB (English) to 116 MB (513 languages) in 12 million tokens.
KEPT_BYTES = 256 * 2**20
# Where the system does not tell its resident memory: tokens after which random words of five letters leave 295 MB.
KEPT_TOKENS = 12_000_000
# Characters in one call: gigatoken is faster on more, tiktoken is not, and its lists take 40 bytes a token.
FAST_SLICE, SLOW_SLICE = 2**25, 2**22

# Unassigned but for planes 0 to 3 and the tags and variation selectors of plane 14; planes 15 and 16 are private.
_PROBED = [*range(0xD800), *range(0xE000, 0x40000), *range(0xE0000, 0xE1000)]
_BLOCK = 256
# What `_strangers` finds, by the versions of gigatoken and tiktoken: the trial takes a second. (tests/test_bulk.py)
_FOUND = {
    ("0.10.0", "0.14.0"): (
        "88f c5c cdc a7ce-a7cf a7d2 a7d4 a7f1 10940-10959 10ec5-10ec7 11db0-11ddb 11de0-11de9 16ea0-16eb8 16ebb-16ed3 "
        "16ff2-16ff6 187f8-187ff 18d09-18d1e 18d80-18df2 1e6c0-1e6de 1e6e0-1e6e2 1e6e4-1e6e5 1e6e7-1e6ed 1e6f0-1e6f4 "
        "1e6fe-1e6ff 2b73a-2b73f 2cea2-2cead 323b0-33479"
    ),
}

_TRIAL = [
    "",
    "it's IT'S we'Ll 'tis don\u2019t 's 'S \u017f'\u017f y\u2019all'd've 'sx ''re",
    " a  b   c\td\n\n \n\t e\r\n\r\n  \u3000\u00a0\u2028x\u0085 \x0b\x0c \x1c\x1f  ",
    "def f(x):\n        return {**x}  # 1234567890 3.14 0x7f != \u0663\u0664\u0665\u0666 \u2167\u00bd\u00b2",
    "e\u0301 \u0130I\u0131i \u1e9e\u00df \ufb01 \u01c5 \u0e19\u0e49\u0e33 \u0939\u093f\u0928\u094d \u4e2d\u6587\u3002",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\U0001f1e9\U0001f1ea\u2764\ufe0f1\ufe0f\u20e3 \x00\x7f\ufeff\ufffd",
    "<|begin_of_text|>a<|eot_id|> <|end_of_text|><|endoftext|><s>",
    "=" * 300 + " " * 300 + "\n" * 300 + "xyz" * 300 + "7" * 300,
]  # fmt: skip

Rows = tuple[np.ndarray, np.ndarray]


def _engine_json(whole: dict[str, Any]) -> bytes:
    """A tokenizer.json without special tokens: gigatoken always finds them in text, where `encode` never does."""
    return json.dumps({**whole, "added_tokens": [], "post_processor": None}, ensure_ascii=False).encode()


def _saved_engine_json(saved: bytes) -> bytes:
    """The same of a file that `emit` wrote: its last field, 8 MB of vocabulary and merges, is taken over unread."""
    head, field, model = saved.partition(b'"model": ')
    return _engine_json(json.loads(head + field + b"null}")).removesuffix(b"null}") + model


def _by_gigatoken(engine: Any, texts: list[str]) -> Rows:
    if not texts:
        return np.zeros(0, np.uint32), np.zeros(0, np.int64)
    layout = engine.encode_batch(texts).layout
    return np.asarray(layout.content.data), np.diff(np.asarray(layout.offsets.data))


def _one_by_one(engine: Any, texts: list[str]) -> Rows:
    """The same on this thread, without awkward, which gigatoken hands batches over in: 50 MB of modules."""
    rows = [engine.encode(text) for text in texts]
    return np.concatenate([np.zeros(0, np.uint32), *rows]), np.fromiter(map(len, rows), np.int64, len(rows))


def _by_tiktoken(tokenizer: Tokenizer, texts: list[str]) -> Rows:
    rows = tokenizer.encode_batch(texts)
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    return np.fromiter(chain.from_iterable(rows), np.uint32, lengths.sum()), lengths


def _differing(texts: list[str], one: Rows, other: Rows) -> list[int]:
    """Numbers of the texts for which the two disagree."""
    rows = (np.split(ids, np.cumsum(lengths)[:-1]) for ids, lengths in (one, other))
    return [i for i, (a, b) in enumerate(zip(*rows, strict=True)) if not np.array_equal(a, b)]


def _strangers(from_json: Callable[[bytes], Any]) -> np.ndarray:
    """(0x110000,) bool: the code points that the engines split in different ways, and those not tried.

    gigatoken 0.10.0 knows the letters and digits of Unicode 17, tiktoken 0.14.0 those of Unicode 16: 4,657 code
    points differ, U+088F and U+11DE0 among them. The vocabulary of this trial shows where a word begins and ends:
    it joins "." to the first byte of what follows, and "a" to the last byte of what precedes.
    """
    seams = [b"." + bytes([lead]) for lead in range(0xC2, 0xF5)] + [bytes([last]) + b"a" for last in range(0x80, 0xC0)]
    tokenizer = Tokenizer([*(bytes([byte]) for byte in range(256)), *seams])
    engine = from_json(_engine_json(emit.tokenizer_json(tokenizer)))

    def differing(texts: list[str]) -> list[int]:
        return _differing(texts, _by_gigatoken(engine, texts), _by_tiktoken(tokenizer, texts))

    trials = [f".{char}ab\n'{char}a\n" for char in map(chr, _PROBED)]
    blocks = [trials[i : i + _BLOCK] for i in range(0, len(trials), _BLOCK)]
    suspects = [i * _BLOCK + j for i in differing(["".join(block) for block in blocks]) for j in range(len(blocks[i]))]
    guilty = differing([trials[i] for i in suspects]) if suspects else []
    return _all_but_probed([_PROBED[suspects[i]] for i in guilty])


def _all_but_probed(strangers: list[int]) -> np.ndarray:
    """(0x110000,) bool"""
    strange = np.ones(0x110000, bool)
    strange[_PROBED] = False
    strange[strangers] = True
    return strange


def _known_strangers(spans: str) -> np.ndarray:
    """`_strangers` from an entry of _FOUND."""
    ends = ([int(end, 16) for end in span.split("-")] for span in spans.split())
    return _all_but_probed([code for span in ends for code in range(span[0], span[-1] + 1)])


def _suspects(tokens: list[bytes], strange: np.ndarray) -> np.ndarray:
    """(vocab_size,) bool: the tokens that hold the first byte of a stranger and all of the rest they have room for."""
    codes = np.flatnonzero(strange)
    kinds = {2: (0x80, 0x800, 0x1F), 3: (0x800, 0x10000, 0x0F), 4: (0x10000, 0x110000, 0x07)}
    starts = {}  # by the character's width and how many of its bytes are there: what those bytes say of the code
    for width, (low, high, mask) in kinds.items():
        of_width = codes[(codes >= low) & (codes < high)]
        for there in range(1, width + 1):
            begins = np.zeros(mask + 1 << 6 * (there - 1), bool)
            begins[of_width >> 6 * (width - there)] = True
            starts[width, there] = begins.tobytes()

    def suspect(token: bytes) -> bool:
        for at, lead in enumerate(token):
            if lead >= 0xC0:
                width = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
                piece = token[at : at + width]
                said = lead & kinds[width][2]
                for byte in piece[1:]:
                    said = said << 6 | byte & 0x3F
                if starts[width, len(piece)][said]:
                    return True
        return False

    return np.array([not token.isascii() and suspect(token) for token in tokens] + [False] * NUM_SPECIALS)


@njit(nogil=True, cache=True)
def _any(suspect, ids):
    """`suspect[ids].any()`, which takes six times as long: it makes two arrays of the size of the text."""
    found = False
    for i in ids:
        found |= suspect[i]
    return found


def _resident() -> int:
    """Bytes of memory this process holds; 0 where the system has no /proc."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * mmap.PAGESIZE
    except OSError:
        return 0


def _slices(texts: list[str], most: int) -> Iterator[list[str]]:
    """`texts` in order, `most` characters or one text at a time; one empty list where there are none."""
    start = size = 0
    for at, text in enumerate(texts):
        if size and size + len(text) > most:
            yield texts[start:at]
            start, size = at, 0
        size += len(text)
    yield texts[start:]


class Bulk:
    """`tokenizer.encode` for many texts at a time. One thread may use it at a time.

    `engine` is "gigatoken", or "tiktoken" where gigatoken is not installed or fails its trial; `why` then gives
    the reason, else "". Making one takes about a second with Meta's vocabulary, half of it where `saved`, the
    tokenizer.json that `Tokenizer.save` wrote, is at hand. `all_cores=False` for a process that is one of many.
    """

    def __init__(self, tokenizer: Tokenizer, saved: bytes = b"", *, all_cores: bool = True):
        self.tokenizer = tokenizer
        self._ids_of = _by_gigatoken if all_cores else _one_by_one
        self._fast: Any = None
        self.why = self._begin(saved)
        if self.why:
            self._fast = None
        self.engine = "tiktoken" if self.why else "gigatoken"

    def _begin(self, saved: bytes) -> str:
        """Build gigatoken's engine and hold it against tiktoken; what speaks against it, or ""."""
        try:
            from gigatoken import Tokenizer as Gigatoken
        except ImportError:
            return "gigatoken is not installed; run: pip install 'llamita[fast]'"
        self._from_json: Callable[[bytes], Any] = Gigatoken.from_json
        tokens = self.tokenizer.tokens
        blocks = (b"\n".join(tokens[i : i + _BLOCK]) for i in range(0, len(tokens), _BLOCK))
        texts = [*_TRIAL, *(block.decode(errors="ignore") for block in blocks)]
        try:
            found = _FOUND.get((version("gigatoken"), version("tiktoken")))
            self._strange = _known_strangers(found) if found else _strangers(self._from_json)
            self._suspect = _suspects(self.tokenizer.tokens, self._strange)
            self._json = _saved_engine_json(saved) if saved else _engine_json(emit.tokenizer_json(self.tokenizer))
            self._renew()
            wrong = _differing(texts, self._encode(texts), _by_tiktoken(self.tokenizer, texts))
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # a panic in Rust is no Exception
            return f"gigatoken failed its trial: {error!r}"
        if self._strange[:128].any():
            return "gigatoken splits ASCII in another way than tiktoken"
        return f"gigatoken gives other ids than tiktoken for {texts[wrong[0]][:80]!r}" if wrong else ""

    def _renew(self) -> None:
        self._fast = None  # the old one goes first: there are never two
        self._fast = self._from_json(self._json)
        self._kept = 0.0  # share of the bound that is taken

    def encode(self, texts: list[str]) -> Rows:
        """Ids of all texts, one after another, (N,) uint32, and how many each has, (len(texts),) int64.

        Names of special tokens are plain text; no BOS or EOS is added.
        """
        if self.why:
            parts = [_by_tiktoken(self.tokenizer, part) for part in _slices(texts, SLOW_SLICE)]
        else:
            parts = [self._encode_or_not(part) for part in _slices(texts, FAST_SLICE)]
        if len(parts) == 1:
            return parts[0]
        return np.concatenate([ids for ids, _ in parts]), np.concatenate([lengths for _, lengths in parts])

    def _encode_or_not(self, texts: list[str]) -> Rows:
        """By gigatoken; by tiktoken what it fails at."""
        try:
            return self._encode(texts)
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException:  # a panic in Rust is no Exception, and no text may end a run of hours
            self._renew()
            return _by_tiktoken(self.tokenizer, texts)

    def _encode(self, texts: list[str]) -> Rows:
        before = _resident()
        try:
            ids, lengths = self._ids_of(self._fast, texts)
            slow = self._for_tiktoken(texts, ids, lengths)
        except TypeError:  # a surrogate is in one of them
            slow = [i for i, text in enumerate(texts) if self._is_strange(text)]
            without = ["" if i in set(slow) else text for i, text in enumerate(texts)]
            ids, lengths = self._ids_of(self._fast, without)
        grown = _resident() - before - ids.nbytes
        self._kept += max(0, grown) / KEPT_BYTES if before else len(ids) / KEPT_TOKENS
        if self._kept > 1:
            self._renew()
        return self._replaced(texts, slow, ids, lengths) if slow else (ids, lengths)

    def _for_tiktoken(self, texts: list[str], ids: np.ndarray, lengths: np.ndarray) -> list[int]:
        """Numbers of the texts with a stranger, or with blanks that `encode` cuts and gigatoken does not.

        Their ids tell which texts may hold a stranger at all: looking at every character took a third of the time.
        """
        asked = {i for i, text in enumerate(texts) if len(text) > LONGEST_BLANK}
        if _any(self._suspect, ids):
            asked |= set(np.searchsorted(np.cumsum(lengths), np.flatnonzero(self._suspect[ids]), side="right").tolist())
        return [i for i in sorted(asked) if self._is_strange(texts[i])]

    def _replaced(self, texts: list[str], slow: list[int], ids: np.ndarray, lengths: np.ndarray) -> Rows:
        """The rows with those numbered `slow` encoded by tiktoken."""
        slow_ids, slow_lengths = _by_tiktoken(self.tokenizer, [texts[i] for i in slow])
        kept = np.ones(len(texts), bool)
        kept[slow] = False
        lengths = lengths.copy()
        ids = ids[np.repeat(kept, lengths)]
        lengths[slow] = 0
        ids = np.insert(ids, np.repeat(np.cumsum(lengths)[slow], slow_lengths), slow_ids)
        lengths[slow] = slow_lengths
        return ids, lengths

    def _is_strange(self, text: str) -> bool:
        """Whether `text` has a stranger or a surrogate in it, or blanks that `encode` cuts and gigatoken does not."""
        if len(text) > LONGEST_BLANK and len(next(pieces(text))) < len(text):
            return True
        if text.isascii():
            return False
        return bool(self._strange[np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)].any())

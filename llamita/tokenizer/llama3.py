"""The Llama 3 tokenizer: tiktoken ranks, Llama 3's split, 256 special tokens.

A vocabulary of n ranks has ids 0 .. n-1 for byte strings in merge order and n .. n+255 for the special
tokens, in the order of Meta's text models (arXiv 2407.21783, section 3.2; Llama 3.1's names).
"""

import binascii
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Literal

import tiktoken

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

NUM_SPECIALS = 256
_NAMED = [
    "begin_of_text",
    "end_of_text",
    "reserved_special_token_0",
    "reserved_special_token_1",
    "finetune_right_pad_id",
    "step_id",
    "start_header_id",
    "end_header_id",
    "eom_id",
    "eot_id",
    "python_tag",
]
_RESERVED = [f"reserved_special_token_{2 + i}" for i in range(NUM_SPECIALS - len(_NAMED))]
SPECIALS = tuple(f"<|{name}|>" for name in _NAMED + _RESERVED)
_SPECIAL = re.compile("|".join(map(re.escape, SPECIALS)))

FILE_NAME = "tokenizer.model"
MAX_FILE_BYTES = 64 * 2**20  # Meta's 128,000 ranks take 2.2 MB
MAX_TOKEN_BYTES = 1024  # Meta's longest token has 128; merges are derived in time quadratic in this

_TEXTS_PER_TASK = 32  # sentences alone in a task cost half the speed (measured)

# The regex engine of tiktoken 0.14.0 and rustbpe 0.1.0 panics on one blank more than this in a run that no
# newline ends (measured); runs of every other kind are walked at any length, in time about linear.
LONGEST_BLANK = 999_998
_BLANK = r"[^\S\x1c-\x1f]"  # Unicode's White_Space: Python's \s adds four separators to it
_LONG_BLANK = re.compile(rf"(?<!{_BLANK})[^\S\r\n\x1c-\x1f]{{{LONGEST_BLANK + 1},}}(?!{_BLANK})")


def pieces(text: str) -> Iterator[str]:
    """`text` whole, but for runs of more than LONGEST_BLANK blanks, which come in slices of that length.

    So ids equal plain tiktoken's wherever plain tiktoken gives any.
    """
    start = 0
    if len(text) > LONGEST_BLANK:
        for run in _LONG_BLANK.finditer(text):
            for cut in range(run.start() + LONGEST_BLANK, run.end(), LONGEST_BLANK):
                yield text[start:cut]
                start = cut
    yield text[start:]


def is_partial(token: bytes) -> bool:
    """Whether `token` is no UTF-8 on its own: a part of a character."""
    try:
        token.decode()
    except UnicodeDecodeError:
        return True
    return False


def check_chat_format(name: str) -> None:
    """ValueError for a dialog format that `chat.render` does not write."""
    if name not in ("llama3", "llama3.1"):
        raise ValueError(f"no dialog format is called {name!r}; there are: llama3, llama3.1")


def _chat_format(config: Path) -> str:
    """The dialog format of a tokenizer_config.json, "llama3" where there is none."""
    from llamita.tokenizer.chat import format_of  # chat.py needs this module first

    if not config.is_file():
        return "llama3"
    if config.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"{config}: more than {MAX_FILE_BYTES // 2**20} MiB, so no tokenizer_config.json")
    try:
        template = json.loads(config.read_bytes()).get("chat_template")
    except (ValueError, RecursionError, AttributeError) as error:
        raise ValueError(f"{config}: not a JSON object: {error}") from None
    return format_of(template if isinstance(template, str) else "")


class Tokenizer:
    """Ids for text and text for ids.

    `tokens[rank]` holds the bytes of an ordinary id; `specials` maps the 256 names to the ids behind them;
    `chat_format` names the dialog format that `chat.render` writes: "llama3" or "llama3.1"; `adds_bos` says that
    a text begins with BOS.
    ValueError if a byte is without a token, if tokens repeat, or if one is longer than MAX_TOKEN_BYTES.
    """

    adds_bos = True

    def __init__(self, tokens: Sequence[bytes], chat_format: str = "llama3"):
        ranks = {token: rank for rank, token in enumerate(tokens)}
        if len(ranks) != len(tokens):
            again = next(token for rank, token in enumerate(tokens) if ranks[token] != rank)
            raise ValueError(f"the vocabulary holds the token {again[:40]!r} twice; each needs one rank")
        for byte in range(256):
            if bytes([byte]) not in ranks:
                raise ValueError(f"the vocabulary lacks the single byte {byte:#04x}; all 256 must be tokens")
        longest = max(map(len, tokens))
        if longest > MAX_TOKEN_BYTES:
            raise ValueError(
                f"the vocabulary holds a token of {longest} bytes; {MAX_TOKEN_BYTES} is the most, "
                "so take long runs of one character out of the text it is trained on"
            )
        check_chat_format(chat_format)
        self.tokens = list(tokens)
        self.chat_format = chat_format
        self.specials = {name: len(tokens) + i for i, name in enumerate(SPECIALS)}
        self.vocab_size = len(tokens) + NUM_SPECIALS
        self.bos_id = self.specials["<|begin_of_text|>"]
        self.eos_id = self.specials["<|end_of_text|>"]
        self.eot_id = self.specials["<|eot_id|>"]
        self.pad_id = self.specials["<|finetune_right_pad_id|>"]
        self.stop_ids = frozenset((self.eos_id, self.specials["<|eom_id|>"], self.eot_id))
        self._encoding = tiktoken.Encoding(
            "llama3", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=self.specials
        )

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """From a folder that holds tokenizer.model, or from such a file (Meta's own too).

        The dialog format is the one of the folder's tokenizer_config.json, "llama3" where there is none.
        ValueError if there is none or if it is not a whole file of `base64 rank` lines in order of rank.
        """
        path = Path(path)
        file = path / FILE_NAME if path.is_dir() else path
        if not file.is_file():
            raise ValueError(f"{file}: no such file; give a folder that holds {FILE_NAME}, or that file")
        if file.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"{file}: more than {MAX_FILE_BYTES // 2**20} MiB, so no file of tiktoken ranks")
        tokens = []
        for rank, line in enumerate(file.read_bytes().splitlines()):
            encoded, _, number = line.partition(b" ")
            try:
                token = binascii.a2b_base64(encoded, strict_mode=True)
            except binascii.Error:
                token = b""
            if not token or number != b"%d" % rank:
                raise ValueError(f"{file}: line {rank + 1} is not 'base64 {rank}'; give a whole file")
            tokens.append(token)
        try:
            return cls(tokens, _chat_format(file.with_name("tokenizer_config.json")))
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.model and Hugging Face's tokenizer.json and tokenizer_config.json into `folder`."""
        from llamita.tokenizer import emit

        emit.write(self, Path(folder))

    def encode(
        self,
        text: str,
        *,
        bos: bool = False,
        eos: bool = False,
        specials: Literal["text", "allow", "forbid"] = "text",
    ) -> list[int]:
        """Ids of `text`.

        The names of special tokens in it are plain text unless `specials` is "allow"; "forbid" refuses them
        with a ValueError.
        A surrogate pair counts as the character it stands for, a lone surrogate as U+FFFD.
        """
        if specials == "forbid" and (found := _SPECIAL.search(text)):
            raise ValueError(f"the text holds the special token {found[0]} at character {found.start()}; take it out")
        ids = [self.bos_id] if bos else []
        for piece in pieces(text):
            if specials == "allow":
                ids += self._encoding.encode(piece, allowed_special="all")
            else:
                ids += self._encoding.encode_ordinary(piece)
        if eos:
            ids.append(self.eos_id)
        return ids

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """`encode` of each text with no BOS or EOS, on all cores."""
        texts = list(texts)
        parts = [texts[i : i + _TEXTS_PER_TASK] for i in range(0, len(texts), _TEXTS_PER_TASK)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return [ids for part in pool.map(lambda part: [*map(self.encode, part)], parts) for ids in part]

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD. Specials give their names, or nothing."""
        if skip_special:
            ids = [i for i in ids if not len(self.tokens) <= i < self.vocab_size]
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of `ids`, specials as their names; ValueError for an id that is not in the vocabulary."""
        ids = list(ids)
        try:
            return self._encoding.decode_bytes(ids)
        except (KeyError, OverflowError):
            bad = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise ValueError(f"token id {bad} is outside the vocabulary of {self.vocab_size}") from None

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that the id stands for in a text, a special's name; ValueError for an unknown id."""
        return self.decode_bytes((token_id,))

    def is_fallback(self, token_id: int) -> bool:
        """Whether the id's bytes are no UTF-8 on their own: a part of a character."""
        return 0 <= token_id < len(self.tokens) and is_partial(self.tokens[token_id])

    def is_special(self, token_id: int) -> bool:
        """Whether the id is a special token's, which stands for no text."""
        return len(self.tokens) <= token_id < self.vocab_size

    @property
    def chat_template(self) -> str:
        """The Jinja template of `chat_format`, as other programs run it."""
        from llamita.tokenizer.chat import TEMPLATES  # chat.py needs this module first

        return TEMPLATES[self.chat_format]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over ranks and special names: equal for two tokenizers that give equal ids."""
        all_tokens = [*self.tokens, *(name.encode() for name in SPECIALS)]
        return hashlib.sha256(b"".join(len(token).to_bytes(4, "little") + token for token in all_tokens)).hexdigest()

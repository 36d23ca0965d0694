"""A look at tokens for learners: how a vocabulary cuts a text, in the terminal and on a page of its own."""

import base64
import codecs
import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any, Literal, NamedTuple

import jinja2
from markupsafe import Markup, escape
from rich.console import Console
from rich.text import Text

from llamita.tokenizer.chat import render
from llamita.tokenizer.llama2 import SentencePieceTokenizer
from llamita.tokenizer.llama3 import Tokenizer
from llamita.tokenizer.vocabulary import Vocabulary

MAX_BYTES = 100_000  # at worst so many tokens, whose page takes Chromium seconds
MAX_MERGED = 128  # bytes of Meta's longest token; a merge history takes time quadratic in them
MAX_STEPS = 12

Specials = Literal["text", "allow"]
Kind = Literal["text", "fallback", "special"]
Parts = tuple[tuple[str, bool], ...]
Dialog = Sequence[Mapping[str, Any]]

_BYTES = ("utf-8", "surrogateescape")  # for bytes that may be parts of characters

_SIGNS = {" ": "\u00b7", "\n": "\u21b5", "\t": "\u2192", "\x7f": "\u2421"}
_SIGNS |= {chr(code): chr(0x2400 + code) for code in range(32) if code not in (9, 10)}
_SIGNS |= {chr(code): rf"\x{code:02x}" for code in range(128, 160)}
_SIGNS |= {chr(0xDC00 + byte): f"<{byte:02X}>" for byte in range(128, 256)}
_SIGNS |= {chr(0xFE00 + i): f"<VS{i + 1}>" for i in range(16)}
_SIGNS |= {
    char: f"<{name}>"
    for chars, names in (
        ("\u00a0\u00ad\u034f\u061c\ufeff", "NBSP SHY CGJ ALM BOM"),
        ("\u200b\u200c\u200d\u200e\u200f\u2028\u2029", "ZWSP ZWNJ ZWJ LRM RLM LS PS"),
        ("\u202a\u202b\u202c\u202d\u202e\u2060\u2066\u2067\u2068\u2069", "LRE RLE PDF LRO RLO WJ LRI RLI FSI PDI"),
    )
    for char, name in zip(chars, names.split(), strict=True)
}
# Default_Ignorable_Code_Point beyond the category Cf, and noncharacters: nothing is drawn for them.
_UNSEEN = re.compile(
    "[\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2065\u3164\uffa0\ufff0-\ufff8\U000e0000-\U000e0fff"
    "\ufdd0-\ufdef\ufffe\uffff]"
)

# Two backgrounds in turn, apart for the colour-blind too; each brings its own ink for dark and light terminals.
_EVEN, _ODD, _SPECIAL = "grey0 on light_sky_blue1", "grey0 on navajo_white1", "grey100 on purple4"
_SIGN, _FALLBACK, _ASIDE = "grey35", "underline", "dim"


class Token(NamedTuple):
    """A token where it stands in a text.

    `data` is what `token_bytes` gives; `kind` is "text", "special", or "fallback" for a byte or a part of a
    character. `parts` is how to show it: (text, whether that is a sign for something else), nothing in it a control
    character but the newline behind each ↵. Tokens that only together make a character have the same `group`, the
    character in `whole` and their share of it in `note`: "2 of 3 bytes of 中".
    """

    id: int
    data: bytes
    kind: Kind
    parts: Parts
    group: int | None = None
    whole: str = ""
    note: str = ""

    @property
    def shown(self) -> str:
        """The parts as one string."""
        return "".join(text for text, _ in self.parts)


class Step(NamedTuple):
    """A state on a token's way: its parts, and the rank and place of the one just merged (-1 at the start)."""

    parts: tuple[bytes, ...]
    rank: int = -1
    at: int = -1


def visible(data: bytes) -> Parts:
    """Text that shows `data` and can do no harm, as (text, whether it is a sign for something else)."""
    parts: list[tuple[str, bool]] = []

    def add(text: str, sign: bool) -> None:
        if parts and parts[-1][1] == sign:
            text = parts.pop()[0] + text
        parts.append((text, sign))

    for char in data.decode(*_BYTES):
        category = unicodedata.category(char)
        if char in _SIGNS:
            add(_SIGNS[char], True)
            if char == "\n":
                add(char, False)
        elif category in ("Cf", "Zs", "Zl", "Zp") or _UNSEEN.match(char):
            add(f"<U+{ord(char):04X}>", True)
        elif category[0] == "M" and (not parts or parts[-1][1]):  # else it would sit on the token before
            add("\u25cc" + char, True)
        else:
            add(char, False)
    return tuple(parts)


def _clean(text: str) -> str:
    return "".join(part for part, _ in visible(text.encode("utf-8", "replace"))).replace("\n", "")


def spans(vocabulary: Vocabulary, text: str | Sequence[int], *, specials: Specials = "text") -> list[Token]:
    """The tokens of `text`, or of ids such as `chat.render` gives; their bytes in a row are the text's.

    Names of special tokens in a text are text, unless `specials` is "allow" and the vocabulary llamita's Tokenizer.
    SentencePiece's own space before a text is part of the first token.
    """
    if not isinstance(text, str):
        ids = list(text)
    elif isinstance(vocabulary, Tokenizer):
        ids = vocabulary.encode(text, specials=specials)
    else:
        ids = vocabulary.encode(text)
    known = {i: _token(vocabulary, i) for i in set(ids)}
    tokens = [known[i] for i in ids]
    decoder = codecs.getincrementaldecoder(_BYTES[0])(_BYTES[1])
    start = num_groups = 0
    for at, token in enumerate(tokens):
        if token.kind == "special":
            decoder.reset()
        else:
            decoder.decode(token.data)
            if decoder.getstate()[0]:
                continue  # the token ends within a character
            if at > start and (grouped := _grouped(tokens[start : at + 1], num_groups)):
                tokens[start : at + 1] = grouped
                num_groups += 1
        start = at + 1
    return tokens


def _token(vocabulary: Vocabulary, i: int) -> Token:
    data = vocabulary.token_bytes(i)
    kind: Kind = "special" if vocabulary.is_special(i) else "fallback" if vocabulary.is_fallback(i) else "text"
    return Token(i, data, kind, visible(data))


def _grouped(tokens: list[Token], group: int) -> list[Token]:
    """The tokens with what characters they share; empty if they share none."""
    owners = [k for k, token in enumerate(tokens) for _ in token.data]
    notes: list[list[str]] = [[] for _ in tokens]
    whole, at = "", 0
    for char in b"".join(token.data for token in tokens).decode(*_BYTES):
        data = char.encode(*_BYTES)
        shares = Counter(owners[at : at + len(data)])
        at += len(data)
        if len(shares) > 1:
            name = _clean(char)
            whole += name
            for k, share in shares.items():
                notes[k].append(f"{share} of {len(data)} bytes of {name}")
    joined = [
        token._replace(group=group, whole=whole, note=" and ".join(note)) if note else token
        for token, note in zip(tokens, notes, strict=True)
    ]
    return joined if whole else []


class Merges:
    """How the tokens of a vocabulary came to be; `ranks` has the place of each in the order of merging.

    Llamita's Tokenizer merges bytes, which have ranks too. SentencePiece merges characters and numbers the results in
    their order, but for runs of spaces, which have none. Of other vocabularies nothing is known: no ranks, no steps.
    """

    def __init__(self, vocabulary: Vocabulary):
        self.unit = "character" if isinstance(vocabulary, SentencePieceTokenizer) else "byte"
        tokens: Iterable[bytes] = vocabulary.tokens if isinstance(vocabulary, Tokenizer) else ()
        if isinstance(vocabulary, SentencePieceTokenizer):
            every = (i for i in range(vocabulary.vocab_size) if not vocabulary.is_special(i))
            pieces = (vocabulary.token_bytes(i) for i in every if not vocabulary.is_fallback(i))
            tokens = (piece for piece in pieces if len(piece.decode()) > 1 and piece.strip(b" "))
        self.ranks = {token: rank for rank, token in enumerate(tokens)}

    def steps(self, token: bytes) -> list[Step]:
        """From single bytes or characters on, at each step the leftmost neighbours of the lowest rank merged.

        It ends before the whole token where no merge leads to it (0.5 % of Meta's do), and is empty where nothing is
        known and for more than MAX_MERGED bytes.
        """
        units = [token[at : at + 1] for at in range(len(token))]
        if self.unit == "character":
            units = [char.encode(*_BYTES) for char in token.decode(*_BYTES)]
        if not self.ranks or len(token) > MAX_MERGED or (len(units) > 1 and token not in self.ranks):
            return []
        steps = [Step(tuple(units))]
        while len(units) > 1:
            pairs = [(self.ranks.get(a + b, len(self.ranks)), at) for at, (a, b) in enumerate(pairwise(units))]
            rank, at = min(pairs)
            if rank == len(self.ranks):
                break
            units[at : at + 2] = [units[at] + units[at + 1]]
            steps.append(Step(tuple(units), rank, at))
        return steps

    def origin(self, token: Token) -> str:
        """A sentence on where the token comes from."""
        if token.kind == "special":
            return "a special token: a sign for the model, not text"
        if not self.ranks:
            return "the order of merging is not known for this kind of vocabulary"
        if token.kind == "fallback" and self.unit == "character":
            return "one of the 256 bytes, for characters without a token of their own"
        steps, num = self.steps(token.data), len(self.ranks)
        if len(steps) == 1:
            return f"a single {self.unit}, there before any merge"
        if token.data not in self.ranks:
            return "a run of spaces, outside the order of merging"
        rank = self.ranks[token.data]
        told = f"rank {rank:,} of {num:,}: merged before {100 * (num - 1 - rank) / num:.1f} % of the others"
        if steps and len(steps[-1].parts) > 1:
            told += "; merging stops short of it, so it is used only where it is a whole word"
        return told


def numbers(vocabulary: Vocabulary, tokens: Sequence[Token]) -> dict[str, str]:
    """Tokens, characters, bytes, bytes per token and tokens per word; words are what blanks lie between."""
    ordinary = [token.id for token in tokens if token.kind != "special"]
    text = vocabulary.decode(ordinary)
    num_bytes, num_words = len(text.encode()), len(text.split())
    special = {"special": f"{len(tokens) - len(ordinary):,}"} if len(ordinary) < len(tokens) else {}
    return {
        "tokens": f"{len(tokens):,}",
        **special,
        "characters": f"{len(text):,}",
        "bytes": f"{num_bytes:,}",
        "bytes per token": f"{num_bytes / len(ordinary):.2f}" if ordinary else "\u2013",
        "tokens per word": f"{len(ordinary) / num_words:.2f}" if num_words else "\u2013",
    }


def show(
    vocabulary: Vocabulary,
    text: str | Sequence[int],
    console: Console,
    ids: bool = False,
    *,
    specials: Specials = "text",
) -> None:
    """Print the tokens in alternating colours, or with a separator where there are no 256 colours, and their numbers.

    With `ids` each token's id stands below it. Nothing in the text reaches the terminal as a control code or markup.
    ValueError for more than MAX_BYTES bytes.
    """
    _check_size([text] if isinstance(text, str) else [])
    tokens = spans(vocabulary, text, specials=specials)
    plain = console.no_color or console.color_system not in ("256", "truecolor")
    told = " \u00b7 ".join(f"{value} {name}" for name, value in numbers(vocabulary, tokens).items())
    for line in [*_lines(tokens, console.width, ids, "\u258f" if plain else ""), Text(told, _ASIDE)]:
        console.print(Text(line.plain) if plain else line, soft_wrap=True, highlight=False)


def _lines(tokens: Sequence[Token], columns: int, ids: bool, separator: str) -> Iterator[Text]:
    """Lines no wider than `columns`, broken between tokens, each with its line of ids if wanted."""
    rows = [(Text(), Text(style=_ASIDE))]
    for k, token in enumerate(tokens):
        style = _SPECIAL if token.kind == "special" else _ODD if k % 2 else _EVEN
        style += f" {_FALLBACK}" if token.kind == "fallback" else ""
        box = Text.assemble(*((text, f"{style} {_SIGN}" if sign else style) for text, sign in token.parts))
        ends = token.group is not None and (k + 1 == len(tokens) or tokens[k + 1].group != token.group)
        told = Text(f"(={token.whole})" if ends else "", _ASIDE)
        for j, piece in enumerate(box.split("\n", allow_blank=True)):
            number = f"{token.id} " if ids and not j else ""
            width = len(separator) + max(piece.cell_len, len(number)) + told.cell_len
            if j or 0 < rows[-1][0].cell_len > columns - width:
                rows.append((Text(), Text(style=_ASIDE)))
            row, below = rows[-1]
            row.append("" if j else separator)
            below.append(" " * (row.cell_len - below.cell_len) + number)
            row.append_text(piece).append(" " * (len(number) - piece.cell_len), style).append_text(told)
    for row, below in rows if rows[-1][0] else rows[:-1]:
        yield row
        if below.plain.strip():
            yield below


def _check_size(texts: Iterable[Any]) -> None:
    num = sum(len(str(text).encode("utf-8", "surrogatepass")) for text in texts)
    if num > MAX_BYTES:
        raise ValueError(f"the text has {num:,} bytes; {MAX_BYTES:,} is the most that is shown, so give a part of it")


def _markup(parts: Parts) -> Markup:
    return Markup("").join(Markup("<i>%s</i>") % text if sign else escape(text) for text, sign in parts)


def _cut(name: str, vocabulary: Vocabulary, text: str | Dialog, specials: Specials) -> dict[str, Any]:
    """A vocabulary's part of the page: `runs` of neighbours that share characters, and a row for each id."""
    name, spoken = " ".join(map(_clean, name.split(" "))), list[bool]()
    if isinstance(text, str):
        tokens = spans(vocabulary, text, specials=specials)
    elif isinstance(vocabulary, Tokenizer):
        ids, spoken = render(vocabulary, text)
        tokens = spans(vocabulary, ids)
    else:
        raise ValueError(f"{name} has no dialog format; give a text, or only vocabularies of llamita's Tokenizer")
    ordinary = [token for token in tokens if token.kind != "special"]
    by_group = groupby(enumerate(tokens), lambda pair: -1 - pair[0] if pair[1].group is None else pair[1].group)
    times, merges = Counter(token.id for token in tokens), Merges(vocabulary)
    distinct = sorted({token.id: token for token in tokens}.values())
    return {
        "name": name,
        "unit": merges.unit if merges.ranks else "",
        "numbers": numbers(vocabulary, tokens),
        "num": len(tokens),
        "adds_space": sum(len(t.data) for t in ordinary) > len(vocabulary.decode(t.id for t in ordinary).encode()),
        "boxes": {token.id: _markup(token.parts) for token in distinct},
        "runs": [list(run) for _, run in by_group],
        "spoken": {at for at, said in enumerate(spoken) if said},
        "rows": [(token, times[token.id], merges.origin(token), merges.steps(token.data)) for token in distinct],
    }


def page(vocabularies: Mapping[str, Vocabulary], text: str | Dialog, *, specials: Specials = "text") -> str:
    """One HTML page, complete in itself: a text, or a dialog's messages (`chat.render`), as each vocabulary cuts it.

    ValueError for no vocabulary, for more than MAX_BYTES bytes, and for a dialog with any but a Tokenizer.
    """
    if not vocabularies:
        raise ValueError("no vocabulary to cut the text with; give at least one")
    _check_size([text] if isinstance(text, str) else [message.get("content") for message in text])
    house = jinja2.Environment(
        loader=jinja2.PackageLoader("llamita", "tokenizer"),
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    house.filters["digest"] = lambda code: base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    house.filters["shown"] = lambda data: _markup(visible(data))
    cuts = [_cut(name, vocabulary, text, specials) for name, vocabulary in vocabularies.items()]
    rows = [row for cut in cuts for row in cut["rows"] if row[0].data.strip().isalpha() and 3 < len(row[-1]) < 10]
    made = (row for row in rows if row[-1][-1].parts == (row[0].data,))
    example = max(made, key=lambda row: len(row[-1]), default=None)
    return house.get_template("view.html").render(cuts=cuts, example=example, max_steps=MAX_STEPS)

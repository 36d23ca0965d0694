"""What kind of text a document is: rules made for prose destroy code, and rules for English others.

A file name tells, where there is one whose ending is known. Else the lines of a bounded sample do: a table has the same
delimiters in each, markup is made of tags or keys, and code has lines full of calls, operators and braces, for whose
sake the lines of its comments may look like prose. Code blocks in Markdown and reStructuredText do not count.
"""

import re
from collections.abc import Sequence

import numba
import numpy as np

from llamita.data.code_language import code_language
from llamita.data.strings import Strings

PROSE, CODE, TABLE, MARKUP = KINDS = ("prose", "code", "table", "markup")
HEAD_BYTES = 8192  # looked at, at the start; and as much from the middle on where no Markdown block was met
CODE_SHARE = 0.2  # of the lines that look like code or prose, from which on it is code
MARK_LINES = 4  # of code outside of its blocks, that a heading or link of Markdown makes up for
SIGNS_BYTES = 4096  # of code, searched for the signs of its language
MIN_RECORDS, SAME_SHARE = 3, 0.9  # of a table; how many of them have the most frequent number of delimiters
DIGIT_SHARE = 0.5  # of what is not white space, from which on lines of numbers are a table

_ENDINGS = {
    "python": "py pyi pyx", "c": "c h", "cpp": "cc cpp cxx c++ hh hpp hxx cu cuh", "csharp": "cs", "java": "java",
    "javascript": "js mjs cjs jsx", "typescript": "ts tsx", "go": "go", "rust": "rs", "ruby": "rb", "php": "php",
    "swift": "swift", "kotlin": "kt kts", "scala": "scala", "shell": "sh bash zsh", "perl": "pl pm", "lua": "lua",
    "r": "r", "julia": "jl", "haskell": "hs", "ocaml": "ml mli", "elixir": "ex exs", "erlang": "erl", "clojure": "clj",
    "lisp": "lisp el scm", "sql": "sql", "powershell": "ps1", "fortran": "f f90 f95", "dart": "dart", "zig": "zig",
    "assembly": "asm s", "verilog": "v sv", "vhdl": "vhd vhdl", "css": "css scss less", "cmake": "cmake",
    "protobuf": "proto", "objective-c": "mm", "nim": "nim", "groovy": "groovy gradle",
}  # fmt: skip
_CODE_OF = {ending: name for name, endings in _ENDINGS.items() for ending in endings.split()}
_FILES = {"makefile": "make", "dockerfile": "docker", "cmakelists.txt": "cmake"}
_KIND_OF = dict.fromkeys(("md", "markdown", "rst", "org", "adoc"), PROSE)
_KIND_OF |= dict.fromkeys(("csv", "tsv"), TABLE)
_KIND_OF |= dict.fromkeys(("xml", "json", "yaml", "yml", "toml", "ini", "svg", "tex", "bib"), MARKUP)
_PACKED = ("gz", "bz2", "xz", "zst")
_PART = re.compile(r":\d+$")  # `read` names the parts of a long file so


def kinds(names: Sequence[str], strings: Strings) -> tuple[list[str], list[str]]:
    """Of each document one of KINDS, and the language of code, "" of others. `names` as `read.Document` has them."""
    numbers = _by_content(strings.data, strings.offsets, _WORDS, _WORD_ENDS).tolist()
    found = [KINDS[number % _PLAIN] for number in numbers]
    languages = [""] * len(found)
    for i, name in enumerate(names):
        told, language = of_name(name)
        if told and (told != CODE or numbers[i] != _PLAIN):
            found[i], languages[i] = told, language
        elif found[i] == CODE:
            start, end = strings.offsets[i : i + 2].tolist()
            languages[i] = code_language(strings.data[start : min(end, start + SIGNS_BYTES)].tobytes())
    return found, languages


def of_name(name: str) -> tuple[str, str]:
    """Kind and code language that a file name tells; "" where it tells none, as addresses of pages do not.

    "www.name.pl" looks like a file of Perl: what has not a line of code is none all the same.
    """
    if "://" in name:
        return "", ""
    name = name.rpartition("/")[2].lower()
    if ":" in name:
        name = _PART.sub("", name)
    stem, dot, ending = name.rpartition(".")
    if ending in _PACKED:
        stem, dot, ending = stem.rpartition(".")
    language = _FILES.get(name) or (_CODE_OF.get(ending, "") if dot else "")
    return (CODE, language) if language else (_KIND_OF.get(ending, "") if dot else "", "")


# Statements that begin with one of these, and are no sentence, are code.
_BEGINNINGS = (
    "#include #define #if #endif // /* @ } async await assert begin break case catch char class const "
    "continue def del do done elif else end enum except export extern fi final finally fn for from func "
    "function global if impl import int interface let local match module namespace new package pass print "
    "private protected public raise require return self. static struct switch template this. throw try type "
    "typedef unless use using var virtual void while with yield"
).split()
_WORDS = np.frombuffer("".join(_BEGINNINGS).encode(), np.uint8)
_WORD_ENDS = np.cumsum([0, *map(len, _BEGINNINGS)])
_FEW_WORDS = 6  # of a statement that begins so
_BYTES_A_SIGN = 40  # a line of code has a sign of it that often
_WIDTH = 80  # bytes a line on the screen: longer lines count as several

_SPACE, _LETTER, _DIGIT, _SIGN = 0, 1, 2, 3


def _classes() -> np.ndarray:
    """Of each byte: white space, letter (or a part of one beyond ASCII), digit, or another sign; uint8 [256]."""
    text = [chr(byte) for byte in range(128)]
    ascii_classes = [_LETTER if c.isalpha() else _DIGIT if c.isdigit() else _SPACE if c <= " " else _SIGN for c in text]
    return np.array(ascii_classes + [_LETTER] * 128, np.uint8)


_CLASS = _classes()
_STOPS, _CLOSES, _OPENS, _DOUBLED, _MAKES_EQUAL, _MAKES_TAG, _UNDERLINES = (1 << bit for bit in range(7))
_SETS = ((_STOPS, b".?!,"), (_CLOSES, b")]}\"'"), (_OPENS, b"{["), (_DOUBLED, b":&|"), (_MAKES_EQUAL, b"=!+-*/<>:|&"))
_SET = np.zeros(256, np.uint8)
for _bit, _members in (*_SETS, (_MAKES_TAG, b"/!?"), (_UNDERLINES, b"=-~^*")):
    _SET[list(_members)] |= _bit

# What a byte adds to a line's letters, spaces, digits, and bytes that `_signs` looks at; 16 bits each: no line has more
# than HEAD_BYTES.
_TALLY = np.array([1 << (16 * (1, 0, 2)[kind]) if kind != _SIGN else 0 for kind in _CLASS.tolist()], np.uint64)
_TALLY[list(b"`([_=>:&|")] = 1 << 48


@numba.njit(cache=True, nogil=True)
def _by_content(data, offsets, words, word_ends):  # of KINDS, or _PLAIN, uint8 [D]
    found = np.zeros(len(offsets) - 1, np.uint8)
    for d in range(len(found)):
        start, end = offsets[d], offsets[d + 1]
        head_end = min(end, start + HEAD_BYTES)
        counts = np.zeros(7, np.int64)
        _count_lines(data, start, head_end, words, word_ends, counts)
        if counts[_BLOCKS] == 0 and end - start > 2 * HEAD_BYTES:
            middle = (start + end) // 2
            _count_lines(data, middle, middle + HEAD_BYTES, words, word_ends, counts)
        if end - start > 2 and data[start] == 0x23 and data[start + 1] == 0x21:  # #!
            found[d] = 1
        elif _is_table(data, start, head_end, head_end < end) or (
            counts[_LINES] >= MIN_RECORDS and counts[_DIGITS] > DIGIT_SHARE * counts[_VISIBLE]
        ):
            found[d] = 2
        elif _is_markup(data, start, head_end):
            found[d] = 3
        else:
            is_markdown = MARK_LINES * counts[_MARKS] > counts[_CODED]
            if counts[_CODED] == 0 and counts[_PROSY] > 0:
                found[d] = _PLAIN
            elif not is_markdown:
                found[d] = counts[_CODED] > CODE_SHARE * (counts[_CODED] + counts[_PROSY])
    return found


_PLAIN = 4  # prose without a line of code
_LINES, _PROSY, _CODED, _BLOCKS, _MARKS, _DIGITS, _VISIBLE = range(7)


@numba.njit(cache=True, nogil=True, _nrt=False)
def _count_lines(data, start, end, words, word_ends, counts):
    """Adds to `counts`: lines, those of prose and code by width, Markdown's fences and marks, digits, visible bytes."""
    i, in_fence, block_indent = start, False, -1
    while i < end:
        first = i
        while first < end and data[first] != 0x0A and _CLASS[data[first]] == _SPACE:
            first += 1
        last = first
        while last < end and data[last] != 0x0A:
            last += 1
        i, indent = last + 1, first - i
        while last > first and _CLASS[data[last - 1]] == _SPACE:
            last -= 1
        if last == first:
            continue
        if data[first] == 0x60 and _repeated(data, first, last) >= 3:
            in_fence = not in_fence
            counts[_BLOCKS] += 1
        elif not in_fence and (block_indent < 0 or indent <= block_indent):
            block_indent = -1
            kind = _line_kind(data, first, last, words, word_ends, counts)
            counts[_LINES] += 1
            if kind:
                counts[kind] += 1 + (last - first) // _WIDTH
            if kind != _CODED and last - first > 2 and data[last - 1] == 0x3A and data[last - 2] == 0x3A:
                block_indent = indent


@numba.njit(cache=True, nogil=True, _nrt=False)
def _repeated(data, first, last):
    """How many bytes like the first the line begins with."""
    i = first
    while i < last and data[i] == data[first]:
        i += 1
    return i - first


@numba.njit(cache=True, nogil=True, _nrt=False)
def _share(tally, at):
    return np.int64(tally >> np.uint64(at) & np.uint64(0xFFFF))


@numba.njit(cache=True, nogil=True, _nrt=False)
def _line_kind(data, first, last, words, word_ends, counts):
    """_CODED, _PROSY, or 0 for neither, of a line without white space around it; adds to digits and visible bytes."""
    tally = np.uint64(0)
    for i in range(first, last):
        tally += _TALLY[data[i]]
    letters, spaces, digits = _share(tally, 0), _share(tally, 16), _share(tally, 32)
    signs, links, is_quoting = _signs(data, first, last) if tally >> np.uint64(48) else (0, 0, False)
    counts[_DIGITS] += digits
    counts[_VISIBLE] += last - first - spaces
    if letters == 0:
        counts[_MARKS] += _SET[data[first]] & _UNDERLINES and _repeated(data, first, last) == last - first > 2
        return _CODED if data[last - 1] == 0x7D or data[last - 1] == 0x7B else 0
    looks_prosy = letters + spaces >= 0.8 * (last - first) and (spaces >= 3 or letters > 20)
    if is_quoting or data[first] == 0x7C or data[first] == 0x3A:  # ` of Markdown, | of its tables, : of reST
        return _PROSY if looks_prosy else 0
    signs += _ends_statement(data, first, last, spaces)
    is_closed = _SET[data[last - 1]] & _CLOSES or data[last - 1] == 0x3A
    if signs == 0 and (spaces < _FEW_WORDS or is_closed) and not _SET[data[last - 1]] & _STOPS:
        signs += 2 * _begins_statement(data, first, last, words, word_ends)
    if signs * _BYTES_A_SIGN >= last - first:
        return _CODED
    is_heading = data[first] == 0x23 or data[first] == 0x2E  # ## of Markdown, .. of reST
    counts[_MARKS] += links > 0 or (is_heading and last - first > 3 and data[first + 1] == data[first])
    return _PROSY if looks_prosy else 0


@numba.njit(cache=True, nogil=True, _nrt=False)
def _signs(data, first, last):
    """How many signs of code, links of Markdown, and whether Markdown quotes code."""
    signs, links, before, is_quoting = 0, 0, np.uint8(0x20), False
    for i in range(first, last):
        byte = data[i]
        after = data[i + 1] if i + 1 < last else np.uint8(0x20)
        if byte == 0x60:
            is_quoting = True
        elif byte == 0x28 or byte == 0x5B:  # a call or an index, but not "item(s)" or "text[1]"
            links += before == 0x5D and byte == 0x28
            plural = byte == 0x28 and after == 0x73 and i + 2 < last and data[i + 2] == 0x29
            signs += (_CLASS[before] == _LETTER or before == 0x5F) and not plural and (byte == 0x28 or after > 0x39)
        elif byte == 0x5F:
            signs += _CLASS[before] == _LETTER and _CLASS[after] == _LETTER
        else:
            signs += _is_operator(before, byte, after)
        before = byte
    return signs, links, is_quoting


@numba.njit(cache=True, nogil=True, _nrt=False)
def _is_operator(before, byte, after):
    if byte == 0x3D:  # =
        return (before == 0x20 and after == 0x20) or _SET[before] & _MAKES_EQUAL != 0
    if byte == 0x3E:  # >
        return before == 0x2D or before == 0x3D
    return before == byte and _SET[byte] & _DOUBLED and _CLASS[after] != _SIGN


@numba.njit(cache=True, nogil=True, _nrt=False)
def _ends_statement(data, first, last, spaces):
    """Whether a line ends as those of code: in a brace, `):`, or a semicolon that no sentence of verse ends in."""
    end, before = data[last - 1], data[last - 2] if last - first > 1 else np.uint8(0x20)
    if end == 0x7B or end == 0x7D:
        return True
    closed = _SET[before] & _CLOSES or _CLASS[before] == _DIGIT
    return (end == 0x3B and (closed or spaces == 0)) or (end == 0x3A and closed)


@numba.njit(cache=True, nogil=True, _nrt=False)
def _begins_statement(data, first, last, words, word_ends):
    for word in range(len(word_ends) - 1):
        size = word_ends[word + 1] - word_ends[word]
        if words[word_ends[word]] == data[first] and size <= last - first:
            same = size == last - first or _CLASS[data[first + size]] != _LETTER or _CLASS[data[first]] == _SIGN
            for i in range(size):
                same = same and words[word_ends[word] + i] == data[first + i]
            if same:
                return True
    return False


@numba.njit(cache=True, nogil=True)
def _is_table(data, start, end, is_cut):
    for delimiter in (0x2C, 0x09, 0x3B, 0x7C):
        most = np.zeros(64, np.int64)
        records, at, count, is_quoted, before = 0, start, 0, False, np.uint8(0x0A)
        while at < end:
            byte = data[at]
            after = data[at + 1] if at + 1 < end else np.uint8(0x0A)
            if is_quoted:
                is_quoted = byte != 0x22 or after == 0x22
                at += byte == 0x22 and after == 0x22
            elif byte == 0x22 and (before == delimiter or before == 0x0A):
                is_quoted = True
            elif byte == 0x0A and before != 0x0A:
                records += 1
                most[min(count, 63)] += 1
                count = 0
                if most[0] == records or (records == 4 * MIN_RECORDS and most.max() < SAME_SHARE * records):
                    break
            elif byte == delimiter and after != 0x20 and (after != 0x0A or count > 0):
                count += 1
            before = byte
            at += 1
        if at == end and not is_cut and (is_quoted or before != 0x0A):
            records += 1
            most[min(count, 63)] += 1
        columns = most.argmax()
        needed = MIN_RECORDS if columns > 1 else 3 * MIN_RECORDS
        if columns > 0 and records >= needed and most[columns] >= SAME_SHARE * records:
            return True
    return False


@numba.njit(cache=True, nogil=True, _nrt=False)
def _is_markup(data, start, end):
    """Tags from the first byte on, or JSON."""
    while start < end and _CLASS[data[start]] == _SPACE:
        start += 1
    if end - start < 2 or not (data[start] == 0x3C or _SET[data[start]] & _OPENS):
        return False
    lines, tags, keys = 1, 0, 0
    for i in range(start, end - 1):
        after = data[i + 1]
        lines += data[i] == 0x0A
        tags += data[i] == 0x3C and (_CLASS[after] == _LETTER or _SET[after] & _MAKES_TAG)
        keys += data[i] == 0x22 and after == 0x3A
    opens = data[start]
    is_php = opens == 0x3C and data[start + 1] == 0x3F and end - start > 2 and data[start + 2] == 0x70
    return (opens == 0x3C and 2 * tags >= lines and not is_php) or (_SET[opens] & _OPENS and 4 * keys >= lines)

"""Main text of a web page: prune what is named as boilerplate, cut the page into blocks, keep the best subtree.

The parser is resiliparse's (HTML5, Rust). A block is a paragraph, heading, list item, table or code listing. The part
of the page that is kept is the subtree whose blocks are worth the most, where running text outside links counts by its
length and every short block costs: the idea of Kohlschuetter et al. 2010 ("Boilerplate Detection using Shallow Text
Features": text length and link density) with a maximum subtree sum in place of their classifier.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from html import unescape
from itertools import accumulate, pairwise
from typing import Any, Literal

MAX_BYTES = 16 << 20
MAX_TAGS = 200_000
MAX_DEPTH = 256
MAX_ATTRIBUTES = 20_000  # of one tag: the parser compares each with all before it
MAX_EQUALS = 200_000  # in the page, where quoted angles hide a tag's length from us: a minute of the parser at most

_BLOCK_TAGS = frozenset(
    "address article aside blockquote body caption center dd details div dl dt fieldset figure footer form "
    "h1 h2 h3 h4 h5 h6 header hr li main ol p pre section summary table tbody td tfoot th thead tr ul".split()
)
_HEADINGS = frozenset(("h1", "h2", "h3", "h4", "h5", "h6"))
_NO_TEXT = (
    "head,script,style,noscript,template,button,select,textarea,iframe,svg,canvas,object,video,audio,dialog,menu,"
    "nav,aside,footer,figcaption,noembed,noframes"
)
_NO_TEXT_ROLES = "navigation complementary contentinfo search dialog menu menubar toolbar tablist alert".split()
_VERBATIM = "xmp,plaintext"  # what the parser writes out without escapes
_VOID = frozenset(
    "area base basefont bgsound br col embed frame hr img input keygen link meta param source track wbr".split()
)
_TAG = re.compile(r"(<!--.*?-->|<[^>]*>)", re.DOTALL)  # the parser escapes angles in attributes
_ATTRIBUTE = re.compile(r' (class|id|style|role|href|hidden|aria-hidden)="([^"]*)"')
_ADDRESS = re.compile(r' (?:href="(?!#)|title=")[^"]*"')
# Words that sites use in class and id for what is not the text. A space stands for any separator or none.
_NAMES = (
    "nav|navbar|navigation|menu|breadcrumbs?|sidebar|side bar|footer|comments?|"
    "disqus|respond|share|sharing|sharedaddy|social|related|recommend(?:ed|ations?)?|newsletter|subscribe|subscription|"
    "signup|login|promos?|promotion|advert|advertisement|ads?|sponsor(?:ed)?|cookies?|consent|gdpr|popup|modal|overlay|"
    "tags|tagcloud|byline|captions?|credit|gallery|slideshow|carousel|toc|pagination|pager|skip|outbrain|taboola|"
    "trending|popular|toolbar|sr only|visually hidden|screen reader|read more|read next|more stories|more from|"
    "most read|also read|author bio|about author|post meta|entry meta|timestamp|dateline|pub date|copyright|disclaimer|"
    "headerlink|lineno|linenos"
)
_BOILERPLATE = re.compile(rf"(?:^|[^a-z])(?:{_NAMES.replace(' ', '[^a-z]?')})(?:$|[^a-z])")
_HIDDEN = re.compile(r"display:\s*none", re.IGNORECASE)
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")
# Ids of these are made from headings: a chapter on cookies is no cookie banner.
_TITLED = _HEADINGS | {"section", "dt"}
_LINE = "\v"  # stands for <br>, so that collapsing white space leaves it
_SPACE = re.compile(r"[\t\r\n\f\xa0][ \t\r\n\f\xa0]*| [ \t\r\n\f\xa0]+")  # not the lone space, which stays
_GAP = re.compile(r"\n{3,}")
_SEPARATOR = re.compile(rb"""[\s/"']""")
_BOMS = ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16le"), (b"\xfe\xff", "utf-16be"))

_MINOR_SHARE = 0.35  # what holds more of the page's paragraphs than this is the text, whatever its name
_SHORT = 100  # characters a block that is no paragraph has to have to count for the text
_RUNNING = frozenset(("p", "pre", "blockquote", "table"))
_LINKED_SHARE = 0.5
_UNLINKED = 80  # characters outside links that save a block full of links
_CELL = 500  # characters of a cell from which a table is there for layout


@dataclass(slots=True)
class _Block:
    tag: str
    text: str
    linked: int
    item: bool = False

    def value(self, cost: int) -> int:
        """Characters outside links less `cost` for a block that is no paragraph, half of it for a heading."""
        if self.tag in _HEADINGS:
            return -cost // 2
        return len(self.text) - self.linked - (0 if self.tag in _RUNNING else cost)

    @property
    def is_links(self) -> bool:
        unlinked = len(self.text) - self.linked
        return unlinked < _UNLINKED and self.linked > _LINKED_SHARE * len(self.text)


class _Node:
    """An element: its text is `texts[start:end]` of the page, its children the blocks in it and what holds blocks."""

    __slots__ = ("children", "end", "removed", "start", "tag")

    def __init__(self, tag: str, start: int, end: int) -> None:
        self.tag, self.start, self.end, self.removed = tag, start, end, False
        self.children: list[_Node] = []

    @property
    def span(self) -> tuple[int, int]:
        return self.start, self.end

    def holds_blocks(self) -> bool:
        return not self.removed and (self.tag in _BLOCK_TAGS or any(child.holds_blocks() for child in self.children))

    def inside(self) -> "Iterator[_Node]":
        for child in self.children:
            if not child.removed:
                yield child
                yield from child.inside()


class _Page:
    """A body as the parser writes it out, balanced and escaped: the texts between its tags, and what the tags mean.

    An element asked of the parser costs a microsecond and more, and manuals have one every 50 bytes.
    """

    def __init__(self, html: str) -> None:
        pieces = _TAG.split(html)
        self._texts = [unescape(text) if "&" in text else text for text in pieces[::2]]
        self._root = _Node("body", 0, len(self._texts))
        self._lists: dict[str, list[_Node]] = defaultdict(list, page=[self._root])
        self._sums: dict[str, list[int]] = {}
        self._blocks: list[_Block] = []
        self._regions: list[list[int]] = []  # [start, end) in blocks of each element, parents first
        self._level = 0  # of lists around what is read
        self._read(pieces[1::2])
        self._prune()
        self._walk(self._main(), False)

    def _read(self, tags: list[str]) -> None:
        meaning = cache(self._meaning)  # few tags differ in more than an address
        meanings = {raw: meaning(_ADDRESS.sub("", raw)) for raw in set(tags)}
        named = self._lists["named"]
        stack = [self._root]
        for place, raw in enumerate(tags, 1):
            tag, lists = meanings[raw]
            if tag == "/":
                node = stack.pop()
                node.end = place
                if node.children or node.tag in _BLOCK_TAGS:
                    stack[-1].children.append(node)
            elif tag and tag not in _VOID:
                node = _Node(tag, place, place)
                stack.append(node)
                for each in lists:
                    # Highlighters call a comment in code a comment.
                    if each is not named or not any(above.tag in ("pre", "code") for above in stack):
                        each.append(node)
                if len(stack) > MAX_DEPTH:
                    raise ValueError("HTML nested too deeply")
            elif tag == "br":
                self._texts[place] = _LINE + self._texts[place]
            elif tag == "hr":
                stack[-1].children.append(_Node(tag, place, place))

    def _meaning(self, raw: str) -> tuple[str, list[list[_Node]]]:
        """An opening tag's name and the lists its element belongs to; "/" closes the last element, "" is nothing."""
        tag = raw[1:-1].partition(" ")[0]
        if tag[0] == "/" and tag[1:] not in _VOID:
            return "/", []
        if tag[0] in "/!?":
            return "", []
        attributes = dict(_ATTRIBUTE.findall(raw))
        href, role = attributes.get("href", ""), attributes.get("role")
        belongs = {
            "prose": tag in ("p", "pre"),
            # Headings link to themselves, manuals to their own parts.
            "link": tag == "a" and (href == "#" or href[:1] != "#"),
            "main": tag in ("main", "article") or role == "main",
            "no text": role in _NO_TEXT_ROLES,
            "wrapper": tag == "form" or "hidden" in attributes or attributes.get("aria-hidden") == "true",
            "named": _is_named({**attributes, "tag": tag}),
        }
        return tag, [self._lists[name] for name, does in belongs.items() if does]

    def _prune(self) -> None:
        self._remove(self._lists["no text"])
        prose, whole = self._count("prose", *self._root.span), self._count("page", *self._root.span)
        for name in ("wrapper", "named"):
            minor = (node for node in self._lists[name] if self._count("prose", *node.span) <= _MINOR_SHARE * prose)
            self._remove([node for node in minor if self._count("page", *node.span) <= whole / 2])

    def _remove(self, nodes: list[_Node]) -> None:
        for node in nodes:
            node.removed = True
            self._texts[node.start : node.end] = [""] * (node.end - node.start)
            self._sums.clear()

    def _count(self, name: str, start: int, end: int) -> int:
        """Characters of a part of the page that lie in elements of a list."""
        if name not in self._sums:
            lengths = [0] * len(self._texts)
            for node in self._lists[name]:
                lengths[node.start : node.end] = map(len, self._texts[node.start : node.end])
            self._sums[name] = [0, *accumulate(lengths)]
        return self._sums[name][end] - self._sums[name][start]

    def _main(self) -> _Node:
        main = next((node for node in self._lists["main"] if self._count("page", *node.span)), self._root)
        return self._root if 2 * self._count("prose", *main.span) < self._count("prose", *self._root.span) else main

    def _walk(self, node: _Node, in_link: bool) -> None:
        tag, start, region = node.tag, len(self._blocks), len(self._regions)
        self._regions.append([start, start])
        is_list = tag in ("ul", "ol")
        self._level += is_list
        if tag == "pre":
            text = "".join(self._texts[node.start : node.end]).replace(_LINE, "\n").strip("\r\n").rstrip()
            self._blocks += [_Block("pre", text, 0)] if text else []
        elif tag == "table" and (rows := self._rows(node)):
            self._blocks.append(_Block("table", rows, 0 if in_link else self._count("link", *node.span)))
        else:
            in_link = in_link or tag == "a"
            place = node.start
            for child in node.children:
                if child.holds_blocks():
                    self._run(tag, place, child.start, in_link)
                    self._walk(child, in_link)
                    place = child.end
            self._run(tag, place, node.end, in_link)
        if tag == "li" and len(self._blocks) > start:
            first = self._blocks[start]
            if not first.item and first.tag != "pre":
                first.text, first.item = "  " * (self._level - 1) + "- " + first.text, True
        self._level -= is_list
        self._regions[region][1] = len(self._blocks)

    def _run(self, tag: str, start: int, end: int, in_link: bool) -> None:
        text = "".join(self._texts[start:end])
        if text and not text.isspace():
            text = _clean(text)
            self._blocks.append(_Block(tag, text, len(text) if in_link else self._count("link", start, end)))

    def _rows(self, table: _Node) -> str:
        """A table of data as lines; empty for one that lays out the page: nested, of one column, or with long cells."""
        if any(node.tag in ("table", "pre") for node in table.inside()):
            return ""
        rows: list[list[str]] = []
        for node in table.inside():
            if node.tag == "tr":
                rows.append([])
            elif node.tag in ("td", "th") and rows:
                rows[-1].append(_clean("".join(self._texts[node.start : node.end])).replace("\n", " "))
                if len(rows[-1][-1]) > _CELL:
                    return ""
        is_wide = any(len(row) > 1 for row in rows)
        return "\n".join(" | ".join(row) for row in rows if any(row)) if is_wide else ""

    def best(self) -> list[_Block]:
        """The blocks of the subtree with the largest sum of values; of several, the outermost."""
        # Manuals have code, and short blocks that belong to the text.
        cost = 0 if any(block.tag == "pre" for block in self._blocks) else _SHORT
        total = [0, *accumulate(block.value(cost) for block in self._blocks)]
        start, end = max(self._regions, key=lambda region: total[region[1]] - total[region[0]])
        return self._blocks[start:end]


def main_text(html: bytes, *, charset: str = "", mode: Literal["fast", "precise", "union"] = "fast") -> str:
    """Main text of a page, paragraphs a blank line apart; menus, banners, comments, captions and footers left out.

    List items begin with `- `, tables are a line a row with cells between ` | `, code is verbatim. The encoding is the
    byte order mark's, else `charset` (as the server said), else the page's own <meta>, else a guess from the bytes;
    what is invalid in it is left out. `precise` asks trafilatura, `union` adds to `fast` the paragraphs that
    only trafilatura found. Raises ValueError with a short reason for a page that gives no text or exceeds `MAX_BYTES`,
    `MAX_TAGS`, `MAX_DEPTH` or `MAX_ATTRIBUTES`.
    """
    if len(html) > MAX_BYTES:
        raise ValueError(f"HTML larger than {MAX_BYTES >> 20} MiB")
    if html.count(b"<") > MAX_TAGS:
        raise ValueError(f"HTML of more than {MAX_TAGS:,} tags")
    if _comparisons(html) > MAX_ATTRIBUTES**2 or html.count(b"=") > MAX_EQUALS:
        raise ValueError(f"HTML tags of more than {MAX_ATTRIBUTES:,} attributes")
    page = _decoded(html, charset)
    text = _precise(page) if mode == "precise" else _fast(page)
    if mode == "union":
        text = _merged(text, _precise(page))
    if not text:
        raise ValueError("no text")
    return text


def _comparisons(html: bytes) -> int:
    """What the attributes of long tags cost the parser: their squares' sum, counted by all that could part two."""
    tags = (piece.partition(b">")[0] for piece in html.split(b"<")[1:] if len(piece) > 1024)
    return sum(len(_SEPARATOR.findall(tag)) ** 2 for tag in tags)


def _decoded(html: bytes, charset: str) -> str:
    from resiliparse.parse.encoding import bytes_to_str, detect_encoding, map_encoding_to_html5

    of_bom = next((name for mark, name in _BOMS if html.startswith(mark)), "")
    if charset and not of_bom:
        charset = map_encoding_to_html5(charset, fallback_utf8=False) or ""
    return bytes_to_str(html, of_bom or charset or detect_encoding(html, from_html_meta=True) or "utf-8")


def _fast(html: str) -> str:
    from resiliparse.parse.html import HTMLTree

    parsed: Any = HTMLTree.parse(html)  # its own types call every text of an element optional
    if parsed.body is None:
        return ""
    # `.values()` asks the selector once; iterating the list itself asks it again for every index.
    for node in parsed.body.query_selector_all(f"{_NO_TEXT},{_VERBATIM}").values():
        if node.tag in _VERBATIM.split(","):
            node.replace_with(parsed.create_text_node(node.text))
        else:
            node.remove()
    kept = [block for block in _Page(parsed.body.inner_html).best() if block.tag == "pre" or not block.is_links]
    gap = {True: "\n", False: "\n\n"}
    pairs = pairwise([_Block("", "", 0), *kept])
    return "".join(gap[before.item and block.item] + block.text for before, block in pairs).strip("\n")


def _is_named(attributes: dict[str, str]) -> bool:
    name = attributes.get("class", "")
    if attributes["tag"] not in _TITLED and name != "section":
        name += f" {attributes.get('id', '')}"
    return bool(_BOILERPLATE.search(_CAMEL.sub("-", name).lower()) or _HIDDEN.search(attributes.get("style", "")))


def _clean(text: str) -> str:
    text = _SPACE.sub(" ", text)
    if _LINE not in text:
        return text.strip()
    return _GAP.sub("\n\n", "\n".join(line.strip() for line in text.split(_LINE))).strip()


def _precise(html: str) -> str:
    try:
        import trafilatura
    except ImportError as error:
        raise ValueError("modes precise and union need trafilatura: pip install 'llamita[precise]'") from error
    return trafilatura.extract(html, fast=True, include_comments=False) or ""


def _merged(text: str, other: str) -> str:
    """`text` and, after the paragraph that went before, each line of `other` that does not occur in it."""
    paragraphs = text.split("\n\n") if text else []
    flat = [" ".join(paragraph.split()) for paragraph in paragraphs]
    place = 0
    for line in filter(None, (" ".join(line.split()) for line in other.split("\n"))):
        found = next((i for i, paragraph in enumerate(flat) if line in paragraph), None)
        if found is None:
            paragraphs.insert(place, line)
            flat.insert(place, line)
            found = place
        place = found + 1
    return "\n\n".join(paragraphs)

"""Main text of a web page: prune what is named as boilerplate, cut the page into blocks, keep the best subtree.

The parser is resiliparse's (HTML5, Rust). A block is a paragraph, heading, list item, table or code listing. The part
of the page that is kept is the subtree whose blocks are worth the most, where running text outside links counts by its
length and every short block costs: the idea of Kohlschuetter et al. 2010 ("Boilerplate Detection using Shallow Text
Features": text length and link density) with a maximum subtree sum in place of their classifier.
"""

import re
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any, Literal

Element = Any  # resiliparse's; its own types call every text of an element optional

MAX_BYTES = 16 << 20
MAX_TAGS = 200_000
MAX_DEPTH = 256
MAX_ATTRIBUTES = 20_000  # of one tag: the parser compares each with all before it
MAX_EQUALS = 200_000  # in the page, where quoted angles hide a tag's length from us: a minute of the parser at most

_BLOCKS = (
    "address,article,aside,blockquote,body,caption,center,dd,details,div,dl,dt,fieldset,figure,footer,form,"
    "h1,h2,h3,h4,h5,h6,header,hr,li,main,ol,p,pre,section,summary,table,tbody,td,tfoot,th,thead,tr,ul"
)
_BLOCK_TAGS = frozenset(_BLOCKS.split(","))
_HEADINGS = frozenset(("h1", "h2", "h3", "h4", "h5", "h6"))
_NO_TEXT = (
    "head,script,style,noscript,template,button,select,textarea,iframe,svg,canvas,object,video,audio,dialog,menu,"
    "nav,aside,footer,figcaption,[role=navigation],[role=complementary],[role=contentinfo],[role=search],"
    "[role=dialog],[role=menu],[role=menubar],[role=toolbar],[role=tablist],[role=alert]"
)
_LINKS = "a:not([href^='#']),a[href='#']"  # headings link to themselves, manuals to their own parts
_TOO_DEEP = " > ".join("*" * MAX_DEPTH)
_MAIN = "main,[role=main],article"
_WRAPPERS = "form,[hidden],[aria-hidden=true]"  # can hold the whole page
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
_SPACE = re.compile(r"[ \t\r\n\f\xa0]+")
_GAP = re.compile(r"\n{3,}")
_SEPARATOR = re.compile(rb"""[\s/"']""")
_BOMS = ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16le"), (b"\xfe\xff", "utf-16be"))

_MINOR_SHARE = 0.35  # what holds more of the page's paragraphs than this is the text, whatever its name
_SHORT = 100  # characters a block that is no paragraph has to have to count for the text
_RUNNING = frozenset(("p", "pre", "blockquote", "table"))
_LINKED_SHARE = 0.5
_UNLINKED = 80  # characters outside links that save a block full of links
_CELL = 500  # characters of a cell from which a table is there for layout


@dataclass
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


@dataclass
class _Page:
    blocks: list[_Block] = field(default_factory=list)
    regions: list[list[int]] = field(default_factory=list)  # [start, end) in blocks of each element, parents first
    level: int = 0  # of lists around what is read

    def add(self, tag: str, text: str, linked: int) -> None:
        if text:
            self.blocks.append(_Block(tag, text, linked))

    def walk(self, node: Element, in_link: bool) -> None:
        tag, start, region = node.tag, len(self.blocks), len(self.regions)
        self.regions.append([start, start])
        in_link = in_link or tag == "a"
        is_list = tag in ("ul", "ol")
        self.level += is_list
        if tag == "pre":
            self.add("pre", node.text.replace(_LINE, "\n").strip("\r\n").rstrip(), 0)
        elif tag == "table" and (rows := _rows(node)):
            self.add("table", rows, _linked(node))
        elif node.query_selector(_BLOCKS) is None:
            text = _clean(node.text)
            self.add(tag, text, len(text) if in_link else _linked(node))
        else:
            self._children(node, in_link)
        if tag == "li" and len(self.blocks) > start and not self.blocks[start].item and self.blocks[start].tag != "pre":
            first = self.blocks[start]
            first.text, first.item = "  " * (self.level - 1) + "- " + first.text, True
        self.level -= is_list
        self.regions[region][1] = len(self.blocks)

    def _children(self, node: Element, in_link: bool) -> None:
        run: list[str] = []
        linked = 0
        for child in node.child_nodes.values():
            tag = child.tag
            if tag == "#text":
                run.append(child.value)
            elif tag in _BLOCK_TAGS or (tag[0] != "#" and child.query_selector(_BLOCKS) is not None):
                text = _clean("".join(run))
                self.add(node.tag, text, len(text) if in_link else linked)
                run, linked = [], 0
                self.walk(child, in_link)
            elif tag[0] != "#":
                run.append(child.text)
                linked += _linked(child)
        text = _clean("".join(run))
        self.add(node.tag, text, len(text) if in_link else linked)

    def best(self) -> list[_Block]:
        """The blocks of the subtree with the largest sum of values; of several, the outermost."""
        # Manuals have code, and short blocks that belong to the text.
        cost = 0 if any(block.tag == "pre" for block in self.blocks) else _SHORT
        total = [0, *accumulate(block.value(cost) for block in self.blocks)]
        start, end = max(self.regions, key=lambda region: total[region[1]] - total[region[0]])
        return self.blocks[start:end]


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

    tree = HTMLTree.parse(html)
    if tree.body is None or not tree.body.text:
        return ""
    _prune(tree)
    main = tree.body.query_selector(_MAIN)
    page = _Page()
    page.walk(tree.body if main is None or 2 * _paragraphs(main) < _paragraphs(tree.body) else main, False)
    kept = [block for block in page.best() if block.tag == "pre" or not block.is_links]
    gap = {True: "\n", False: "\n\n"}
    pairs = pairwise([_Block("", "", 0), *kept])
    return "".join(gap[before.item and block.item] + block.text for before, block in pairs).strip("\n")


def _prune(tree: Any) -> None:
    body: Element = tree.body
    # `.values()` asks the selector once; iterating the list itself asks it again for every index.
    for node in body.query_selector_all(_NO_TEXT).values():
        node.remove()
    if body.query_selector(_TOO_DEEP) is not None:
        raise ValueError("HTML nested too deeply")
    for node in body.query_selector_all("br").values():
        node.replace_with(tree.create_text_node(_LINE))
    paragraphs, whole = _paragraphs(body), len(body.text)

    def is_minor(node: Element) -> bool:
        own = len(node.text)
        inside = own if node.tag in ("p", "pre") else _paragraphs(node)
        return inside <= _MINOR_SHARE * paragraphs and own <= whole / 2

    for node in body.query_selector_all(_WRAPPERS).values():
        if is_minor(node):
            node.remove()
    for node in body.query_selector_all("[class],[id],[style]").values():
        # Highlighters call a comment in code a comment.
        if _is_named(node) and is_minor(node) and node.closest("pre,code") is None:
            node.remove()


def _is_named(node: Element) -> bool:
    name = node.class_name or ""
    if node.tag not in _TITLED and name != "section":
        name += f" {node.id}"
    return bool(_BOILERPLATE.search(_CAMEL.sub("-", name).lower()) or _HIDDEN.search(node.getattr("style") or ""))


def _paragraphs(node: Element) -> int:
    return sum(len(paragraph.text) for paragraph in node.query_selector_all("p,pre").values())


def _linked(node: Element) -> int:
    if node.tag == "a":
        return len(node.text) if node.matches(_LINKS) else 0
    return sum(len(link.text) for link in node.query_selector_all(_LINKS).values())


def _rows(table: Element) -> str:
    """A table of data as lines; empty for one that lays out the page: nested, of one column, or with long cells."""
    if table.query_selector("table,pre") is not None:
        return ""
    rows = [
        [_clean(cell.text).replace("\n", " ") for cell in row.query_selector_all("td,th").values()]
        for row in table.query_selector_all("tr").values()
    ]
    if max(map(len, rows), default=0) < 2 or any(len(cell) > _CELL for row in rows for cell in row):
        return ""
    return "\n".join(" | ".join(row) for row in rows if any(row))


def _clean(text: str) -> str:
    lines = "\n".join(_SPACE.sub(" ", line).strip() for line in text.split(_LINE))
    return _GAP.sub("\n\n", lines).strip()


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

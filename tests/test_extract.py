"""Layer: fixtures, hostile pages in a process of their own, and 181 real pages with their text made by hand."""

import json
import random
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from benchmarks.extraction import score
from llamita.data import extract
from llamita.data.extract import main_text

pytest.importorskip("resiliparse")
PAGES = Path(__file__).resolve().parents[2] / "shared/data/html/article_extraction_benchmark.tar.bz2"
PROSE = "A sentence long enough to be prose, with commas and a full stop at its end, as articles have them. "

DOCS = """<!DOCTYPE html><html><head><meta charset="utf-8"><title>cookies - Manual</title><style>p {}</style></head>
<body class="wy-body-for-nav has-sidebar"><div class="related" role="navigation"><ul><li><a href="i">index</a></li></ul>
</div><div class="sphinxsidebar"><h3>Table of Contents</h3><ul><li><a href="#a">SIDEBAR</a></li></ul></div>
<div class="document"><div class="body" role="main"><section id="cookies"><h1>cookies<a class="headerlink">PERMA</a>
</h1><p>The module reads <code class="docutils"><span class="pre">Cookie</span></code> headers and writes them, as the
standard says, so that a client keeps its state from one request to another.</p>
<div class="highlight-python"><div class="highlight"><pre><span class="kn">def</span> <span>f</span>(x):
    <span class="hljs-comment"># twice</span>

    return  2 * x
</pre></div><button class="copybtn">COPY</button></div>
<table><tr><td class="linenos"><div><pre>1
2</pre></div></td><td class="code"><div><pre>a = 1
b = 2
</pre></div></td></tr></table>
<section id="related-modules"><h2><a href="#o">Objects</a></h2><p>First line<br>second line</p>
<ul><li>one<ul><li>inner</li></ul></li><li><p>two</p></li></ul>
<table class="docutils"><thead><tr><th><p>Name</p></th><th>Meaning</th></tr></thead>
<tbody><tr><td><p>path</p></td><td>where it<br>holds</td></tr></tbody></table>
<dl><dt id="menu">parse(text)</dt><dd><p>Reads a header and gives what it holds.</p></dd></dl></section></section>
</div></div><div class="cookie-banner"><p>COOKIES</p></div><footer><p>FOOTER</p></footer></body></html>"""


def test_a_page_of_documentation_keeps_code_lists_and_tables_and_nothing_around_them():
    assert main_text(DOCS.encode()) == (
        "cookies\n\nThe module reads Cookie headers and writes them, as the standard says, so that a client keeps its "
        "state from one request to another.\n\n"
        "def f(x):\n    # twice\n\n    return  2 * x\n\na = 1\nb = 2\n\nObjects\n\nFirst line\nsecond line\n\n"
        "- one\n  - inner\n- two\n\nName | Meaning\npath | where it holds\n\n"
        "parse(text)\n\nReads a header and gives what it holds."
    )


def article(body: str) -> bytes:
    return f"<body><div id=page>{body}</div></body>".encode()


def test_boilerplate_around_an_article_goes():
    cards = "".join(f"<div><a href=x><h3>Card {i}</h3><p>{PROSE}</p></a></div>" for i in range(9))
    text = main_text(
        article(
            f"<div class=top-menu><p>MENU</p></div><div class=story><p>{PROSE}one</p><p><a>READ THIS TOO</a></p>"
            f"<div class=shareTools>SHARE</div><p>{PROSE}two</p><blockquote class=tweet>{PROSE}"
            f"</blockquote></div><div>{cards}</div><div id=comments><p>NO</p></div><p style='display: none'>NO</p>"
        )
    )
    assert text.split("\n\n") == [PROSE + "one", PROSE + "two", PROSE.strip()]


def test_a_main_that_is_pruned_is_not_the_page_and_the_next_is():
    page = f"<main class=ad>NO</main><p>{PROSE}OUTSIDE</p><main><p>{PROSE * 2}in</p></main>"
    assert main_text(article(page)) == PROSE * 2 + "in"


def test_a_role_that_is_no_text_goes_whatever_it_holds():
    assert main_text(article(f"<div role=menu><p>{PROSE * 3}</p></div><p>{PROSE}</p>")) == PROSE.strip()


def test_a_table_for_layout_is_no_rows_and_a_rule_parts_blocks():
    text = main_text(article(f"<table><tr><td>{PROSE * 6}<hr>{PROSE * 2}<td>{PROSE}two</table>"))
    assert text.split("\n\n") == [(PROSE * 6).strip(), (PROSE * 2).strip(), PROSE + "two"]


@pytest.mark.parametrize("wrapper", ["<form>", "<div class=sidebar>", "<div style=display:none>", "<div hidden>"])
def test_a_name_does_not_remove_what_holds_the_text(wrapper):
    assert main_text(article(f"{wrapper}<p>{PROSE}</p>")) == PROSE.strip()
    assert main_text(article(f"{wrapper}{PROSE * 2}")) == (PROSE * 2).strip()


def test_without_the_list_of_names_the_boilerplate_stays(monkeypatch):
    monkeypatch.setattr(extract, "_is_named", lambda node: False)
    assert "SIDEBAR" not in main_text(DOCS.encode()) and "PERMA" in main_text(DOCS.encode())


@pytest.mark.parametrize(
    ("html", "charset"),
    [
        ("<p>Grüße</p>".encode("latin-1"), "iso-8859-1"),
        ("<meta charset=windows-1252><p>Grüße</p>".encode("cp1252"), ""),
        ("<meta charset=utf-8><p>Grüße</p>".encode("cp1252"), "cp1252"),
        ("<p>Grüße</p>".encode(), "no-such-charset"),
        ("\ufeff<p>Grüße</p>".encode(), "latin-1"),
        ("\ufeff<p>Grüße</p>".encode("utf-16le"), ""),
        (f"<p>{'Grüße aus dem schönen München. ' * 9}</p>".encode("cp1252"), ""),
    ],
)
def test_encodings(html, charset):
    assert main_text(html, charset=charset).startswith("Grüße")


@pytest.mark.parametrize(
    ("html", "reason"),
    [
        (b"", "no text"),
        (b"\n" * 100_000, "no text"),
        (b"<script>x</script>" * 100, "no text"),
        (b"<frameset><frame></frameset>", "no text"),
        (b"<div>" * 1000 + b"x", "nested too deeply"),
        (b"<p>x" * 300_000, "more than 200,000 tags"),
        (b"x" * (extract.MAX_BYTES + 1), "larger than 16 MiB"),
        (b"<p " + b"a " * 30_000 + b">x", "attributes"),
    ],
)
def test_pages_that_cannot_be_used_say_why(html, reason):
    with pytest.raises(ValueError, match=reason):
        main_text(html)


def test_what_is_damaged_is_read_all_the_same():
    text = main_text(b'<p>one \xff\xfe\0two</p><div class="unclosed><p>three</p>')
    text.encode()
    assert text.startswith("one") and "\0" not in text


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("<div><?php echo 'a' ?><p>one</p></div>", "one"),
        ('<p>one</p><!-- <div class="ad"> --><p>two</p>', "one\n\ntwo"),
        ("<p title='</p><p class=ad>'>one</p>", "one"),
        ("<p>&lt;p&gt; &amp;lt;&nbsp;two</p>", "<p> &lt; two"),
        ("<div><xmp></div></p></xmp>one</div>", "</div></p>one"),
        ("<p>one<br>two<br class=wide>three</p>", "one\ntwo\nthree"),
        ("<p>one<math><input>two</math>three</p>", "onetwothree"),
        ("<table><caption><math><td>one</table>", "one"),
    ],
)
def test_what_only_looks_like_a_tag_is_none(html, text):
    assert main_text(html.encode()) == text


SOUP = (
    "<p> </p> <div> </div> <a> </a> <b> </b> <i> <table> </table> <tr> <td> </td> <caption> <ul> <li> <pre> <h1> "
    "<form> </form> <math> </math> <mi> <input> <img> <source> <br> </br> <hr> <font> <object> <annotation-xml> <a<b> "
    "<p<br> <!-- --> <!--> --!> <?a> </3> <![CDATA[ ]]> text &lt;p&gt; &amp;amp; &nbsp; < > "
    "<p\tclass='x>\"y' <div\tid='&lt;p>'\ta\"b=c> <a\t=x\t\">"
).split(" ")


def test_random_pages_as_the_parser_writes_them_are_balanced_and_have_its_text():
    from resiliparse.parse.html import HTMLTree

    rng = random.Random(0)
    for _ in range(2000):
        body = HTMLTree.parse("".join(rng.choices(SOUP, k=30))).body
        pieces = extract._TAG.split(body.inner_html)
        assert "".join(map(extract.unescape, pieces[::2])) == body.text
        names = [raw[1:-1].partition(" ")[0] for raw in pieces[1::2] if raw[1] not in "!?"]
        opened = []
        for name in names:
            if name.strip("/") in extract._VOID:
                continue
            if name.startswith("/"):
                assert opened.pop() == name[1:]
            else:
                opened.append(name)
        assert not opened


HOSTILE = """
import resource
from llamita.data.extract import main_text
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
for html in (
    b"<div>" * 100_000 + b"x", b"<b>" * 190_000 + b"x", b"<b><p>" * 20_000, b"<table><a>x" * 20_000, b"<pre>" * 100_000,
    b"<p>" + b"&amp;" * 3_000_000, b"\\0" * 1_000_000, bytes(range(128, 256)) * 100_000, b"<!--" * 100_000,
    b'<p class="' + b"aB" * 1_000_000, b'<p style="display:' + b" " * 8_000_000 + b'">x', b"<p>" + b"word " * 3_000_000,
    b"<p " + b" ".join(b"a%d" % i for i in range(1_000_000)), b"<td>" * 50_000, b"<svg><g>" * 50_000,
):
    try:
        print(len(main_text(html)))
    except ValueError as error:
        print(error)
"""


def test_hostile_pages_neither_crash_nor_hang_nor_grow():
    done = subprocess.run([sys.executable, "-c", HOSTILE], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 15, done.stderr


def test_a_union_adds_what_only_the_other_found(monkeypatch):
    monkeypatch.setattr(extract, "_precise", lambda html: "first\nnew\nlast words\nend")
    html = b"<p>the first</p><p>my last  words</p>"
    assert main_text(html, mode="precise") == "first\nnew\nlast words\nend"
    assert main_text(html, mode="union").split("\n\n") == ["the first", "new", "my last words", "end"]


def test_the_precise_mode_names_what_it_lacks(monkeypatch):
    monkeypatch.setitem(sys.modules, "trafilatura", None)
    with pytest.raises(ValueError, match=r"pip install 'llamita\[precise\]'"):
        main_text(b"<p>text</p>", mode="precise")


def test_the_measure_of_the_benchmark():
    truth = {"a": "one two three four five", "b": "x"}
    assert score(truth, truth)["f1"] == 1
    half = score(truth, {"a": "one two three four 5", "b": "x"})
    assert half == pytest.approx({"precision": 0.75, "recall": 0.75, "f1": 0.75})
    assert score(truth, {"a": "", "b": "x"}) == pytest.approx({"precision": 1, "recall": 0.5, "f1": 2 / 3})


@pytest.mark.slow
@pytest.mark.skipif(not PAGES.exists(), reason="the pages of shared/data/html are not here")
def test_real_articles():
    from resiliparse.extract.html2text import extract_plain_text

    ours, alone, truth = {}, {}, {}
    with tarfile.open(PAGES) as tar:
        for member in tar:
            if member.name.endswith("ground-truth.json"):
                truth = {key: page["articleBody"] for key, page in json.load(tar.extractfile(member)).items()}
            elif member.name.endswith(".html"):
                html = tar.extractfile(member).read()
                ours[Path(member.name).stem] = main_text(html)
                alone[Path(member.name).stem] = extract_plain_text(html.decode("utf-8", "replace"), main_content=True)
    assert score(truth, ours)["f1"] > 0.96 > 0.91 > score(truth, alone)["f1"]

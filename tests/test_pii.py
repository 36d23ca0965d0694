"""Layer: arithmetic on a labelled table. What identifies somebody goes; what only looks alike stays."""

import random
import re

import numpy as np
import pytest

from llamita.data import pii
from llamita.data.pii import KINDS, replaced
from llamita.data.strings import Strings

pytest.importorskip("re2")

TOKEN = "a1B2" * 9
KEY = "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n\nMIIEow==\n-----END RSA PRIVATE KEY-----"
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9P"

# kind, text with what must go between « and »
POSITIVE = [
    ("email", "write to «jane.doe+news@mail.uni-bonn.de»."),
    ("email", "<«a_b%c@x-y.co.uk»>"),
    ("email", "contact...«foo@bar.org», «x@y.zz»"),
    ("email", "ftp://«user@host.com»/path"),
    ("email", "josé.«b@site.fr»"),
    ("ipv4", "from «203.14.7.99» at noon"),
    ("ipv4", "http://«8.211.3.4»:8080/x"),
    ("ipv4", "block «91.198.174.192»."),
    ("ipv6", "host «2a00:1450:4001:81b::200e» up"),
    ("ipv6", "«2606:4700:4700::1111»: resolver"),
    ("phone", "call «+49 30 901820» now"),
    ("phone", "(«+44 (20) 7946 0958»)"),
    ("phone", "+33: «+33 6 12 34 56 78»"),
    ("phone", "«+14152671234»"),
    ("phone", "office «(415) 267-1234»"),
    ("phone", "Tel.: «415-267-1234»"),
    ("phone", "phone «1-800-267-1234», fax «415.267.1235»"),
    ("card", "card «4111 1111 1111 1111» exp 12/29"),
    ("card", "«5500-0055-5555-5559»"),
    ("card", "amex «378282246310005»."),
    ("iban", "to «DE89 3704 0044 0532 0130 00» BIC COBADEFF"),
    ("iban", "IBAN:«GB82WEST12345698765432»"),
    ("ssn", "SSN: «536-22-8765»"),
    ("ssn", "her social security number is «536-22-8765»."),
    ("aws_key", 'key = "«AKIAABCDEFGHIJKLMNOP»"'),
    ("github_token", "https://«ghp_" + TOKEN + "»@github.com"),
    ("slack_token", "«xoxb-123456789012-abcdefghijklmnop»"),
    ("jwt", "Bearer «" + JWT + "»"),
    ("private_key", "a\n«" + KEY + "»\nb"),
]
NEGATIVE = [
    "ISBN 978-0-306-40615-7 and ISBN 0-306-40615-2, ISSN 2049-3630",
    "on 2021-12-31 at 12:30:45, 31.12.2021, 1914-1918, 12/31/2021",
    "version 1.2.3.4, v10.0.190.1, release 4.120.3.1, foo==1.122.3.4, foo-1.122.3.4.tar.gz, /opt/1.122.3.4/bin",
    "section 7.127.2.1, OID 1.3.6.1.4.1.311.21, ANSI 4.10.4.1",
    "10.0.0.1, 192.168.1.200, 127.0.0.1, 172.16.99.200",
    "255.255.255.0, 224.0.0.251, 192.0.2.1, 300.200.100.1, 1.1.1.1, 8.211.3.0",
    "fe80::1, ::1, 2001:db8::1, std::vector, 2001::foo, RFC 2045:6.4, 12:30:45:99",
    "doi:10.1234/5678.9012-345, arXiv:2407.21783, 3.14159265358979, 1.7976931348623158e+308",
    "@property\ndef f(self): return a@b.T + x@y.dot(z) + w@x.sum(0)[1]",
    "foo@bar, @handle, a @ b.com, me@localhost, you@example.com, icon@2x.png, git@github.com:a/b.git",
    "commit 4b825dc642cb6eb9a060e54bf8d69288fbee4904, md5 d41d8cd98f00b204e9800998ecf8427e",
    "order 1234 5678 9012 3456, invoice 4111 1111 1111 1112, id 4000000000000000, 94111111111111111",
    "part 536-22-8765, SSN 000-22-8765, SSN 536-00-8765, SSN 987-65-4320",
    "DE89 3704 0044 0532 0130 01, AB12 ABCD 1234 5678 9012 34, GB82WEST123456987654321",
    "a population of 415 267 1234, 415-267-1234 items, +100 000 000 euros, x+12345678, tel. 202-555-0143",
    "AKIAIOSFODNN7EXAMPLE, AKIASHORT, ghp_short, xoxb-no, eyJhbGciOiJIUzI1NiJ9 alone, -----BEGIN PUBLIC KEY-----",
    "-----BEGIN RSA PRIVATE KEY----- goes on without an end",
]
HOSTILE = ["", "@" * 5000, "a@a." * 5000, "1.1.1." * 5000, "+1 " * 5000, "4111 " * 5000, "2a00:" * 3000, "A" * 20_000,
           "-----BEGIN PRIVATE KEY-----" * 300, "DE89" * 3000, "x" * 50_000 + "@y.de", "\n" * 3000]  # fmt: skip


def run(*texts: str, code: bool = False):
    result, counts = replaced(Strings.of(texts), np.full(len(texts), code))
    return result.texts(), {kind: found.tolist() for kind, found in counts.items() if found.any()}


@pytest.mark.parametrize("kind, marked", POSITIVE)
def test_what_identifies_somebody_goes(kind, marked):
    expected, times = re.subn("«.*?»", KINDS[kind].placeholder.decode(), marked, flags=re.DOTALL)
    assert run(re.sub("[«»]", "", marked)) == ([expected], {kind: [times]})


@pytest.mark.parametrize("text", NEGATIVE)
def test_what_only_looks_alike_stays(text):
    assert run(text) == ([text], {})


def test_precision_and_recall_on_the_table(capsys):
    positives = sum(marked.count("«") for _, marked in POSITIVE)
    hits = sum(sum(map(sum, run(re.sub("[«»]", "", marked))[1].values())) for _, marked in POSITIVE)
    alarms = sum(sum(map(sum, run(text)[1].values())) for text in NEGATIVE)
    with capsys.disabled():
        print(f"\nPII table: recall {hits}/{positives}, precision {hits}/{hits + alarms}")
    assert (hits, alarms) == (positives, 0)


def test_code_keeps_numbers_but_no_secrets():
    texts = [re.sub("[«»]", "", marked) for _, marked in POSITIVE]
    found = run(*texts, code=True)[1]
    assert set(found) == {kind for kind in KINDS if KINDS[kind].in_code}
    assert set(KINDS) - set(found) == {"iban", "card", "ssn", "phone"}


def test_counts_are_those_of_each_document():
    result, counts = replaced(Strings.of(["a@b.de c@d.fr", "", "+14152671234 a@b.de"]), np.array([False, True, False]))
    assert result.texts() == ["email@example.com email@example.com", "", "+1 202-555-0100 email@example.com"]
    assert (counts["email"].tolist(), counts["phone"].tolist()) == ([2, 0, 1], [0, 0, 1])
    assert all(found.dtype == np.int32 and len(found) == 3 for found in counts.values()) and list(counts) == list(KINDS)


def test_a_second_pass_changes_nothing():
    texts = [re.sub("[«»]", "", marked) for _, marked in POSITIVE] + NEGATIVE + HOSTILE
    rng = random.Random(0)
    pieces = [piece for text in texts[: len(POSITIVE)] for piece in re.split("( )", text)]
    texts += ["".join(rng.choices([*pieces, " ", "\n", "tel ", "SSN "], k=30)) for _ in range(300)]
    once = run(*texts)[0]
    assert once != texts and run(*once) == (once, {})
    placeholders = [kind.placeholder.decode() for kind in KINDS.values()]
    assert run(*placeholders, " tel ssn ".join(placeholders)) == ([*placeholders, " tel ssn ".join(placeholders)], {})


def test_the_automaton_finds_what_each_pattern_finds_by_itself():
    """The plain twin: the standard library's re, all patterns on all texts, nothing sorted out beforehand."""
    rng = random.Random(1)
    texts = [re.sub("[«»]", "", marked) for _, marked in POSITIVE] + NEGATIVE
    texts += ["".join(rng.choices("ab@.1234+- :()AKI9éx\n", k=200)) for _ in range(200)]
    occurring, matchers = pii._matchers()
    for text in map(str.encode, texts):
        names = [name for name, kind in KINDS.items() if re.search(kind.pattern, text)]
        assert [list(KINDS)[i] for i in sorted(occurring.Match(text) or ())] == names
        for name in names:
            plain = [match.span() for match in re.finditer(KINDS[name].pattern, text)]
            assert [match.span() for match in matchers[name].finditer(text)] == plain, (name, text)


def test_hostile_text_is_passed_over():
    assert run(*HOSTILE)[1].keys() <= {"email", "phone"}


def test_where_kinds_overlap_the_first_of_the_table_wins():
    text = "ghp_" + TOKEN + "@mail.de"
    assert run(text) == (["<GITHUB_TOKEN>@mail.de"], {"github_token": [1]})

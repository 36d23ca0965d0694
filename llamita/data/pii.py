"""Personal data and secrets replaced by placeholders that have the same form and belong to nobody.

| kind | found where | placeholder | why it is safe |
|---|---|---|---|
| email | prose, code | email@example.com | reserved, RFC 2606 |
| ipv4, ipv6 | prose, code; public addresses only | 192.0.2.1, 2001:db8::1 | documentation, RFC 5737, RFC 3849 |
| phone | prose | +1 202-555-0100 | 555-0100 to 555-0199 are kept for fiction in the North American plan |
| aws_key | prose, code | AKIAIOSFODNN7EXAMPLE | the example of the AWS documentation |
| card, iban, ssn | prose | <CREDIT_CARD>, <IBAN>, <SSN> | any number that passes the check may be somebody's |
| private_key, github_token, slack_token, jwt | prose, code | <PRIVATE_KEY>, ... | none is set aside as an example |

Rather too little than too much: numbers want a checksum, an international form or a word before them that says what
they are; names and postal addresses are not looked for. A second pass changes nothing.
"""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

import numpy as np

from llamita.data.strings import Strings

CONTEXT_BYTES = 48
KEY_BYTES = 2**14
PASSES = 8  # a placeholder glued to what stands beside it may become a match

# Letters and lengths of the SWIFT registry of IBAN formats.
IBAN_LENGTHS = {
    country.encode(): int(length)
    for length, countries in {
        15: "NO", 16: "BE", 18: "DK FI FO GL NL SD", 19: "MK SI", 20: "AT BA EE KZ LT LU XK", 21: "CH HR LI LV",
        22: "BG BH CR DE GB GE IE ME RS VA", 23: "AE GI IL IQ OM TL", 24: "AD CZ ES MD PK RO SA SE SK TN VG",
        25: "LY PT ST", 26: "IS TR", 27: "BI DJ FR GR IT MC MR SM", 28: "AL AZ BY CY DO GT HU LB NI PL SV",
        29: "BR EG PS QA UA", 30: "JO KW MU YE", 31: "MT SC", 32: "LC", 33: "RU",
    }.items()
    for country in countries.split()
}  # fmt: skip

FILE_ENDINGS = frozenset(b"png jpg jpeg gif svg webp css js ts html htm php py json xml md txt pdf".split())
RESERVED_DOMAIN = re.compile(rb"(?i)(?:^|[@.])(?:example\.(?:com|net|org)|example|test|invalid|localhost|local)$")
VERSION_BEFORE = re.compile(
    rb"(?i)(?:[=<>~^!]=\s*|[.\\_-]|(?:^|[^/])/|\b(?:v|ver|version|release|build|firmware|section|chapter|oid)\b[\s.:=]*)$"
)
PHONE_BEFORE = re.compile(rb"(?i)\b(?:tel|telephone|phone|call|fax|mobile|cell|contact|text|reach|dial|whatsapp)\b")
SSN_BEFORE = re.compile(rb"(?i)\bssn\b|\bss ?#|social[ -]security")

Found = tuple[bytes, bytes, bytes]  # what stands before, the match, what stands after
Check = Callable[[Found], int]  # how much of the match is meant, 0 = nothing


def _all_of(holds: Callable[[Found], bool]) -> Check:
    return lambda found: len(found[1]) if holds(found) else 0


def _always(found: Found) -> int:
    return len(found[1])


def _is_email(found: Found) -> bool:
    _, match, after = found
    local, _, domain = match.partition(b"@")
    if len(local) > 64 or len(domain) > 253 or after[:1] in (b"(", b"[") or (local == b"git" and after[:1] == b":"):
        return False  # a matrix product, `git@host:path`
    return domain.rpartition(b".")[2].lower() not in FILE_ENDINGS and not RESERVED_DOMAIN.search(domain)


def _is_public(match: bytes) -> bool:
    try:
        address = ip_address(match.decode())
    except ValueError:
        return False
    return address.is_global and not address.is_multicast


def _is_ipv4(found: Found) -> bool:
    before, match, after = found
    octets = match.split(b".")
    if max(map(len, octets)) < 3 or octets[3] == b"0" or VERSION_BEFORE.search(before):
        return False  # 4.10.4.1 is a version or a section: only 2% of addresses have no number above 99
    return not re.match(rb"[.\-+]?\w|[.]\d", after) and _is_public(match)


def _ipv6_length(found: Found) -> int:
    before, match, after = found
    if before[-1:] in (b":", b".") or re.match(rb":?\w", after):
        return 0
    return next((len(shown) for shown in (match, match.removesuffix(b":")) if _is_public(shown)), 0)


def _is_phone(found: Found) -> bool:
    before, match, after = found
    digits = re.sub(rb"\D", b"", match)
    if re.search(rb"55501\d\d$", digits) or digits.endswith(b"0000") or re.match(rb"[\w\-]|[.,]\d", after):
        return False
    if match[:1] == b"+":
        return 8 <= len(digits) <= 15 and not re.search(rb"[\w+)]$", before)
    return not re.search(rb"[\w.\-/+]$", before) and (b"(" in match or bool(PHONE_BEFORE.search(before)))


def _is_card(found: Found) -> bool:
    before, match, after = found
    digits = [int(chr(digit)) for digit in match if chr(digit).isdigit()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    alone = not re.search(rb"[\w.\-/+=]$|\d ?$", before) and not re.match(rb"[\w\-/]|[., ]\d", after)
    return alone and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0 and len(set(digits)) > 1


def _iban_length(found: Found) -> int:
    before, match, _ = found
    wanted = IBAN_LENGTHS.get(match[:2], 0)
    shown = re.match(rb"(?:[A-Z0-9] ?){%d}(?![A-Z0-9])" % wanted, match) if wanted else None
    if not shown or re.search(rb"[\w\-]$", before):
        return 0
    code = shown[0].replace(b" ", b"")
    number = "".join(str(int(chr(char), 36)) for char in code[4:] + code[:4])
    return len(shown[0].rstrip()) if int(number) % 97 == 1 else 0


def _is_ssn(found: Found) -> bool:
    before, match, after = found
    area, group, serial = match.split(b"-")
    valid = area not in (b"000", b"666") and area < b"900" and group != b"00" and serial != b"0000"
    return valid and bool(SSN_BEFORE.search(before)) and after[:1] != b"-"


def _key_length(found: Found) -> int:
    """Up to its last line; a block without one is told about, not shown."""
    _, match, after = found
    end = re.search(rb"-----END [A-Z ]{0,20}PRIVATE KEY(?: BLOCK)?-----", after)
    return len(match) + end.end() if end else 0


@dataclass(frozen=True)
class _Kind:
    pattern: bytes
    placeholder: bytes
    check: Check
    in_code: bool


# Where two overlap, the one that stands first here wins.
KINDS = {
    "private_key": _Kind(
        rb"-----BEGIN [A-Z ]{0,20}PRIVATE KEY(?: BLOCK)?-----", b"<PRIVATE_KEY>", _key_length, in_code=True
    ),
    "aws_key": _Kind(
        rb"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
        b"AKIAIOSFODNN7EXAMPLE",
        _all_of(lambda found: not found[1].endswith(b"EXAMPLE")),
        in_code=True,
    ),
    "github_token": _Kind(
        rb"\b(?:gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9_]{40,255})\b",
        b"<GITHUB_TOKEN>",
        _always,
        in_code=True,
    ),
    "slack_token": _Kind(
        rb"\bxox[abeoprs]-[0-9]{4,20}-[A-Za-z0-9\-]{8,255}\b", b"<SLACK_TOKEN>", _always, in_code=True
    ),
    "jwt": _Kind(
        rb"\beyJ[A-Za-z0-9_\-]{8,}\.eyJ[A-Za-z0-9_\-]{8,}\.[A-Za-z0-9_\-]{16,}", b"<JWT>", _always, in_code=True
    ),
    "email": _Kind(
        rb"[A-Za-z0-9_%+\-]+(?:\.[A-Za-z0-9_%+\-]+)*@(?:[A-Za-z0-9\-]+\.)+[A-Za-z]{2,24}\b",
        b"email@example.com",
        _all_of(_is_email),
        in_code=True,
    ),
    "ipv4": _Kind(rb"\b[0-9]{1,3}(?:\.[0-9]{1,3}){3}\b", b"192.0.2.1", _all_of(_is_ipv4), in_code=True),
    "ipv6": _Kind(rb"\b[23][0-9A-Fa-f]{3}:[0-9A-Fa-f:]{1,34}", b"2001:db8::1", _ipv6_length, in_code=True),
    "iban": _Kind(rb"\b[A-Z]{2}[0-9]{2}(?: ?[A-Z0-9]){11,40}", b"<IBAN>", _iban_length, in_code=False),
    "card": _Kind(
        rb"\b(?:(?:4[0-9]{3}|5[1-5][0-9]{2}|2[2-7][0-9]{2}|6(?:011|[45][0-9]{2}))"
        rb"(?:[0-9]{12}|(?: [0-9]{4}){3}|(?:-[0-9]{4}){3})"
        rb"|3[47][0-9]{2}(?:[0-9]{11}| [0-9]{6} [0-9]{5}|-[0-9]{6}-[0-9]{5}))\b",
        b"<CREDIT_CARD>",
        _all_of(_is_card),
        in_code=False,
    ),
    "ssn": _Kind(rb"\b[0-9]{3}-[0-9]{2}-[0-9]{4}\b", b"<SSN>", _all_of(_is_ssn), in_code=False),
    "phone": _Kind(
        rb"\+[1-9][0-9]{0,2}(?:[ .\-]?(?:\([0-9]{1,4}\)|[0-9]{1,4})){2,6}"
        rb"|(?:\b1[ .\-])?(?:\([2-9][0-9]{2}\) ?|\b[2-9][0-9]{2}[ .\-])[2-9][0-9]{2}[ .\-][0-9]{4}\b",
        b"+1 202-555-0100",
        _all_of(_is_phone),
        in_code=False,
    ),
}
NAMES = list(KINDS)


@functools.cache
def _matchers() -> tuple[Any, dict[str, Any]]:
    """All patterns as one automaton that says which of them occur in a text at all, and each by itself."""
    import re2

    options = re2.Options()
    options.max_mem = 2**26
    occurring = re2.Set.SearchSet(options)
    for kind in KINDS.values():
        occurring.Add(kind.pattern)
    occurring.Compile()
    return occurring, {name: re2.compile(kind.pattern) for name, kind in KINDS.items()}


def replaced(strings: Strings, is_code: np.ndarray) -> tuple[Strings, dict[str, np.ndarray]]:
    """The texts with placeholders, and how many of each kind, int32 [len]. `is_code` bool [len]: see above."""
    counts = {name: np.zeros(len(strings), np.int32) for name in KINDS}
    texts: dict[int, bytes] = {}
    for i in range(len(strings)):
        text = strings[i]
        for _ in range(PASSES):
            text, found = _replaced(text, bool(is_code[i]))
            for name in found:
                counts[name][i] += 1
            if not found:
                break
            texts[i] = text
    return strings.with_texts(list(texts), list(texts.values())) if texts else strings, counts


def _replaced(text: bytes, is_code: bool) -> tuple[bytes, list[str]]:
    occurring, matchers = _matchers()
    names = [NAMES[kind] for kind in sorted(occurring.Match(text) or ())]
    spans: list[tuple[int, int, str]] = []
    for name in names:
        if is_code and not KINDS[name].in_code:
            continue
        room = KEY_BYTES if name == "private_key" else CONTEXT_BYTES
        for match in matchers[name].finditer(text):
            first, end = match.span()
            before, after = text[max(first - CONTEXT_BYTES, 0) : first], text[end : end + room]
            length = KINDS[name].check((before, match.group(), after))
            if length:
                spans.append((first, first + length, name))
    spans.sort(key=lambda span: span[0])
    apart: list[tuple[int, int, str]] = []
    for span in spans:
        if apart and span[0] < apart[-1][1]:
            if names.index(span[2]) >= names.index(apart[-1][2]):
                continue
            apart.pop()
        apart.append(span)
    parts, at = [], 0
    for first, end, name in apart:
        parts += [text[at:first], KINDS[name].placeholder]
        at = end
    return b"".join([*parts, text[at:]]), [name for *_, name in apart]

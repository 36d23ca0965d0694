"""The language of source code without a name, by its first line or by what occurs in it."""

import re
from functools import cache
from typing import Any

OTHER = "other"  # a language not in the list below
_INTERPRETER = re.compile(rb"#!.*\b(python|node|ruby|perl|php|lua|Rscript|bash|zsh|sh)[\d.]*\b|<\?(php)\b")
_INTERPRETS = {"node": "javascript", "Rscript": "r", "bash": "shell", "zsh": "shell", "sh": "shell"}

# What tells languages apart where there is no name; each pattern counts once a match.
_SIGNS = {
    "python": rb"^[ \t]*(?:def \w+\(|class \w+.*:$|from [\w.]+ import |import [\w.]+$|@\w+|return )|\bself\."
    rb"|^[ \t]*(?:if|elif|else|for|while|try|except|with)\b.*:$",
    "c": rb"^[ \t]*#(?:include|define|ifdef|ifndef|endif)\b|\w->\w|\b(?:struct|unsigned|sizeof|NULL|void|char \*)\b",
    "cpp": rb"\b(?:std::|template\s*<|namespace \w+|nullptr|public:|private:|using namespace|virtual \w)|\w::\w",
    "java": rb"\b(?:public (?:static|class|void)|import java|System\.out|@Override|extends|implements|throws)\b",
    "csharp": rb"^using \w[\w.]*;|\b(?:namespace \w+|Console\.|string\[\]|foreach \(|get; set;)",
    "javascript": rb"\b(?:function\b|const \w+ =|let \w+ =|var \w+ =|console\.|require\(|export |document\.)|=>|===",
    "typescript": rb"\b(?:interface \w+ \{|\w+: (?:string|number|boolean|void)\b|import .* from ')|\bas const\b",
    "go": rb"^(?:package \w+$|func |import \()|:=|\bfmt\.|\bnil\b",
    "rust": rb"\b(?:fn \w+|let mut|impl\b|pub (?:fn|struct)|use \w+::|match \w+ \{|&mut|Some\(|println!)",
    "ruby": rb"^[ \t]*(?:end|require '|module [A-Z]|def \w+[?!]?$)\b|\bdo \||\.each\b|\bputs\b|@\w+ =",
    "php": rb"\$\w+\s*=|\$this->|\becho\b|\bfunction \w+\(.*\$",
    "shell": rb"^[ \t]*(?:fi|done|esac|then|echo|export|if \[)\b|\$\{?\w+|\|\s*(?:grep|sed|awk)\b",
    "perl": rb"\b(?:my [$@%]\w+|sub \w+ \{|use strict)|=~|\$_\b",
    "sql": rb"(?i:\b(?:select .+ from|insert into|create table|where \w+|group by)\b)",
    "css": rb"^[ \t]*[\w-]+: [^;{}()\n]+;$|^[.#@]?[\w-][\w ,.:#>-]*\{$",
}  # fmt: skip


def code_language(head: bytes) -> str:
    """Of code without a name: by its first line, or what signs of each language occur in it."""
    if shebang := _INTERPRETER.match(head):
        interpreter = (shebang[1] or shebang[2]).decode()
        return _INTERPRETS.get(interpreter, interpreter)
    counts = {name: sum(1 for _ in signs.finditer(head)) for name, signs in _sign_of().items()}
    best = max(counts, key=lambda name: counts[name])
    if best == "c" and counts["cpp"]:
        return "cpp"
    return best if counts[best] else OTHER


@cache
def _sign_of() -> dict[str, Any]:
    import re2

    return {name: re2.compile(b"(?m)" + signs) for name, signs in _SIGNS.items()}

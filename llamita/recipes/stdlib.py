"""Real text that every machine with Python has: the standard library's source, its help topics, and its documentation
as questions and answers. Nothing is imported or run: files are read and parsed."""

import ast
import io
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from llamita.data.read import Document

# Tests are half of the library's text and say the same thing over and over; the 120 tables of encodings are so alike
# that a held-out one would be known by heart from the others; the rest is not the library's own, or read otherwise.
LEFT_OUT = {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages", "__pycache__", "pydoc_data"}
# Windows, editors and build tools: a third of the documented names, and hardly what a newcomer asks about.
NOT_ASKED = {"idlelib", "tkinter", "turtledemo", "distutils", "lib2to3", "ensurepip"}
TOPICS = "pydoc_data/topics.py"
Message = dict[str, str]


def root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _files() -> list[Path]:
    here = root()
    return [path for path in sorted(here.rglob("*.py")) if not LEFT_OUT & set(path.relative_to(here).parts[:-1])]


def _read(path: Path) -> str:
    """A source file's text; "" for the few that say by a coding line that they are not UTF-8."""
    data = path.read_bytes()
    encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
    return data.decode("utf-8") if encoding.startswith("utf-8") else ""


def topics() -> dict[str, str]:
    """pydoc's help topics, read from the dict literal in the library's file."""
    tree = ast.parse((root() / TOPICS).read_text(encoding="utf-8"))
    literal = next(node.value for node in tree.body if isinstance(node, ast.Assign))
    return ast.literal_eval(literal)


def texts() -> Iterator[Document]:
    """Every source file and every help topic, one document each."""
    for path in _files():
        if text := _read(path):
            yield Document(text=text, name=str(path.relative_to(root())), source="code")
    for name, text in topics().items():
        yield Document(text=text, name=f"topic {name}", source="topics", lang="en")


def conversations() -> list[list[Message]]:
    """One exchange for each documented public module, class and function: asked as people ask, answered with the first
    paragraph of its docstring."""
    pairs = []
    for path in _files():
        parts = path.relative_to(root()).with_suffix("").parts
        if NOT_ASKED & set(parts) or any(part.startswith("_") and part != "__init__" for part in parts):
            continue
        module = ".".join(part for part in parts if part != "__init__")
        tree = ast.parse(_read(path))
        pairs += [pair for name, node in _public(tree, module) if (pair := _exchange(name, node))]
    return pairs


def _public(tree: ast.Module, module: str) -> Iterator[tuple[str, ast.AST]]:
    yield module, tree
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            yield f"{module}.{node.name}", node
            if isinstance(node, ast.ClassDef):
                for inner in node.body:
                    if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                        yield f"{module}.{node.name}.{inner.name}", inner


def _exchange(name: str, node: ast.AST) -> list[Message] | None:
    docstring = ast.get_docstring(node)  # type: ignore[arg-type]
    answer = " ".join(docstring.split("\n\n")[0].split()) if docstring else ""
    if not 20 <= len(answer) <= 300 or ">>>" in answer:
        return None
    if isinstance(node, ast.Module):
        question = f"What is the module {name} for?"
    elif isinstance(node, ast.ClassDef):
        question = f"What is {name}?"
    else:
        question = f"What does {name} do?"
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

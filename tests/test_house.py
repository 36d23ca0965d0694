"""The house rules that a machine can hold: sizes, imports without extras, and contracts that can fail."""

import ast
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "llamita").rglob("*.py"))
# What `pip install llamita` brings; everything else must be imported where it is used.
EXTRAS = ["pyarrow", "zstandard", "transformers", "huggingface_hub", "tokenizers", "matplotlib", "datasets",
          "sentencepiece", "gigatoken", "rustbpe", "llama_cpp", "fsspec", "fastwarc", "resiliparse", "pycld2",
          "py3langid", "xxhash", "re2", "pydivsufsort", "trafilatura", "ray"]  # fmt: skip


def functions(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node.end_lineno - node.lineno + 1


def test_files_and_functions_stay_short():
    assert len(FILES) > 40
    assert {path.name: len(path.read_text().splitlines()) for path in FILES if path.read_text().count("\n") > 350} == {}
    assert [(path.name, name, size) for path in FILES for name, size in functions(path) if size > 60] == []


def test_the_whole_package_stays_within_its_budget_of_30000_lines():
    assert sum(len(path.read_text().splitlines()) for path in FILES) <= 30_000


def test_the_model_is_one_file_of_at_most_300_lines():
    assert len((ROOT / "llamita/model/llama.py").read_text().splitlines()) <= 300


def test_every_module_imports_with_the_core_alone():
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES if path.name != "__main__.py"]
    program = (
        "import sys\n"
        f"for name in {EXTRAS}: sys.modules[name] = None\n"
        f"for name in {modules}: __import__(name.removesuffix('.__init__'))\n"
        "print('all', len(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("all"), done.stderr[-2000:]


def test_asking_for_help_does_not_wait_for_torch():
    program = "import sys, llamita.cli; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stdout + done.stderr


def test_no_environment_variable_is_read_below_the_command_line():
    readers = [path.name for path in FILES if "os.environ" in path.read_text() or "getenv(" in path.read_text()]
    assert readers == []


def test_the_import_contracts_see_a_forbidden_arrow(tmp_path):
    """Negative control of lint-imports, which `make test` runs: one line that breaks the table must fail it."""
    copy = tmp_path / "house"
    copy.mkdir()
    subprocess.run(["cp", "-r", str(ROOT / "llamita"), str(ROOT / ".importlinter"), str(copy)], check=True)
    (copy / "llamita/model/cache.py").open("a").write("\nimport llamita.train.run\n")
    command = [str(Path(sys.executable).with_name("lint-imports")), "--config", ".importlinter", "--no-cache"]
    done = subprocess.run(
        command, cwd=copy, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(copy)}
    )
    assert done.returncode == 1 and "model imports config, kernels BROKEN" in done.stdout, done.stdout[-1500:]

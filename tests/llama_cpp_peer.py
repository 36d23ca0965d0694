"""llama.cpp's own tokenizer for the peer lane: the library that npm's node-llama-cpp ships built, run by Node.

A process of its own, so a crash in C++ is one failed test and not the end of pytest. Nothing is fetched.
"""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_suffix(".mjs")
LIBRARY = Path(__file__).parents[1] / ".venv/llama.cpp/node_modules/node-llama-cpp/dist/index.js"
MISSING = "llama.cpp is not installed in .venv/llama.cpp: run `make .venv/peers`, which needs npm and Node 20 or later"
SECONDS = 300


class LlamaCpp:
    """llama.cpp with the vocabulary of one GGUF file, which may hold no tensors. Skips the test if not installed.

    What it says of the vocabulary are attributes: `eog` the ids that end a generation, `control` those of control
    tokens; `release` is llama.cpp's own version.
    """

    def __init__(self, path: str | Path):
        if not LIBRARY.is_file() or not shutil.which("node"):
            pytest.skip(MISSING)
        self._path = Path(path)
        said = self._ask()
        self.release: str = said["release"]
        self.n_vocab: int = said["n_vocab"]
        self.add_bos: bool = said["add_bos"]
        self.bos: int = said["bos"]
        self.eos: int = said["eos"]
        self.eot: int = said["eot"]
        self.eog: set[int] = set(said["eog"])
        self.control: list[int] = said["control"]

    def tokenize(self, texts: list[str], special: bool = False) -> list[list[int]]:
        """Ids of each text, with no BOS; the names of special tokens are plain text unless `special`.

        Lone surrogates are not for this: JavaScript makes U+FFFD of them before llama.cpp sees the text.
        """
        return self._ask(texts=texts, special=special)["ids"]

    def detokenize(self, ids: list[list[int]]) -> list[str]:
        """Text of each list of ids, special tokens by their names."""
        return self._ask(ids=ids)["texts"]

    def _ask(self, **question) -> dict:
        done = subprocess.run(
            ["node", PROGRAM, LIBRARY, self._path],
            input=json.dumps({"texts": [], "special": False, "ids": []} | question),
            capture_output=True,
            encoding="utf-8",
            timeout=SECONDS,
        )
        assert done.returncode == 0, f"llama.cpp on {self._path} ended with {done.returncode}: {done.stderr[-2000:]}"
        return json.loads(done.stdout)

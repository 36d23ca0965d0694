"""llama.cpp as an independent reader of GGUF files and as their quantizer, through the package llama-cpp-python.

It runs in a process of its own (this module as a program), because it ends its process on a file that it dislikes.
Shapes: B rows, T tokens, V vocab_size.
"""

import ctypes
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llamita.formats.gguf_header import read_header

# What llama.cpp alone makes -> its number for such a file (llama.h, `enum llama_ftype`).
QUANTIZERS = {"Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18}
ALL_F32 = 0  # the same enum, and ggml's number for the type
THREADS = 2
MICRO_BATCH = 16  # larger ones go to BLAS where that is linked, which rounds otherwise
ERROR, CONTINUED = 4, 5  # levels of ggml's log
MARK = "error: "


@dataclass(frozen=True)
class Answer:
    """What llama.cpp makes of a file. Ids that the file does not name are -1.

    With block kinds and 16-bit weights llama.cpp rounds what it multiplies them with (to 8 or 16 bits), and over the
    layers that grows to some tenths of the logits' std. So its logits are given twice: as anyone gets them from the
    file, and from a float32 copy that llama.cpp itself unpacks, which comes as near to ours as two programs can.
    """

    exact_BTV: Tensor  # float32, from the float32 copy, as is the reply
    logits_BTV: Tensor  # float32, from the file as it is; the same where that is float32
    reply: list[int]
    ids: list[list[int]]  # of each text, without BOS, the names of special tokens as plain text
    ids_with_bos: list[list[int]]  # of each text, as a text begins for this model
    texts: list[str]  # of `ids`
    dialog: list[int] | None  # None without a chat template or messages
    num_tokens: int
    bos_id: int
    eos_id: int
    eot_id: int
    pad_id: int
    stop_ids: list[int]
    adds_bos: bool
    chat_template: str | None
    rope_theta: float | None
    max_seq_len: int


def version() -> str | None:
    """Of llama-cpp-python; None where it is not installed."""
    try:
        return importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        return None


def ask(
    path: Path, tokens_BT: Tensor, prompt_length: int, reply_length: int, texts: Sequence[str], messages: Sequence[Any]
) -> Answer:
    """Load a GGUF file in llama.cpp, compute on the CPU, and ask for all that a proof compares.

    The reply continues the first `prompt_length` tokens of row 0 greedily, `reply_length` tokens at most, a stop
    token included. The float32 copy lies beside the file meanwhile. Raises ValueError with llama.cpp's reason when it
    cannot, and as `read_header`.
    """
    question = dict(tokens=tokens_BT.tolist(), prompt_length=prompt_length, reply_length=reply_length)
    exact = all(tensor.kind == "F32" for tensor in read_header(path)[1].values())
    with TemporaryDirectory(dir=path.parent, prefix=".llama.cpp-") as name:
        folder = Path(name)
        _run(question | dict(path=str(path), exact=exact, texts=list(texts), messages=list(messages), folder=name))
        exact_BTV, logits_BTV = (
            torch.from_numpy(np.load(folder / name)) for name in ("exact.npy", "exact.npy" if exact else "stored.npy")
        )
        return Answer(exact_BTV, logits_BTV, **json.loads((folder / "answer.json").read_text()))


def require(kind: str) -> None:
    """Raises ValueError where llama.cpp, which alone makes `kind`, is not installed."""
    if not version():
        raise ValueError(f"{kind} is made by llama.cpp's own quantizer: pip install llama-cpp-python")


def quantize(source: Path, out: Path, kind: str) -> list[str]:
    """Write the GGUF file `source` to `out` as `kind`, one of QUANTIZERS.

    Returns what the user should know, a line each: rows that are no multiple of 256 are stored as another kind.
    Raises ValueError with llama.cpp's reason when it cannot.
    """
    require(kind)
    _run(dict(path=str(source), out=str(out), ftype=QUANTIZERS[kind]))
    matrices = [tensor.kind for tensor in read_header(out)[1].values() if len(tensor.size) > 1]
    others = Counter(stored for stored in matrices if not stored.endswith("_K"))
    return [
        f"{count} of {len(matrices)} matrices are stored as {stored}: their rows are no multiple of 256"
        for stored, count in others.items()
    ]


def _run(question: dict[str, Any]) -> None:
    """Have this module answer as a program, which finds what Python finds here. Raises ValueError with its reason."""
    # Threads that wait actively slow each other by ten times on a busy machine.
    settings = dict(PYTHONPATH=os.pathsep.join(sys.path), GGML_NO_BACKTRACE="1", OMP_WAIT_POLICY="passive")
    done = subprocess.run(
        ["env", *(f"{name}={value}" for name, value in settings.items()), sys.executable, "-P", "-m", __name__],
        input=json.dumps(question).encode(),
        capture_output=True,
    )
    if done.returncode:
        lines = [line.strip() for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
        # The first error is the cause; an abort and an exception leave their words on the last line.
        errors = [line.removeprefix(MARK) for line in lines if line.startswith(MARK)]
        reason = (errors or lines[-1:] or [f"it ended with {done.returncode}"])[0]
        files = " -> ".join(question[name] for name in ("path", "out") if name in question)
        raise ValueError(f"llama.cpp fails on {files}: {reason}")


class _File:
    """In the other process: a file open in llama.cpp, with a context of `length` tokens."""

    def __init__(self, lib: Any, path: str, length: int):
        self.lib = lib
        params = lib.llama_model_default_params()
        params.n_gpu_layers = 0
        params.use_extra_bufts = False  # no second copy of the weights in another order
        self.model = lib.llama_model_load_from_file(os.fsencode(path), params)
        if not self.model:
            raise ValueError("the file does not load")
        self.vocab = lib.llama_model_get_vocab(self.model)
        self.num_tokens = lib.llama_vocab_n_tokens(self.vocab)
        params = lib.llama_context_default_params()
        params.n_ctx = params.n_batch = length
        params.n_ubatch = MICRO_BATCH
        params.n_threads = params.n_threads_batch = THREADS
        params.type_k = params.type_v = ALL_F32
        params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.offload_kqv = params.op_offload = False
        self.context = lib.llama_init_from_model(self.model, params)
        if not self.context:
            raise ValueError("there is no memory for its context")
        self.batch = lib.llama_batch_init(length, 0, 1)
        for i in range(length):
            self.batch.n_seq_id[i], self.batch.seq_id[i][0], self.batch.logits[i] = 1, 0, True

    def logits(self, tokens: Sequence[int], start: int = 0) -> np.ndarray:
        """Of every token, [T, V]; they follow the `start` tokens of the calls before."""
        if start == 0:
            self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        self.batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            self.batch.token[i], self.batch.pos[i] = token, start + i
        if code := self.lib.llama_decode(self.context, self.batch):
            raise ValueError(f"computing ends with code {code}")
        return np.ctypeslib.as_array(self.lib.llama_get_logits(self.context), (len(tokens), self.num_tokens)).copy()

    def reply(self, prompt: list[int], length: int) -> list[int]:
        row, new = list(prompt), self.logits(prompt)
        while True:
            row.append(int(new[-1].argmax()))
            if len(row) == len(prompt) + length or self.lib.llama_vocab_is_eog(self.vocab, row[-1]):
                return row[len(prompt) :]
            new = self.logits(row[-1:], len(row) - 1)

    def ids(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        data = text.encode()
        ids = (self.lib.llama_token * (len(data) + 8))()
        count = self.lib.llama_tokenize(self.vocab, data, len(data), ids, len(ids), add_special, parse_special)
        return ids[:count]

    def text(self, ids: list[int]) -> str:
        lib, buffer, data = self.lib, ctypes.create_string_buffer(1 << 16), b""
        if lib.llama_vocab_type(self.vocab) == lib.LLAMA_VOCAB_TYPE_SPM:
            row = (lib.llama_token * len(ids))(*ids)
            length = lib.llama_detokenize(self.vocab, row, len(ids), buffer, len(buffer), False, True)
            return buffer.raw[:length].decode(errors="replace")
        for token in ids:  # at once, llama.cpp would drop blanks before punctuation here
            length = lib.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, True)
            data += buffer.raw[:length]
        return data.decode(errors="replace")

    def dialog(self, template: str, messages: list[Any]) -> list[int]:
        """As llama-cpp-python writes it, with one BOS where the model has one."""
        formatter = importlib.import_module("llama_cpp.llama_chat_format").Jinja2ChatFormatter
        bos, eos = (
            self.lib.llama_vocab_get_text(self.vocab, token).decode() if token >= 0 else ""
            for token in (self.lib.llama_vocab_bos(self.vocab), self.lib.llama_vocab_eos(self.vocab))
        )
        text = formatter(template, eos_token=eos, bos_token=bos)(messages=messages).prompt
        return self.ids(text, add_special=not (bos and text.startswith(bos)), parse_special=True)

    def facts(self) -> dict[str, Any]:
        lib, buffer = self.lib, ctypes.create_string_buffer(64)
        found = lib.llama_model_meta_val_str(self.model, b"llama.rope.freq_base", buffer, len(buffer)) >= 0
        template = lib.llama_model_chat_template(self.model, None)
        return {
            "num_tokens": self.num_tokens,
            **{f"{name}_id": getattr(lib, f"llama_vocab_{name}")(self.vocab) for name in ("bos", "eos", "eot", "pad")},
            "stop_ids": [i for i in range(self.num_tokens) if lib.llama_vocab_is_eog(self.vocab, i)],
            "adds_bos": lib.llama_vocab_get_add_bos(self.vocab),
            "chat_template": None if template is None else template.decode(),
            "rope_theta": float(buffer.value) if found else None,
            "max_seq_len": lib.llama_model_n_ctx_train(self.model),
        }


def _quantize(lib: Any, path: str, out: str, ftype: int) -> None:
    params = lib.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = ftype, True
    if code := lib.llama_model_quantize(os.fsencode(path), os.fsencode(out), ctypes.byref(params)):
        raise ValueError(f"quantizing ends with code {code}")


def _answer(
    lib: Any, path: str, exact: bool, folder: str, tokens: list[list[int]], prompt_length: int, reply_length: int,
    texts: list[str], messages: list[Any],
) -> None:  # fmt: skip
    length = max(len(tokens[0]), prompt_length + reply_length)
    file = _File(lib, path, length)
    answer = file.facts()
    ids = [file.ids(text) for text in texts]
    answer |= dict(ids=ids, ids_with_bos=[file.ids(text, add_special=True) for text in texts])
    answer["texts"] = [file.text(row) for row in ids]
    template = answer["chat_template"]
    answer["dialog"] = file.dialog(template, messages) if template and messages else None
    if not exact:
        np.save(Path(folder, "stored.npy"), np.stack([file.logits(row) for row in tokens]))
        copy = str(Path(folder, "f32.gguf"))
        _quantize(lib, path, copy, ALL_F32)
        file = _File(lib, copy, length)
    np.save(Path(folder, "exact.npy"), np.stack([file.logits(row) for row in tokens]))
    answer["reply"] = file.reply(tokens[0][:prompt_length], reply_length)
    Path(folder, "answer.json").write_text(json.dumps(answer))


def _main() -> None:
    question = json.load(sys.stdin)
    lib = importlib.import_module("llama_cpp")
    level = 0

    @lib.llama_log_callback
    def log(new_level: int, text: bytes, _: Any) -> None:
        nonlocal level
        mark = b"" if new_level == CONTINUED else MARK.encode()
        level = level if new_level == CONTINUED else new_level
        if level == ERROR:
            os.write(2, mark + text)

    lib.llama_log_set(log, None)
    (_quantize if "out" in question else _answer)(lib, **question)


if __name__ == "__main__":
    _main()

"""Proof that a folder holds the model it was written from: read it back in every way at hand and compare.

Shapes: B rows, T tokens, V vocab_size.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamita.formats import hf
from llamita.model.llama import Llama, build
from llamita.model.shape import Shape
from llamita.tokenizer import Tokenizer
from llamita.tokenizer.chat import render

SEED, NUM_ROWS, NUM_TOKENS = 0, 2, 64
NUM_PROMPT, NUM_REPLY = 8, 16
CONFIGS = ("config.json", "generation_config.json")
# In units of the logits' std where that is above 1. Measured in float32 at std 1.3: right implementations are
# 1e-5 apart; rotary rows in the wrong order cost 6.8, missing rotary scaling 0.04 within 16 tokens.
MAX_LOGIT_DIFF = 1e-4
# Logits off by d cost a KL divergence of at most about d^2.
MAX_KL = MAX_LOGIT_DIFF**2

# Where tokenizers are known to part: blanks, digits, contractions, scripts, emoji, control tokens as text.
STRINGS = (
    "",
    " ",
    "\n\n\n  \n\t x",
    "line\r\nline\rline  \n",
    "   leading, trailing   ",
    "Hello, world! It's we'll I'M they'VE 'tis",
    "1 12 123 1234 12345 3.14159 1,000,000 ١٢٣ Ⅷ ½",
    "def f(x):\n    return {'a': x[0]}  # done\n",
    "café cafe\u0301 naïve Straße İstanbul ﬁ",
    "Привет мир Γειά שלום مرحبا",
    "你好\uff0c世界。こんにちは 안녕하세요 สวัสดี नमस्ते",
    "👍🏽 👩\u200d👩\u200d👧\u200d👦 🇫🇷 ☃",
    "nbsp\u00a0zwsp\u200bbom\ufeffnel\u0085ls\u2028end",
    "\x00\x01\x7f",
    "a" * 100 + " " * 50 + "!" * 30,
    "<|begin_of_text|> <|eot_id|><|end_of_text|> <|reserved_special_token_0|>",
)
MESSAGES = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 2?\nSay why. 👍"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "Спасибо!"},
)


@dataclass
class Reading:
    """What one reader makes of a folder: logits in float32, a greedy reply, and facts that must be equal.

    `margins` are our reader's alone: at each step of the reply, the best logit less the second best.
    """

    logits_BTV: Tensor
    reply: list[int]
    facts: dict[str, Any]
    margins: list[float] = dataclasses.field(default_factory=list)


def prove(model: Llama, tokenizer: Tokenizer, folder: Path | str) -> dict[str, Any]:
    """Load `folder` with our reader and, where installed, transformers; write and return what was compared.

    Logits are compared in float32, from weights rounded to the folder's dtype; two more copies must fit in
    memory. Raises ValueError naming the first field, tensor or token that differs, and leaves no proof.
    """
    folder = Path(folder)
    (folder / "proof.json").unlink(missing_ok=True)
    _same_shape(model.shape, hf.read_shape(folder))
    loaded = hf.read(folder, dtype=None)
    dtype = loaded.tok_embeddings.weight.dtype
    rounded = _same_tensors(model, loaded)
    tokens_BT = _tokens(model.shape, tokenizer)
    controls = _controls(tokenizer.bos_id, list(tokenizer.stop_ids))
    expected = _of_llamita(rounded, tokenizer, {name: controls for name in CONFIGS}, tokens_BT)
    expected.facts |= {f"text of the ids of {text!r}": text for text in STRINGS}
    for name in ("ids with BOS", "ids of a dialog"):
        if (count := expected.facts[name].count(tokenizer.bos_id)) != 1:
            raise ValueError(f"{name}: there are {count} BOS tokens, there must be one")
    del rounded
    configs = {name: _controls(**hf.read_json(folder / name)) for name in CONFIGS}
    ours = _of_llamita(loaded.float(), Tokenizer.load(folder), configs, tokens_BT)
    del loaded
    readers: dict[str, Any] = {"llamita": _compare("llamita", expected, ours)}
    try:
        theirs = _of_transformers(folder, tokens_BT)
    except Exception as error:  # whatever stops a foreign reader is a fault of the folder
        reason = str(error).partition("\n")[0]
        raise ValueError(f"transformers cannot read the folder: {type(error).__name__}: {reason}") from error
    readers["transformers"] = "not installed"
    if theirs:
        found = {"version": importlib.metadata.version("transformers")}
        readers["transformers"] = found | _compare("transformers", expected, theirs)
    proof = {
        "readers": readers,
        "dtype": str(dtype).removeprefix("torch."),
        "bounds": {"max_logit_diff": MAX_LOGIT_DIFF, "mean_kl": MAX_KL},
        "tokens": {"rows": NUM_ROWS, "length": tokens_BT.shape[1], "seed": SEED},
        "strings": len(STRINGS),
        "sha256": {path.name: _sha256(path) for path in sorted(folder.iterdir()) if path.is_file()},
    }
    aside = folder / ".proof.json.tmp"
    aside.write_text(json.dumps(proof, indent=2) + "\n")
    os.replace(aside, folder / "proof.json")
    return proof


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _same_shape(expected: Shape, found: Shape) -> None:
    for field in dataclasses.fields(Shape):
        wanted, got = getattr(expected, field.name), getattr(found, field.name)
        if wanted != got:
            raise ValueError(f"config.json gives {field.name} {got}, the model has {wanted}")


def _same_tensors(model: Llama, loaded: Llama) -> Llama:
    """`model` in float32 on the CPU, rounded to the dtype of `loaded`; the two must be equal bit by bit."""
    rounded = build(model.shape)
    found = dict(loaded.named_parameters())
    with torch.no_grad():
        for (name, weight), copy in zip(model.named_parameters(), rounded.parameters(), strict=True):
            stored = weight.to("cpu", found[name].dtype)
            if not stored.isfinite().all():
                raise ValueError(f"tensor {name} holds values that are not finite in {stored.dtype}")
            if not torch.equal(stored.view(torch.uint8), found[name].view(torch.uint8)):
                diff = (stored.double() - found[name].double()).abs()
                raise ValueError(f"tensor {name} differs in {diff.count_nonzero()} values, by up to {diff.max():.3g}")
            copy.copy_(stored)
    return rounded


def _tokens(shape: Shape, tokenizer: Tokenizer) -> Tensor:
    generator = torch.Generator().manual_seed(SEED)
    size = (NUM_ROWS, min(NUM_TOKENS, shape.max_seq_len))
    tokens_BT = torch.randint(shape.vocab_size, size, generator=generator)
    tokens_BT[:, 0] = tokenizer.bos_id
    return tokens_BT


@torch.no_grad()
def _of_llamita(model: Llama, tokenizer: Tokenizer, configs: dict[str, Any], tokens_BT: Tensor) -> Reading:
    """Read by our own code; `configs` holds what the two JSON files say of control tokens."""
    row, reply, margins = tokens_BT[:1, :NUM_PROMPT], list[int](), list[float]()
    while len(reply) < NUM_REPLY and tokenizer.stop_ids.isdisjoint(reply):
        best = model(row)[0, -1].topk(2)
        margins.append(float(best.values[0] - best.values[1]))
        reply.append(int(best.indices[0]))
        row = torch.cat((row, best.indices[:1].view(1, 1)), dim=1)
    facts = configs | {
        "bos, eos, pad tokens": [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id],
        "number of tokens": tokenizer.vocab_size,
        "tied head": model.output.weight is model.tok_embeddings.weight,
        "ids with BOS": tokenizer.encode("one BOS", bos=True),
        "ids of a dialog": render(tokenizer, MESSAGES, reply=True)[0],
    }
    for text in STRINGS:
        ids = tokenizer.encode(text)
        facts |= {f"ids of {text!r}": ids, f"text of the ids of {text!r}": tokenizer.decode(ids)}
    return Reading(model(tokens_BT), reply, facts, margins)


@torch.no_grad()
def _of_transformers(folder: Path, tokens_BT: Tensor) -> Reading | None:
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError:
        return None
    transformers.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    if lost := [name for problem in loading.values() for name in problem]:
        raise ValueError(f"no place or no value for the tensor {lost[0]}")
    prompt = tokens_BT[:1, :NUM_PROMPT]
    row = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=NUM_REPLY)
    facts = {
        "bos, eos, pad tokens": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
        "number of tokens": len(tokenizer),
        "tied head": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        "ids with BOS": tokenizer("one BOS")["input_ids"],
        "ids of a dialog": tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"],
        "config.json": _controls(**model.config.to_dict()),
        "generation_config.json": _controls(**model.generation_config.to_dict()),
    }
    for text in STRINGS:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        facts |= {f"ids of {text!r}": ids, f"text of the ids of {text!r}": tokenizer.decode(ids)}
    return Reading(model(tokens_BT).logits, row[0, NUM_PROMPT:].tolist(), facts)


def _controls(bos_token_id: Any = None, eos_token_id: Any = None, **_: Any) -> list[Any]:
    """[BOS, all stops] as a config states them."""
    return [bos_token_id, sorted(eos_token_id, key=str) if isinstance(eos_token_id, list) else [eos_token_id]]


def _compare(reader: str, expected: Reading, found: Reading) -> dict[str, Any]:
    """The differences in numbers. Raises ValueError naming the reader and the first thing out of bounds."""
    for name, wanted in expected.facts.items():
        if found.facts[name] != wanted:
            raise ValueError(f"{reader} reads {name} as {found.facts[name]!r}, not {wanted!r}")
    diff_BTV = (found.logits_BTV.double() - expected.logits_BTV.double()).abs()
    log_p_BTV, log_q_BTV = (x.logits_BTV.double().log_softmax(-1) for x in (expected, found))
    kl = float((log_p_BTV.exp() * (log_p_BTV - log_q_BTV)).sum(-1).mean())
    scale, worst = max(1.0, float(expected.logits_BTV.std())), float(diff_BTV.max())
    if not (worst <= MAX_LOGIT_DIFF * scale and kl <= MAX_KL * scale**2):
        raise ValueError(
            f"{reader} computes other logits: off by up to {worst:.3g} (bound {MAX_LOGIT_DIFF * scale:.3g}), "
            f"mean KL {kl:.3g} (bound {MAX_KL * scale**2:.3g})"
        )
    for step, (wanted, got) in enumerate(zip_longest(expected.reply, found.reply)):
        if wanted != got and (wanted is None or expected.margins[step] > 2 * MAX_LOGIT_DIFF * scale):
            raise ValueError(f"{reader} continues with token {got} at step {step}, not {wanted}")
        if wanted != got:  # a tie within the bound: what follows may part
            break
    return {
        "max_logit_diff": worst,
        "mean_logit_diff": float(diff_BTV.mean()),
        "mean_kl": kl,
        "reply_tokens": len(expected.reply),
        "equal_facts": len(expected.facts),
    }

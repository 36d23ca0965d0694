"""What independent readers make of an export: transformers of a Hugging Face folder, llama.cpp of a GGUF file.

Shapes: B rows, T tokens, V vocab_size.
"""

import dataclasses
import importlib
import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamita.formats import llama_cpp
from llamita.formats.gguf_header import in_float32

NUM_PROMPT, NUM_REPLY = 8, 16

# What logits are computed on.
TEXT = """A llama is a small camel that walks in the mountains. It carries wool, hay and letters, and it hums when it is
tired. In 1532 the first ships came; by then people had kept llamas for 4,000 years. "Why does it spit?" asked Ana. "It
spits at other llamas," said her aunt, "mostly over food." Die Herde zieht im Regen weiter, et le berger chante.
def herd(n): return [f"llama {i}" for i in range(n)]  # one name for each
"""

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
    "<|begin_of_text|> <|eot_id|><|end_of_text|> <|reserved_special_token_0|> <s> </s> <|im_end|>",
)
MESSAGES = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 2?\nSay why. 👍"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "Спасибо!"},
)


@dataclass
class Reading:
    """What one reader makes of an export: logits in float32, a greedy reply, and facts that must be equal.

    `margins` are our reader's alone: at each step of the reply, the best logit less the second best. `as_it_is` is
    llama.cpp's alone: logits with the roundings of its own that stored kinds below float32 bring.
    """

    logits_BTV: Tensor
    reply: list[int]
    facts: dict[str, Any]
    margins: list[float] = dataclasses.field(default_factory=list)
    as_it_is_BTV: Tensor | None = None


def controls(bos_token_id: Any = None, eos_token_id: Any = None, **_: Any) -> list[Any]:
    """[BOS, all stops] as a config states them."""
    return [bos_token_id, sorted(eos_token_id, key=str) if isinstance(eos_token_id, list) else [eos_token_id]]


def of_tokenizers(folder: Path) -> dict[str, Any] | None:
    """What the tokenizers library makes of tokenizer.json, which our reader passes over where tokenizer.model lies.

    None where it is not installed. Raises ValueError where it cannot read the file.
    """
    try:
        library: Any = importlib.import_module("tokenizers")
    except ImportError:
        return None
    try:
        tokenizer = library.Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises nothing narrower
        reason = str(error).partition("\n")[0]
        raise ValueError(f"tokenizers cannot read tokenizer.json: {reason}") from None
    facts = {
        "number of tokens": max(tokenizer.get_vocab().values()) + 1,
        "ids with BOS": tokenizer.encode("one BOS").ids,
    }
    tokenizer.encode_special_tokens = True
    return facts | {f"ids of {text!r}": tokenizer.encode(text, add_special_tokens=False).ids for text in STRINGS}


def transformers_version() -> str | None:
    """None where it is not installed."""
    try:
        importlib.import_module("transformers")
    except ImportError:
        return None
    return importlib.metadata.version("transformers")


@torch.no_grad()
def of_transformers(folder: Path, tokens_BT: Tensor, messages: Any) -> Reading:
    """A Hugging Face folder in stock transformers, in float32. Raises whatever stops it."""
    transformers: Any = importlib.import_module("transformers")
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
        "config.json": controls(**model.config.to_dict()),
        "generation_config.json": controls(**model.generation_config.to_dict()),
    }
    if messages:
        facts["ids of a dialog"] = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    for text in STRINGS:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        facts |= {f"ids of {text!r}": ids, f"text of the ids of {text!r}": tokenizer.decode(ids)}
    return Reading(model(tokens_BT).logits, row[0, NUM_PROMPT:].tolist(), facts)


def of_llama_cpp(folder: Path, tokens_BT: Tensor, messages: Any) -> Reading:
    """A GGUF file in llama.cpp, its weights unpacked to float32 by llama.cpp itself. Raises ValueError."""
    [path] = folder.glob("*.gguf")
    found = llama_cpp.ask(path, tokens_BT, NUM_PROMPT, NUM_REPLY, [*STRINGS, "one BOS"], messages)
    facts = {
        "number of rows": found.num_tokens,
        "bos, eos, pad tokens": [None if i < 0 else i for i in (found.bos_id, found.eos_id, found.pad_id)],
        "stop tokens": found.stop_ids,
        "bos, eos, add_bos": [None if found.bos_id < 0 else found.bos_id, found.eos_id, found.adds_bos],
        "chat template": found.chat_template,
        "ids with BOS": found.ids_with_bos[-1],
        "rope_theta": found.rope_theta and in_float32(found.rope_theta),
        "max_seq_len": found.max_seq_len,
    }
    if messages:
        facts["ids of a dialog"] = found.dialog
    for text, ids, back in zip(STRINGS, found.ids, found.texts, strict=False):
        facts |= {f"ids of {text!r}": ids, f"text of the ids of {text!r}": back}
    return Reading(found.exact_BTV, found.reply, facts, as_it_is_BTV=found.logits_BTV)


READERS = {"transformers": of_transformers, "llama.cpp": of_llama_cpp}

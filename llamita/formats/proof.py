"""Proof that an export holds the model it was written from: read it back in every way at hand and compare.

Shapes: B rows, T tokens, V vocab_size.
"""

import dataclasses
import os
import shutil
from contextlib import suppress
from itertools import cycle, islice, takewhile, zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamita.formats import gguf, llama_cpp, open, readers
from llamita.formats.config_json import generation_config
from llamita.formats.files import read_json, sha256, write_json
from llamita.formats.gguf_header import in_float32
from llamita.formats.readers import MESSAGES, NUM_PROMPT, NUM_REPLY, STRINGS, TEXT, Reading, controls
from llamita.formats.weights import DTYPES, Weights
from llamita.model.llama import Llama
from llamita.model.shape import Shape
from llamita.tokenizer.chat import render

NUM_ROWS, NUM_TOKENS = 2, 64
CONFIGS = ("config.json", "generation_config.json")
# Root mean square of what llama.cpp's own quantizer may change, of the tensor's: it is 0.02 (Q6_K) to 0.08 (Q4_K)
# for normally distributed weights, and 1.4 for another tensor of the same kind.
MAX_QUANTIZATION_RMS = 0.15
ROWS = 4096  # compared at a time, so that no third copy of a tensor is needed
# Largest difference of logits in units of their std where that is above 1, and mean KL (off by d, they differ by at
# most about d^2). Measured in float32 at std 1.3: transformers is 1e-5 away, llama.cpp 4e-5; rotary rows in the wrong
# order cost 6.8, missing rotary scaling 0.04 within 16 tokens.
BOUNDS = {"transformers": (1e-4, 1e-8), "llama.cpp": (5e-4, 2.5e-7)}
# Mean KL over the logits' variance (where that is above 1) when llama.cpp also rounds what it multiplies such weights
# with. Measured on SmolLM2 and random models: F16 4e-7, BF16 3e-5, blocks 2e-4 to 7.5e-4; q rows permuted 0.14.
KL_AS_IT_IS = {"F32": 1e-8, "F16": 5e-6, "BF16": 2e-4}
KL_OF_BLOCKS = 5e-3
BYTES_PER_PARAM, BYTES_PER_LOGIT = 4.5, 4


def prove(weights: Weights, tokenizer: Any, folder: Path, form: str, kind: str, *, max_memory: float) -> dict:
    """Compare the export in `folder` ("hf", "meta" or "gguf", stored as `kind`) with what it was made from.

    Our own reader compares every tensor; an independent one (transformers, llama.cpp), where there is one and where
    the model fits into `max_memory` bytes, computes logits and a reply. Returns what was compared and which readers
    were not at hand, for `seal`. Raises ValueError naming the first field, tensor or token that differs.
    """
    found = open.read(folder)
    _same_shape(weights.shape, found.shape)
    exact = kind not in llama_cpp.QUANTIZERS
    if exact:
        _same_kinds(gguf.stored_kinds(weights, kind) if form == "gguf" else dict.fromkeys(found.kinds, kind), found)
    compared = _same_tensors(weights, found, exact=exact)
    expected = facts(tokenizer)
    _one_bos(tokenizer, expected)
    stated = _to_be_stated(tokenizer, form, kind)
    _equal_facts("llamita", stated, _stated(folder, form), all_of_them=True)
    _equal_facts("llamita", expected, facts(open.tokenizer(folder)), all_of_them=True)
    expected |= stated
    told: dict[str, Any] = {"llamita": {"equal_tensors": compared, "equal_facts": len(expected)}}
    if form != "gguf":
        told["tokenizers"] = readers.of_tokenizers(folder) or "not installed"
        if isinstance(told["tokenizers"], dict):
            _equal_facts("tokenizers", expected, told["tokenizers"])
            told["tokenizers"] = {"equal_facts": len(told["tokenizers"])}
    proof = {"format": form, "kinds": sorted(set(found.kinds.values())), "readers": told}
    return proof | _computed(weights, found, tokenizer, folder, form, expected, max_memory, told)


def seal(folder: Path, proof: dict[str, Any]) -> None:
    """Write proof.json with the hash of every other file, whole or not at all."""
    hashes = {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.is_file()}
    aside = folder / ".proof.json.tmp"
    write_json(aside, proof | {"sha256": hashes})
    os.replace(aside, folder / "proof.json")


def memory_needed(shape: Shape) -> float:
    """Bytes to compute logits: one float32 model at a time, the logits of two, and room for differences."""
    return BYTES_PER_PARAM * shape.num_params + 4 * BYTES_PER_LOGIT * NUM_ROWS * NUM_TOKENS * shape.vocab_size


def _same_shape(expected: Shape, found: Shape) -> None:
    for field in dataclasses.fields(Shape):
        wanted, got = getattr(expected, field.name), getattr(found, field.name)
        if wanted != got:
            raise ValueError(f"the export gives {field.name} {got}, the model has {wanted}")


def _same_kinds(expected: dict[str, str], found: Weights) -> None:
    for name, kind in expected.items():
        if found.kinds[name] != kind:
            raise ValueError(f"tensor {name} is stored as {found.kinds[name]}, not as {kind}")


def _same_tensors(weights: Weights, found: Weights, *, exact: bool) -> int:
    """Every tensor read back equals the original rounded to its kind, bit by bit; one that llama.cpp quantized is
    near it. Returns how many were compared.
    """
    for name, kind in found.kinds.items():
        _same_tensor(name, kind, weights.load(name), found.load(name), exact or kind in DTYPES)
    return len(found.kinds)


def _same_tensor(name: str, kind: str, original: Tensor, stored: Tensor, exact: bool) -> None:
    num_wrong, worst, change, size = 0, 0.0, 0.0, 0.0
    for part, back in zip(original.split(ROWS), stored.split(ROWS), strict=True):
        rounded = gguf.stored(part, kind) if exact else part
        if not all(end.isfinite() for end in (*rounded.aminmax(), *(() if exact else back.aminmax()))):
            raise ValueError(f"tensor {name} holds values that are not finite in {kind}")
        if exact and torch.equal(rounded.view(torch.uint8), back.contiguous().view(torch.uint8)):
            continue
        diff = (rounded.double() - back.double()).abs()
        num_wrong, worst = num_wrong + max(1, int(diff.count_nonzero())), max(worst, float(diff.max()))
        change, size = change + float(diff.square().sum()), size + float(rounded.double().square().sum())
    if exact and num_wrong:
        raise ValueError(f"tensor {name} differs in {num_wrong} values, by up to {worst:.3g}")
    if not exact and not change <= MAX_QUANTIZATION_RMS**2 * size:
        rms = (change / size) ** 0.5 if size else float("inf")
        raise ValueError(f"tensor {name} differs by {rms:.3g} of its size after quantization to {kind}")


def facts(tokenizer: Any) -> dict[str, Any]:
    """What a tokenizer says, by the names under which every reader is asked."""
    said: dict[str, Any] = {
        "bos, eos, pad tokens": [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id],
        "number of tokens": tokenizer.vocab_size,
        "stop tokens": sorted(tokenizer.stop_ids),
        "ids with BOS": tokenizer.encode("one BOS", bos=True),
    }
    if messages := dialog(tokenizer):
        said["ids of a dialog"] = render(tokenizer, messages, reply=True)[0]
    for text in STRINGS:
        ids = tokenizer.encode(text)
        said |= {f"ids of {text!r}": ids, f"text of the ids of {text!r}": tokenizer.decode(ids)}
    return said


def dialog(tokenizer: Any) -> tuple[dict[str, str], ...]:
    """The messages that its chat template is tried on: some templates refuse a system's. Empty without a template."""
    for messages in (MESSAGES, MESSAGES[1:]) if tokenizer.chat_template else ():
        with suppress(ValueError):
            render(tokenizer, messages, reply=True)
            return messages
    return ()


def _to_be_stated(tokenizer: Any, form: str, kind: str) -> dict[str, Any]:
    """What the files must say in so many words, for readers that go by it where ours goes by the vocabulary."""
    template = {"chat template": tokenizer.chat_template}
    if form == "hf":
        stops = controls(tokenizer.bos_id, sorted(tokenizer.stop_ids))
        dtype = str(DTYPES[kind]).removeprefix("torch.")
        return template | {"dtype": [dtype, dtype], "config.json": stops, "generation_config.json": stops,
                           "generation settings": generation_config(tokenizer)}  # fmt: skip
    if form == "gguf":
        return template | {"bos, eos, add_bos": [tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos]}
    return template


def _stated(folder: Path, form: str) -> dict[str, Any]:
    if form == "gguf":
        fields = gguf.read_fields(open.locate(folder)[1])
        keys = ("bos_token_id", "eos_token_id", "add_bos_token")
        stated = [fields.get(f"tokenizer.ggml.{key}") for key in keys]
        return {"chat template": fields.get("tokenizer.chat_template"), "bos, eos, add_bos": stated}
    template = {"chat template": read_json(folder / "tokenizer_config.json").get("chat_template")}
    if form == "meta":
        return template
    config, generation = (read_json(folder / name) for name in CONFIGS)
    return template | {
        "dtype": [config.get("dtype"), config.get("torch_dtype")],
        "config.json": controls(**config),
        "generation_config.json": controls(**generation),
        "generation settings": generation,
    }


def _one_bos(tokenizer: Any, expected: dict[str, Any]) -> None:
    wanted = int(tokenizer.adds_bos)
    for name in ("ids with BOS", "ids of a dialog"):
        count = len(list(takewhile(lambda token: token == tokenizer.bos_id, expected.get(name, []))))
        if name in expected and count != wanted and (wanted or count > 1):
            raise ValueError(f"{name}: there are {count} BOS tokens, there must be {'one' if wanted else 'none'}")


def _equal_facts(reader: str, expected: dict[str, Any], found: dict[str, Any], *, all_of_them: bool = False) -> None:
    if missing := sorted(expected.keys() - found.keys()) if all_of_them else []:
        raise ValueError(f"{reader} finds no {missing[0]}, which should be {expected[missing[0]]!r}")
    for name, got in found.items():
        if got != expected[name]:
            raise ValueError(f"{reader} reads {name} as {got!r}, not {expected[name]!r}")


def _tokens(shape: Shape, tokenizer: Any) -> Tensor:
    """Rows of ordinary text behind BOS. Random ids would do for a random model, but a trained one magnifies rounding
    on them: on SmolLM2 llama.cpp's differences grow tenfold, and some rows by a hundred.
    """
    length = min(NUM_TOKENS, shape.max_seq_len)
    first = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids = cycle(tokenizer.encode(TEXT))
    return torch.tensor([[*first, *islice(ids, length - len(first))] for _ in range(NUM_ROWS)])


def _computed(
    weights: Weights, found: Weights, tokenizer: Any, folder: Path, form: str, expected: dict, max_memory: float,
    told: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Logits and a greedy reply, ours beside an independent reader's. Fills `told`, a line or numbers a reader."""
    reader, version = {"hf": ("transformers", readers.transformers_version), "gguf": ("llama.cpp", llama_cpp.version),
                       "meta": ("Meta's code", lambda: None)}[form]  # fmt: skip
    told[reader] = "not installed"
    needed = memory_needed(weights.shape)
    if needed > max_memory:
        told[reader] = "not asked, see logits"
        return {"logits": f"not computed: {needed / 2**30:.1f} GiB are needed, {max_memory / 2**30:.1f} may be used"}
    tokens_BT = _tokens(weights.shape, tokenizer)
    with torch.no_grad():
        original_BTV = weights.model()(tokens_BT)
    model = found.model()
    ours = _of_llamita(model, tokenizer.stop_ids, tokens_BT)
    told["llamita"] |= differences(original_BTV, ours.logits_BTV)
    del model, original_BTV
    computed = {"tokens": list(tokens_BT.shape)}
    if not version():
        return computed
    if form == "gguf" and shutil.disk_usage(folder).free < BYTES_PER_PARAM * weights.shape.num_params:
        told[reader] = "not asked: there is no room on the disk for the float32 copy that it makes"
        return computed
    shape = weights.shape
    ours.facts = expected | {"number of rows": shape.vocab_size, "tied head": shape.tied,
                             "rope_theta": in_float32(shape.rope_theta), "max_seq_len": shape.max_seq_len}  # fmt: skip
    try:
        theirs = readers.READERS[reader](folder, tokens_BT, dialog(tokenizer))
    except Exception as error:  # whatever stops a foreign reader is a fault of the export
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{reader} cannot read the export: {type(error).__name__}: {reason}") from error
    told[reader] = {"version": version()} | _also_stops(theirs, tokenizer)
    told[reader] |= compare(reader, ours, theirs, *BOUNDS[reader])
    if theirs.as_it_is_BTV is not None:
        told[reader] |= _as_it_is(ours.logits_BTV, theirs.as_it_is_BTV, set(found.kinds.values()))
    return computed


def _also_stops(theirs: Reading, tokenizer: Any) -> dict[str, Any]:
    """llama.cpp also ends a reply at control tokens that it knows by name from code models, such as <reponame>."""
    stops = theirs.facts.get("stop tokens", [])
    also = {token for token in set(stops) - tokenizer.stop_ids if tokenizer.is_special(token)}
    if also:
        theirs.facts["stop tokens"] = sorted(set(stops) - also)
    return {"also_stops_at": [tokenizer.decode([token]) for token in sorted(also)]} if also else {}


def _as_it_is(ours_BTV: Tensor, theirs_BTV: Tensor, kinds: set[str]) -> dict[str, float]:
    seen = differences(ours_BTV, theirs_BTV)
    bound = max(KL_AS_IT_IS.get(kind, KL_OF_BLOCKS) for kind in kinds) * max(1.0, float(ours_BTV.var()))
    if not seen["mean_kl"] <= bound:
        raise ValueError(f"llama.cpp's rounding costs a mean KL of {seen['mean_kl']:.3g} (bound {bound:.3g})")
    return {f"rounded_{name}": value for name, value in seen.items()}


@torch.no_grad()
def _of_llamita(model: Llama, stop_ids: frozenset[int], tokens_BT: Tensor) -> Reading:
    row, reply, margins = tokens_BT[:1, :NUM_PROMPT], list[int](), list[float]()
    while len(reply) < NUM_REPLY and stop_ids.isdisjoint(reply):
        best = model(row)[0, -1].topk(2)
        margins.append(float(best.values[0] - best.values[1]))
        reply.append(int(best.indices[0]))
        row = torch.cat((row, best.indices[:1].view(1, 1)), dim=1)
    return Reading(model(tokens_BT), reply, {}, margins)


def differences(expected_BTV: Tensor, found_BTV: Tensor) -> dict[str, float]:
    """How far logits are apart: the largest and the mean difference, and the mean KL divergence in nats."""
    worst, total, kl = 0.0, 0.0, 0.0
    pairs = list(zip(expected_BTV.flatten(0, 1), found_BTV.flatten(0, 1), strict=True))
    for expected_V, found_V in pairs:
        diff_V = (found_V.double() - expected_V.double()).abs()
        log_p_V, log_q_V = (x.double().log_softmax(-1) for x in (expected_V, found_V))
        kl += float((log_p_V.exp() * (log_p_V - log_q_V)).sum())
        # torch's maximum keeps a NaN, Python's may lose it
        worst, total = float(torch.maximum(torch.tensor(worst), diff_V.max())), total + float(diff_V.mean())
    return {"max_logit_diff": worst, "mean_logit_diff": total / len(pairs), "mean_kl": kl / len(pairs)}


def compare(reader: str, expected: Reading, found: Reading, max_diff: float, max_kl: float) -> dict[str, Any]:
    """The differences in numbers; the bounds are in units of the logits' std where that is above 1.

    Raises ValueError naming the reader and the first thing out of bounds.
    """
    _equal_facts(reader, expected.facts, found.facts)
    scale = max(1.0, float(expected.logits_BTV.std()))
    seen = differences(expected.logits_BTV, found.logits_BTV)
    worst, kl = seen["max_logit_diff"], seen["mean_kl"]
    if not (worst <= max_diff * scale and kl <= max_kl * scale**2):
        raise ValueError(
            f"{reader} computes other logits: off by up to {worst:.3g} (bound {max_diff * scale:.3g}), "
            f"mean KL {kl:.3g} (bound {max_kl * scale**2:.3g})"
        )
    for step, (wanted, got) in enumerate(zip_longest(expected.reply, found.reply)):
        if wanted != got and (wanted is None or expected.margins[step] > 2 * max_diff * scale):
            raise ValueError(f"{reader} continues with token {got} at step {step}, not {wanted}")
        if wanted != got:  # a tie within the bound: what follows may part
            break
    return seen | {"bound": max_diff * scale, "reply_tokens": len(expected.reply), "equal_facts": len(found.facts)}

"""Is what a run is about to do right? Checks of its text, labels, masks, gradients and first losses, on its own rows.

Each is a function of a Case, most of a model too, and returns a Finding. Shapes: B rows, T tokens, D dim.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice, pairwise
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from llamita.data.loader import batches
from llamita.data.pack import Batch, Rows, Texts
from llamita.data.sampler import Sampler
from llamita.kernels.loss import NO_LOSS
from llamita.model.llama import Llama
from llamita.train.compute import accumulate, rows_of
from llamita.train.objective import PLAIN, Objective, Ways, next_token, num_targets
from llamita.train.run import Run

DOCUMENTS, LONGEST = 20, 20_000  # documents that are decoded and encoded again, and the tokens of the longest of them
STILL = 1e-5  # a hidden state, of rms 1, that moves less has not moved
SEARCHED = 64  # rows among which the one of most documents is looked for
SAME = 1e-3  # of a gradient's norm: what the order of float32 sums may change of it
OVERFIT_STEPS, OVERFIT_TOKENS = 30, 256


class Shown(NamedTuple):
    """A piece of the label view; `style` is "border" for the mark before a document."""

    text: str
    style: Literal["loss", "no loss", "border"]


@dataclass(frozen=True)
class Finding:
    """What a check saw, in one line, and what to do about it."""

    name: str
    status: Literal["ok", "warn", "fail"]
    measured: str
    advice: str = ""
    view: tuple[Shown, ...] = ()


class Tokens(Protocol):
    """What is asked of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def bos_id(self) -> int | None: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def adds_bos(self) -> bool: ...
    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]: ...
    def decode_bytes(self, ids: Sequence[int]) -> bytes: ...


@dataclass(frozen=True)
class Case:
    """What is examined: a run, the rows that it draws, the documents they are made of, and how its loss is made."""

    run: Run
    rows: Sequence[Rows]
    sampler: Sampler
    texts: Texts
    tokenizer: Tokens
    device: torch.device
    objective: Objective = next_token
    ways: Ways = PLAIN

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.run.precision == "fp32" else torch.bfloat16

    def batch(self, num_rows: int) -> Batch:
        """The first rows that the run will see."""
        batch = next(batches(self.rows, self.sampler, first=0, batch_size=num_rows))
        return replace(batch, inputs_BT=batch.inputs_BT.to(self.device), targets_BT=batch.targets_BT.to(self.device))

    def hidden(self, model: Llama, batch: Batch, inputs_BT: Tensor) -> Tensor:
        """What the head reads, [B, T, D] of rms 1, of other tokens in the batch's documents."""
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.run.precision == "bf16"):
            return model.hidden(inputs_BT, self.ways.attend(replace(batch, inputs_BT=inputs_BT))).float()

    def loss(self, model: Llama, batch: Batch) -> Tensor:
        """The mean loss of a target token, in nats."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.run.precision == "bf16"):
            return self.objective(model, batch, self.dtype, self.ways) / max(1, num_targets(batch))


def round_trip(case: Case) -> Finding:
    """Documents of the corpus as text and as ids again: the same ids, BOS and EOS at their ends, none unknown."""
    tokenizer, lengths = case.tokenizer, case.texts.lengths
    begins, wrong, tried = [tokenizer.bos_id] if tokenizer.adds_bos else [], [], 0
    for doc in range(0, len(lengths), max(1, len(lengths) // DOCUMENTS)):
        ids = case.texts.tokens(doc).tolist()
        if max(ids) >= tokenizer.vocab_size:
            wrong.append(f"document {doc} has the id {max(ids)}, and the vocabulary ends at {tokenizer.vocab_size - 1}")
        elif ids[: len(begins)] != begins or ids[-1] != tokenizer.eos_id:
            wrong.append(f"document {doc} lies not between BOS and EOS")
        elif len(ids) <= LONGEST:
            text = tokenizer.decode_bytes(ids[len(begins) : -1]).decode("utf-8", "replace")
            tried += 1
            if tokenizer.encode(text, bos=True, eos=True) != ids:
                wrong.append(f"document {doc} has other ids when its text is encoded again")
    advice = "the corpus was made with another tokenizer: build it again, or name the right one with --tokenizer"
    if wrong:
        return Finding("tokenizer", "fail", wrong[0] + (f", and {len(wrong) - 1} more" * (len(wrong) > 1)), advice)
    return Finding("tokenizer", "ok", f"{tried} documents give the same ids after decoding and encoding")


def labels(case: Case) -> Finding:
    """Every target is the next token of its own document, and documents begin where the rows say."""
    batch = case.batch(case.run.micro_batch_size)
    inputs_BT, targets_BT, bears_BT = batch.inputs_BT, batch.targets_BT, batch.targets_BT != NO_LOSS
    inside_BT = torch.ones_like(bears_BT)
    for row, starts in enumerate(batch.starts):
        inside_BT[row, starts] = False
    moved_BT = inside_BT & bears_BT.roll(1, 1) & targets_BT.roll(1, 1).ne(inputs_BT)
    shifted = int(moved_BT.sum())
    bos = case.tokenizer.bos_id if case.tokenizer.adds_bos else None
    across = 0 if bos is None else int((targets_BT == bos).sum())
    merged = 0 if bos is None else int((inside_BT & (inputs_BT == bos)).sum())
    share, view = bears_BT.float().mean().item(), tuple(_view(case, batch))
    measured = (
        f"{share:.1%} of {targets_BT.numel():,} places bear loss, {sum(map(len, batch.starts)):,} pieces of documents"
    )
    if shifted or across or merged or not share:
        wrong = f"; {shifted} targets are not the next token, {across} cross a border, {merged} borders are not marked"
        return Finding("labels", "fail", measured + wrong, "the rows or their masks are made wrongly", view)
    if share < 0.5:
        return Finding("labels", "warn", measured, "most of a row is padding or masked: shorten --data.seq-len", view)
    return Finding("labels", "ok", measured, view=view)


def _view(case: Case, batch: Batch, documents: int = 3, head: int = 24, tail: int = 6) -> Iterator[Shown]:
    """Beginning and end of the first documents of the batch: tokens that are targets, and those that are not."""
    for row, start, end in islice(_spans(batch), documents):
        inputs, targets = (x_BT[row].tolist() for x_BT in (batch.inputs_BT, batch.targets_BT))
        yield Shown("| ", "border")
        if not any(inputs[start:end]):
            yield Shown("padding", "no loss")
            continue
        tokens = [(inputs[start], False)]
        for at in range(start, end):
            follows = inputs[at + 1] if at + 1 < end else NO_LOSS
            tokens.append((follows, False) if targets[at] == NO_LOSS else (targets[at], True))
        tokens = [token for token in tokens if token[0] != NO_LOSS]
        cut = len(tokens) > head + tail
        for part in (tokens[:head], tokens[-tail:]) if cut else (tokens,):
            for bears, group in groupby(part, lambda token: token[1]):
                text = case.tokenizer.decode_bytes([token for token, _ in group]).decode("utf-8", "replace")
                yield Shown(text, "loss" if bears else "no loss")
            if cut and part[0] is tokens[0]:
                yield Shown(" ... ", "border")


def _spans(batch: Batch) -> Iterator[tuple[int, int, int]]:
    """Row, beginning and end of each document."""
    for row, starts in enumerate(batch.starts):
        yield from ((row, *span) for span in pairwise([*starts, batch.inputs_BT.shape[1]]))


def _others(case: Case, inputs_BT: Tensor, where_BT: Tensor) -> Tensor:
    """Other tokens in some places."""
    return torch.where(where_BT, (inputs_BT + 1) % case.run.shape.vocab_size, inputs_BT)


def _moved(case: Case, model: Llama, batch: Batch, changed_BT: Tensor, watched_BT: Tensor) -> tuple[float, float]:
    """How far hidden states move in the watched places, and anywhere, when the tokens of others are changed."""
    before_BTD = case.hidden(model, batch, batch.inputs_BT)
    after_BTD = case.hidden(model, batch, _others(case, batch.inputs_BT, changed_BT))
    moved_BT = (after_BTD - before_BTD).abs().amax(-1)
    return (moved_BT * watched_BT).max().item(), moved_BT.max().item()


def _sees(name: str, wrongly: float, anywhere: float, what: str) -> Finding:
    measured = f"{what} moves by {wrongly:.1e}; the changed tokens' own by {anywhere:.1f}"
    if not wrongly <= STILL or not anywhere > STILL:
        return Finding(name, "fail", measured, "the attention mask is wrong: nothing that is trained so can be trusted")
    return Finding(name, "ok", measured)


def leaks(case: Case, model: Llama) -> Finding:
    """The tokens of every second document of a row are changed: what the head reads of the others must not move."""
    batch = case.batch(SEARCHED)
    row = max(range(SEARCHED), key=lambda row: len(batch.starts[row]))
    batch, length = rows_of(batch, row, row + 1), case.run.data.seq_len
    if len(batch.starts[0]) < 2:  # then a long document is taken for three
        batch = replace(batch, starts=[[0, length // 3, 2 * length // 3]])
    odd_BT = torch.zeros_like(batch.inputs_BT, dtype=torch.bool)
    for start in batch.starts[0][1:]:
        odd_BT[:, start:] ^= True
    moved = [_moved(case, model, batch, changed_BT, ~changed_BT) for changed_BT in (odd_BT, ~odd_BT)]
    wrongly, anywhere = max(each[0] for each in moved), min(each[1] for each in moved)
    return _sees("leaks", wrongly, anywhere, f"of {len(batch.starts[0])} documents in a row, one beside a changed one")


def causality(case: Case, model: Llama) -> Finding:
    """The second half of the longest document is changed: what the head reads of all before it must not move."""
    batch = case.batch(case.run.micro_batch_size)
    row, start, end = max(_spans(batch), key=lambda span: span[2] - span[1])
    batch = rows_of(batch, row, row + 1)
    at_T, middle = torch.arange(case.run.data.seq_len, device=case.device), (start + end) // 2
    late_BT, before_BT = ((at_T >= middle) & (at_T < end))[None], (at_T < middle)[None]
    return _sees("causality", *_moved(case, model, batch, late_BT, before_BT), "what stands before a changed token")


def accumulation(case: Case, model: Llama) -> Finding:
    """Two rows, of which one has few targets: their gradient at once is that of one after the other."""
    batch = case.batch(2)
    targets_BT = batch.targets_BT.clone()
    targets_BT[0, targets_BT.shape[1] // 4 :] = NO_LOSS
    batch = replace(batch, targets_BT=targets_BT)
    found = []
    for rows in (2, 1):
        accumulate(model, batch, rows, torch.float32, case.objective)
        found.append([weight.grad for weight in model.parameters() if weight.grad is not None])
        model.zero_grad()
    norm, off = (torch.nn.utils.get_total_norm(each) for each in (found[0], torch._foreach_sub(*found)))
    share = (off / norm).item()
    measured = f"the gradients of 2 rows at once and of 1 after 1 differ by {share:.1e} of their norm"
    if not share < SAME:
        return Finding("accumulation", "fail", measured, "a slice's loss must be a sum, divided by the tokens of all")
    return Finding("accumulation", "ok", measured)


@torch.no_grad()
def first_loss(case: Case, model: Llama) -> Finding:
    """A model that knows nothing gives every token 1 / vocab_size: a loss of ln(vocab_size)."""
    loss = case.loss(model, case.batch(case.run.micro_batch_size)).item()
    expected = math.log(case.run.shape.vocab_size)
    off = loss / expected - 1
    measured = f"first loss {loss:.3f}, and ln(vocab_size) is {expected:.3f}"
    if not abs(off) < 0.3:
        advice = "first weights are too large" if not off < 0 else "the model sees what it is to predict"
        return Finding("first loss", "fail", measured, f"{advice}, or they are no first weights")
    if abs(off) > 0.1:
        return Finding("first loss", "warn", measured, "the first steps will only take this back: lengthen the warm-up")
    return Finding("first loss", "ok", measured)


def overfit(case: Case, model: Llama) -> Finding:
    """Trains `model` on a piece of one row at the run's own rate: its loss must fall clearly."""
    batch, length = case.batch(1), min(OVERFIT_TOKENS, case.run.data.seq_len)
    inputs_BT, targets_BT = batch.inputs_BT[:, :length], batch.targets_BT[:, :length]
    batch = Batch(inputs_BT, targets_BT, [[start for start in batch.starts[0] if start < length]], batch.first)
    step = stepper(case, model)
    losses = [step(batch).loss for _ in range(OVERFIT_STEPS)]
    first, last = losses[0], losses[-1]
    measured = f"{OVERFIT_STEPS} steps on {length} tokens take the loss from {first:.3f} to {last:.3f}"
    if not last < 0.98 * first:
        return Finding("overfit", "fail", measured, "what cannot learn one text learns none: look at --optim.lr first")
    if last > 0.8 * first:
        return Finding("overfit", "warn", measured, "it learns slowly: --optim.lr may be low for this model")
    return Finding("overfit", "ok", measured)


class Stepped(NamedTuple):
    """The loss before a step, in nats, and the seconds of its two halves: forward and backward, clipping and update."""

    loss: float
    passes: float
    update: float


def stepper(case: Case, model: Llama) -> Callable[[Batch], Stepped]:
    """A training step in its plainest form, with AdamW for every weight."""
    optim, weights = case.run.optim, list(model.parameters())
    adamw = torch.optim.AdamW(weights, lr=optim.lr, betas=(optim.beta1, optim.beta2), weight_decay=0.0, fused=True)

    def now() -> float:
        if case.device.type == "cuda":
            torch.cuda.synchronize(case.device)
        return time.perf_counter()

    def step(batch: Batch) -> Stepped:
        start = now()
        loss = case.loss(model, batch)
        loss.backward()
        middle = now()
        torch.nn.utils.clip_grad_norm_(weights, optim.clip)
        adamw.step()
        adamw.zero_grad()
        return Stepped(loss.item(), middle - start, now() - middle)

    return step

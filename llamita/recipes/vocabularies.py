"""The stages of a vocabulary: train one, compare several, advise on a size. No torch is imported."""

import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from llamita import log
from llamita.data.read import Document, Reader
from llamita.model.shape import Shape
from llamita.plan import vocabulary
from llamita.tokenizer import Tokenizer, emit
from llamita.tokenizer.compare import Comparison
from llamita.tokenizer.compare import compare as measure
from llamita.tokenizer.llama3 import NUM_SPECIALS
from llamita.tokenizer.tally import Text
from llamita.tokenizer.train import MEMORY, SMALLEST, Trained, Weights, train_within
from llamita.tokenizer.vocabulary import Vocabulary, open_vocabulary

GGUF_NAME = "tokenizer.gguf"


def texts(docs: Iterable[Document]) -> Iterator[Text]:
    return (Text(doc.text, doc.source, doc.lang) for doc in docs)


class TrainingProgress:
    """A line of progress with the time that is left, from the share of the files read and of the merges made."""

    def __init__(self, docs: Iterable[Document], num_merges: int):
        self.docs, self.num_merges = docs, num_merges
        self.line = log.Progress(interval=1)
        self.stage, self.begun, self.said = "", 0.0, 0.0

    def __call__(self, stage: str, done: int) -> None:
        now = time.monotonic()
        if stage != self.stage:
            self.stage, self.begun, self.said = stage, now, now
        share = (done / self.num_merges if stage == "learn" else getattr(self.docs, "share_read", 0.0)) or 0.0
        if now - self.said < (0.2 if self.line.live else 5.0):
            return
        self.said, spent = now, now - self.begun
        left = f"  {log.duration(spent * (1 - share) / share)} left" if share else ""
        what = f"words: {done / 1e6:,.1f} MB read" if stage == "count" else f"merges: {done:,} of {self.num_merges:,}"
        self.line.update(0, f"tokenizer: {what}{left}")


def train(
    docs: Iterable[Document],
    vocab_size: int,
    out: Path,
    *,
    max_memory: int = MEMORY,
    workers: int | None = None,
    weights: Weights | None = None,
    chat_format: str = "llama3",
) -> Trained:
    """Train a byte-level BPE with Llama 3's split and write its folder, with a GGUF of the vocabulary.

    Words are counted into a hidden folder beside `out`, from which the same call goes on when it was stopped.
    """
    Tokenizer([bytes([byte]) for byte in range(256)], chat_format)
    work = out.resolve().with_name(f".{out.resolve().name}.words")
    found = train_within(
        texts(docs), vocab_size, folder=work, max_memory=max_memory, workers=workers, weights=weights,
        on_progress=TrainingProgress(docs, vocab_size - SMALLEST),
    )  # fmt: skip
    if isinstance(docs, Reader) and docs.skipped:
        reasons = ", ".join(f"{count} {reason}" for reason, count in docs.skipped.items())
        log.say(f"tokenizer: left out {docs.skipped.total()} files or rows: {reasons}")
    if found.left_out:
        log.say(
            f"tokenizer: words seen less than {found.least_count} times were left out to stay within "
            f"{max_memory >> 20} MiB, {found.left_out:.2%} of the text"
        )
    found.tokenizer.chat_format = chat_format
    found.tokenizer.save(out)
    emit.write_gguf(found.tokenizer, out / GGUF_NAME)
    return found


def show_advice(advice: vocabulary.Advice) -> None:
    """The comparison as a table for people, and the reasons."""
    rows = advice.sizes
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("entries", "params", "embed.", "bytes/token", "FLOPs/byte", "file", "training", "KV/KiB", "unused",
                 "bits/byte"):  # fmt: skip
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            f"{row.vocab_size:,}", f"{row.num_params / 1e6:,.1f}M", f"{row.embedding_share:.0%}",
            f"{row.bytes_per_token:.3f}", f"{row.train_flops_per_byte:.3g}", size_text(row.file_bytes),
            size_text(row.train_memory_bytes), size_text(row.kv_bytes_per_kib), f"{row.unused:.1%}",
            f"{row.bits_per_byte:.4f}", style="bold" if row.vocab_size == advice.recommended else None,
        )  # fmt: skip
    out = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    out.print(table)
    out.print(
        f"\nAt {advice.flops:.3g} FLOPs of training, {rows[0].budget_tokens:.3g} to {rows[-1].budget_tokens:.3g} "
        "tokens. Predicted: bits/byte; measured: bytes/token, unused entries; the rest is counted."
    )
    out.print(f"Recommended: {advice.recommended:,} entries.", style="bold")
    for reason in advice.reasons:
        out.print(f"- {reason}.")


def size_text(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024 or unit == "GiB":
            break
        num_bytes /= 1024
    return f"{num_bytes:.3g} {unit}" if num_bytes < 100 else f"{num_bytes:,.0f} {unit}"


def named(paths: Iterable[Path]) -> Iterator[tuple[str, Vocabulary]]:
    """Each vocabulary with the name of its folder or file, as far up as it takes to tell them apart."""
    paths = [path.resolve() for path in paths]
    depth = next((n for n in range(1, 20) if len({path.parts[-n:] for path in paths}) == len(set(paths))), 20)
    for path in paths:
        yield "/".join(path.parts[-depth:]), open_vocabulary(path)


def compare(paths: Iterable[Path], docs: Iterable[Document]) -> Comparison:
    """Measure the vocabularies at `paths`, of any kind, on the same texts, in order."""
    return measure(list(named(paths)), _told(docs))


def _told(docs: Iterable[Document]) -> Iterator[Text]:
    """The texts, with a line of progress."""
    line, begun = log.Progress(interval=1), time.monotonic()
    said = begun
    for text in texts(docs):
        yield text
        now, share = time.monotonic(), getattr(docs, "share_read", 0.0)
        if now - said > (0.2 if line.live else 5.0) and share:
            left = log.duration((now - begun) * (1 - share) / share)
            line.update(0, f"compare: {share:.0%} of the text  {left} left")
            said = now


SIZES = (4096, 8192, 16_384, 32_768, 49_152, 65_536, 128_256)
HELDOUT_EVERY, HELDOUT_BYTES = 20, 32 * 2**20


class HeldOut:
    """Passes texts on but for every twentieth, which it keeps until it has HELDOUT_BYTES."""

    def __init__(self, docs: Iterable[Document]):
        self.docs, self.kept, self.num_bytes = docs, list[str](), 0

    def __iter__(self) -> Iterator[Text]:
        for number, text in enumerate(texts(self.docs)):
            if number % HELDOUT_EVERY == HELDOUT_EVERY - 1 and self.num_bytes < HELDOUT_BYTES:
                self.kept.append(text.text)
                self.num_bytes += len(text.text.encode())
            else:
                yield text


def advise(
    docs: Iterable[Document],
    shape: Shape,
    *,
    flops: float | None = None,
    sizes: Iterable[int] = SIZES,
    max_memory: int = MEMORY,
) -> vocabulary.Advice:
    """Train one vocabulary of the largest size on `docs`, measure its beginnings on held-out texts, and compare.

    The first merges of a vocabulary are the vocabulary of a smaller size. `flops` is the training budget, by default
    20 tokens a parameter. Sizes that the text does not reach are left out. ValueError for too little text.
    """
    sizes = sorted(set(sizes))
    held = HeldOut(docs)
    with tempfile.TemporaryDirectory() as folder:
        found = train_within(
            held, sizes[-1], folder=Path(folder) / "words", max_memory=max_memory, allow_fewer=True,
            on_progress=TrainingProgress(docs, sizes[-1] - SMALLEST),
        )  # fmt: skip
    if not held.kept:
        raise ValueError(f"the text has {found.num_texts} documents: give at least {HELDOUT_EVERY}, to hold one out")
    tokens = found.tokenizer.tokens
    reached = [size for size in sizes if size <= found.tokenizer.vocab_size]
    if len(reached) < len(sizes):
        log.say(f"tokenizer: the text gives no more than {found.tokenizer.vocab_size:,} entries; larger ones left out")
    measured = []
    for size in reached:
        tokenizer = Tokenizer(tokens[: size - NUM_SPECIALS])
        counts = np.zeros(len(tokenizer.tokens), np.int64)
        for ids in tokenizer.encode_batch(held.kept):
            counts += np.bincount(ids, minlength=len(counts))
        measured.append(vocabulary.Measured(size, held.num_bytes, counts))
    return vocabulary.advise(shape, measured, flops or vocabulary.default_flops(shape))

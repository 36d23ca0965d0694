"""The stages of a vocabulary: train one, compare several, advise on a size. No torch is imported."""

import hashlib
import heapq
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
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
from llamita.tokenizer.llama3 import FILE_NAME, NUM_SPECIALS, check_chat_format
from llamita.tokenizer.tally import Text
from llamita.tokenizer.train import LARGEST, MEMORY, SMALLEST, Trained, Weights, train_within
from llamita.tokenizer.vocabulary import Vocabulary, open_vocabulary

GGUF_NAME = "tokenizer.gguf"


def texts(docs: Iterable[Document]) -> Iterator[Text]:
    return (Text(doc.text, doc.source, doc.lang) for doc in docs)


def progress(docs: Iterable[Document], num_merges: int) -> Callable[[str, int], None]:
    """What `train_within` reports, as a line with the time that is left: by share of the files, then of the merges."""
    stages: dict[str, log.Eta] = {}

    def tell(stage: str, done: int) -> None:
        if stage not in stages:
            for before in stages.values():
                before.end()
            stages[stage] = log.Eta()
        if stage == "count":
            stages[stage].update(getattr(docs, "share_read", 0.0), f"tokenizer: {done / 1e6:,.1f} MB of words counted")
        else:
            stages[stage].update(done / (num_merges or 1), f"tokenizer: {done:,} of {num_merges:,} merges learned")
            if done == num_merges:
                stages[stage].end()

    return tell


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
    ValueError where `out` cannot be a tokenizer folder, before anything is read.
    """
    check_chat_format(chat_format)
    out = out.resolve()
    if not out.name or (out.exists() and not (out / FILE_NAME).is_file() and (not out.is_dir() or any(out.iterdir()))):
        raise ValueError(f"{out} is there and holds no {FILE_NAME}: give an empty or a new folder as --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    eta = progress(docs, vocab_size - SMALLEST)
    found = train_within(
        texts(docs), vocab_size, folder=out.with_name(f".{out.name}.words"), max_memory=max_memory, workers=workers,
        weights=weights, on_progress=eta,
    )  # fmt: skip
    if isinstance(docs, Reader) and docs.skipped:
        reasons = ", ".join(f"{count} {reason}" for reason, count in docs.skipped.items())
        log.say(f"tokenizer: left out {docs.skipped.total()} files or rows: {reasons}")
    if found.left_out:
        log.say(
            f"tokenizer: words seen less than {found.least_count:g} times were left out to stay within "
            f"{max_memory >> 20} MiB, {found.left_out:.2%} of the text"
        )
    found.tokenizer.chat_format = chat_format
    found.tokenizer.save(out)
    emit.write_gguf(found.tokenizer, out / GGUF_NAME)
    found.tally.remove()
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
    eta = log.Eta()
    for number, text in enumerate(texts(docs)):
        yield text
        eta.update(getattr(docs, "share_read", 0.0), f"compare: {number + 1:,} documents")
    eta.end()


HELDOUT_EVERY, HELDOUT_BYTES = 20, 32 * 2**20


class HeldOut:
    """Passes texts on but for every twentieth: of those it keeps HELDOUT_BYTES, from all over the stream alike."""

    def __init__(self, docs: Iterable[Document]):
        self.docs, self.num_bytes = docs, 0
        self._kept: list[tuple[int, str]] = []  # a heap by keyed hash, so that the first to go is any

    def __iter__(self) -> Iterator[Text]:
        for number, text in enumerate(texts(self.docs)):
            if number % HELDOUT_EVERY != HELDOUT_EVERY - 1:
                yield text
                continue
            data = text.text.encode()
            digest = hashlib.blake2b(data, digest_size=8, key=b"held out")
            heapq.heappush(self._kept, (int.from_bytes(digest.digest()), text.text))
            self.num_bytes += len(data)
            while self.num_bytes > HELDOUT_BYTES and len(self._kept) > 1:
                self.num_bytes -= len(heapq.heappop(self._kept)[1].encode())

    @property
    def kept(self) -> list[str]:
        return [text for _, text in self._kept]


def advise(
    docs: Iterable[Document],
    shape: Shape,
    *,
    sizes: Iterable[int],
    flops: float | None = None,
    max_memory: int = MEMORY,
) -> vocabulary.Advice:
    """Train one vocabulary of the largest size on `docs`, measure its beginnings on held-out texts, and compare.

    The first merges of a vocabulary are the vocabulary of a smaller size. `flops` is the training budget, by default
    20 tokens a parameter. Sizes that the text does not reach are left out. ValueError for too little text.
    """
    sizes = sorted(set(sizes))
    if not sizes or sizes[0] < SMALLEST or sizes[-1] > LARGEST:
        raise ValueError(f"give sizes from {SMALLEST} to {LARGEST:,}, not {sizes}")
    if flops is not None and not 0 < flops < 1e40:
        raise ValueError(f"flops is {flops}: give the FLOPs of the whole training, as 1e20")
    held = HeldOut(docs)
    with tempfile.TemporaryDirectory() as folder:
        found = train_within(
            held, sizes[-1], folder=Path(folder) / "words", max_memory=max_memory, allow_fewer=True,
            on_progress=progress(docs, sizes[-1] - SMALLEST),
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

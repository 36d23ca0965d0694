"""The stages of a vocabulary: train one, compare several, advise on a size. No torch is imported."""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from llamita import log
from llamita.data.read import Document, Reader
from llamita.tokenizer import Tokenizer, emit
from llamita.tokenizer.tally import Text
from llamita.tokenizer.train import MEMORY, SMALLEST, Trained, Weights, train_within

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

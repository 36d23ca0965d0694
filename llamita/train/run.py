"""The one description of a run: a frozen tree of plain values, no torch. A recipe is a function that returns one."""

from dataclasses import dataclass, field
from typing import Literal

from llamita.data.mix import parse
from llamita.model.shape import Shape
from llamita.parallel.layout import Layout
from llamita.train.health import Health
from llamita.train.schedule import parse_ramp, parse_span, stages


@dataclass(frozen=True)
class Data:
    corpus: str = ""
    """Corpus folder, as `llamita data build` writes it."""
    seq_len: int = 512
    """Tokens in a row; a document that is longer is cut."""
    seed: int = 0
    """Key of the order in which rows are drawn."""
    fingerprint: str = ""
    """Hash of the data, filled in at the start: a run is not resumed on other data."""
    num_workers: int = 0
    """Processes that fetch rows; any number gives the same rows in the same order."""
    mix: tuple[str, ...] = ()
    """Shares of sources, languages and kinds, a line for each phase: "kind=code:17% rest" "90%: source=books:30% rest"
    (docs/data.md). Without it every document is seen equally often."""

    def __post_init__(self) -> None:
        parse(self.mix)


@dataclass(frozen=True)
class Optim:
    kind: Literal["adamw", "muon"] = "adamw"
    """muon moves the layers' matrices by orthogonalized momentum; embeddings and norms stay with AdamW."""
    lr: float = 3e-3
    """Peak learning rate of AdamW."""
    muon_lr: float = 3e-3
    """Peak learning rate of Muon, where it is used; its updates are scaled to the size of AdamW's."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    """Decoupled decay of matrices; norms have none."""
    clip: float = 1.0
    """Largest norm of the whole gradient."""

    def __post_init__(self) -> None:
        for name in ("eps", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"optim.{name} must be above 0, not {getattr(self, name)}")
        for name in ("lr", "muon_lr"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"optim.{name} must not be below 0: {getattr(self, name)}")
        if self.weight_decay < 0 or not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ValueError("optim.weight_decay is 0 or more, and optim.beta1 and beta2 are from 0 to below 1")


@dataclass(frozen=True)
class Schedule:
    kind: Literal["cosine", "wsd"] = "wsd"
    warmup_steps: int = 50
    """Steps of linear rise from 0."""
    decay: Literal["linear", "1-sqrt"] = "linear"
    """WSD: the form of the fall at the end."""
    decay_share: float = 0.3
    """WSD: the share of all steps, at the end, over which the rate falls."""
    decay_steps: int = 0
    """WSD: the steps of the fall, where they are to be told rather than their share."""
    final_ratio: float = 0.0
    """The rate at the end as a share of the peak."""
    ramp: tuple[str, ...] = ()
    """Later batch sizes, START:ROWS each, the start in steps or tokens: "252_000_000t:512" "5000:1024"; before the
    first of them, batch_size."""

    def __post_init__(self) -> None:
        parse_ramp(self.ramp)
        if self.warmup_steps < 0 or self.decay_steps < 0 or not 0 <= self.decay_share <= 1:
            raise ValueError("schedule.warmup_steps and decay_steps are steps from 0 up, decay_share is from 0 to 1")


@dataclass(frozen=True)
class Average:
    half_life: str = ""
    """Keep a moving average of the weights, and evaluate it: the steps ("1000") or tokens ("2_000_000t") after which a
    step counts half. Empty: none."""

    def __post_init__(self) -> None:
        if self.half_life and not parse_span(self.half_life, "average.half_life").length:
            raise ValueError("average.half_life must be more than 0; leave it empty for no average")


@dataclass(frozen=True)
class Checkpoint:
    every: int = 200
    """Steps between checkpoints; the last step always has one."""
    keep: int = 2
    """Newest checkpoints that stay."""
    keep_every: int = 0
    """Checkpoints of steps that are a multiple of it stay for ever; 0 is none."""


@dataclass(frozen=True)
class Log:
    every: int = 10
    """Steps between lines of progress and of metrics.jsonl."""
    eval_every: int = 200
    """Steps between evaluations on held-out text."""
    sample_every: int = 200
    """Steps between samples."""
    trace_step: int = 0
    """The first of three steps of which a profiler's trace is written to DIR/trace; 0 is none."""


@dataclass(frozen=True, kw_only=True)
class Run:
    name: str
    shape: Shape
    steps: int = 1000
    """Optimizer steps in all."""
    batch_size: int = 8
    """Rows in a step, of all ranks together."""
    micro_batch_size: int = 8
    """Rows in one forward pass of a rank; smaller ones are accumulated and change nothing but memory and speed."""
    precision: Literal["bf16", "fp32", "fp8"] = "bf16"
    """Dtype of matmuls; weights and optimizer are kept in fp32. fp8 (for Hopper): the layers' matmuls."""
    device: str = "auto"
    seed: int = 0
    """Key of the first weights and of everything drawn in training."""
    tokenizer: str = ""
    """Tokenizer folder; the corpus's own unless one is named."""
    data: Data = field(default_factory=Data)
    optim: Optim = field(default_factory=Optim)
    schedule: Schedule = field(default_factory=Schedule)
    average: Average = field(default_factory=Average)
    parallel: Layout = field(default_factory=Layout)
    health: Health = field(default_factory=Health)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    log: Log = field(default_factory=Log)

    def __post_init__(self) -> None:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            )
        if self.data.seq_len > self.shape.max_seq_len:
            raise ValueError(f"data.seq_len {self.data.seq_len} exceeds shape.max_seq_len {self.shape.max_seq_len}")
        for name in ("steps", "micro_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.checkpoint.keep_every < 0 or self.log.trace_step < 0:
            raise ValueError("checkpoint.keep_every and log.trace_step are steps from 1 up, or 0 for none")
        for name in (
            "checkpoint.every",
            "checkpoint.keep",
            "log.every",
            "log.eval_every",
            "log.sample_every",
        ):
            section, leaf = name.split(".")
            if getattr(getattr(self, section), leaf) < 1:
                raise ValueError(f"{name} must be at least 1")
        stages(self)

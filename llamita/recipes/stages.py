"""The stages of a life as functions over folders; every verb of the command line is a thin call of one."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from llamita import config, log, runtime
from llamita.align import sft
from llamita.checkpoint import store
from llamita.data import ledger, mix
from llamita.data.pack import Batch, PackedRows, collate, packed
from llamita.data.sampler import Phase, Sampler
from llamita.data.shards import Corpus
from llamita.eval import bits
from llamita.formats import open
from llamita.model.llama import Llama
from llamita.model.llama import build as build_model
from llamita.parallel import mesh
from llamita.serve.engine import Engine, Sampling
from llamita.tokenizer.carried import AnyTokenizer
from llamita.tokenizer.chat import render
from llamita.tokenizer.opened import open_tokenizer
from llamita.train import schedule, state
from llamita.train.loop import Trainer
from llamita.train.run import Run
from llamita.train.watch import Watch

Sources = dict[str, str]
BASE = "base.txt"  # in a fine-tuning run's folder: the model that it started from


def open_corpus(run: Run) -> tuple[Corpus, AnyTokenizer]:
    """The run's corpus and its tokenizer. Raises ValueError when they do not belong together, or not to the shape."""
    if not run.data.corpus:
        raise ValueError("no corpus is named: give --data.corpus FOLDER, as `llamita data build` writes it")
    corpus = Corpus.open(Path(run.data.corpus))
    tokenizer = open_tokenizer(Path(run.tokenizer) if run.tokenizer else Path(run.data.corpus) / "tokenizer")
    corpus.check_tokenizer(tokenizer.fingerprint)
    if tokenizer.vocab_size != run.shape.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} entries and the shape {run.shape.vocab_size}: "
            f"give --shape.vocab-size {tokenizer.vocab_size}, or train another tokenizer"
        )
    return corpus, tokenizer


def fresh_model(run: Run) -> Llama:
    """The run's first weights, drawn on the CPU from its seed, so that every device starts alike."""
    return build_model(run.shape).init_weights(run.seed)


def mixed_rows(run: Run, corpus: Corpus, kept: Path | None = None) -> tuple[list[PackedRows], Sampler, list[mix.Pool]]:
    """The rows of each pool of the run's mixture and the order in which training draws them; `kept` is a folder for
    the packing, see `pack.packed`."""
    split, blends = corpus.split("train"), mix.parse(run.data.mix)
    pools, packings = packed(split, run.data.mix, run.data.seq_len, corpus.manifest.fingerprint, kept)
    rows = [PackedRows(split, run.data.seq_len, packing=packing) for packing in packings]
    starts = mix.schedule(pools, blends, run.steps, 1)
    first, *later = [Phase(schedule.first_sample(run, step), weights) for step, weights in starts]
    return rows, Sampler([len(each) for each in rows], first.weights, run.data.seed, later), pools


def rows_and_sampler(run: Run, corpus: Corpus) -> tuple[list[PackedRows], Sampler]:
    """The rows and the order in which training draws them."""
    rows, sampler, _ = mixed_rows(run, corpus)
    return rows, sampler


def pretrain(run: Run, folder: Path, *, prompts: list[str], sources: Sources | None = None) -> Llama:
    """Train from the run's corpus into a run folder, going on from its newest whole checkpoint."""
    corpus, tokenizer = open_corpus(run)
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, fingerprint=corpus.manifest.fingerprint))
    rank, world = mesh.join(runtime.pick_device(run.device).type)
    run.parallel.resolved(world)  # refuses before anything is written
    rows, sampler, pools = mesh.first_rank_first(lambda: mixed_rows(run, corpus, folder / "packing"))
    samples = schedule.first_sample(run, run.steps)
    shares = [count / samples for count in sampler.drawn(samples)]
    for line in mix.advice(pools, sampler.num_rows, shares, samples) if rank == 0 else []:
        log.say(line)
    watch = Watch(
        _heldout_bits(run, corpus, tokenizer), _samples(tokenizer, prompts), _documents(corpus, rows, sampler),
        None if run.parallel.is_whole else _heldout_rows(run, corpus),
    )  # fmt: skip
    names = [pool.name for pool in pools] if run.data.mix else ()
    model = build_model(run.shape, device="meta")
    trainer = Trainer(
        run, folder, model, rows, first_rows=partial(model.first_rows, seed=run.seed), sampler=sampler, pools=names,
        watch=watch, sources=sources,
    )  # fmt: skip
    mesh.first_rank_first(lambda: (folder / "tokenizer").exists() or tokenizer.save(folder / "tokenizer"))
    return trainer.fit()


def finetune(
    run: Run,
    folder: Path,
    base: Path,
    conversations: list[list[sft.Message]],
    *,
    sources: Sources | None = None,
) -> Llama:
    """Fine-tune the model at `base` on conversations, every fiftieth of them held out."""
    model, tokenizer = open_model(base)
    run = dataclasses.replace(run, shape=model.shape)
    heldout = sft.Examples(tokenizer, conversations[::50])
    kept = [messages for number, messages in enumerate(conversations) if number % 50]
    examples = sft.Examples(tokenizer, kept or conversations)
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, fingerprint=examples.fingerprint))
    rows = PackedRows(examples, run.data.seq_len, masks=examples.masks, keep_whole=True)
    watch = Watch(_reply_loss(run, heldout), _replies(tokenizer, conversations[::50][:2]))
    trainer = Trainer(run, folder, model, [rows], stage="sft", watch=watch, sources=sources)
    mesh.first_rank_first(lambda: (folder / "tokenizer").exists() or tokenizer.save(folder / "tokenizer"))
    (folder / BASE).write_text(str(base.resolve()))
    return trainer.fit()


def open_model(path: Path, device: str = "cpu") -> tuple[Llama, AnyTokenizer]:
    """Model and tokenizer of a run folder (its newest whole checkpoint), or of a model in any format."""
    if not (path / "run.toml").is_file():
        return open.read(path).model(device=device), open.tokenizer(path)
    model = build_model(newest_run(path).shape, device=device)
    state.load_weights(newest(path), model)
    return model, open_tokenizer(path / "tokenizer")


def newest_run(run_folder: Path) -> Run:
    """The settings in the newest whole checkpoint of a run. Raises ValueError when there is none."""
    return config.load(Run, newest(run_folder) / "run.toml")


def newest(run_folder: Path) -> Path:
    """The newest whole checkpoint of a run. Raises ValueError when there is none."""
    found = store.newest(run_folder / "checkpoints", log.say)
    if found is None:
        raise ValueError(f"{run_folder} has no whole checkpoint yet: train it first")
    return found


def scorer(model: Llama, precision: str = "fp32") -> bits.Nll:
    """-log p of every token but the first, as `eval.bits` wants it."""
    device = model.norm.weight.device

    def nll(tokens_BT: np.ndarray) -> np.ndarray:
        tokens = torch.from_numpy(tokens_BT).to(device)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision != "fp32"):
            logits_BTV = model(tokens[:, :-1])
            return F.cross_entropy(logits_BTV.float().transpose(1, 2), tokens[:, 1:], reduction="none").cpu().numpy()

    return nll


def heldout_bits(model: Llama, corpus: Corpus, *, window: int, precision: str = "fp32") -> dict[str, float]:
    """Bits per byte and mean loss on the whole held-out split; every token sees at least half a window before it."""
    split = corpus.split("heldout")
    documents = [split.tokens(index) for index in range(len(split))]
    nats = bits.total_nll(
        scorer(model, precision), documents, window=window, stride=window // 2,
        batch_size=_score_rows(window, model.shape.vocab_size),
    )  # fmt: skip
    tokens = sum(len(document) - 1 for document in documents)
    return {"loss": nats / tokens, "bits_per_byte": bits.bits_per_byte(nats, split.num_bytes)}


def _score_rows(window: int, vocab_size: int) -> int:
    """Rows whose float32 logits stay under 256 MiB."""
    return max(1, 2**26 // (window * vocab_size))


def heldout_text(corpus: Corpus, tokenizer: AnyTokenizer) -> bytes:
    """The held-out documents' own bytes, one after another."""
    split = corpus.split("heldout")
    return b"".join(tokenizer.decode_bytes(split.tokens(index)[1:-1].tolist()) for index in range(len(split)))


def _heldout_bits(run: Run, corpus: Corpus, tokenizer: AnyTokenizer, limit: int = 32_768) -> Callable:
    """A quick look during training: the first row of each held-out document until `limit` tokens, no overlap."""
    split, window = corpus.split("heldout"), run.data.seq_len
    documents: list[np.ndarray] = []
    for index in range(len(split)):
        if sum(map(len, documents)) < limit:
            documents.append(split.tokens(index)[: 4 * window])
    num_bytes = len(tokenizer.decode_bytes(np.concatenate([d[1:] for d in documents]).tolist()))

    def evaluate(model: Llama) -> dict[str, float]:
        nats = bits.total_nll(
            scorer(model, run.precision), documents, window=window, stride=window,
            batch_size=_score_rows(window, run.shape.vocab_size),
        )  # fmt: skip
        tokens = sum(len(document) - 1 for document in documents)
        return {"loss": nats / tokens, "bits_per_byte": bits.bits_per_byte(nats, num_bytes)}

    return evaluate


def _heldout_rows(run: Run, corpus: Corpus) -> Batch:
    """As many packed rows of held-out text as a step has, from the first on, and over again where there are fewer."""
    rows = PackedRows(corpus.split("heldout"), run.data.seq_len)
    return collate([rows[number % len(rows)] for number in range(run.batch_size)], 0)


def _documents(corpus: Corpus, rows: list[PackedRows], sampler: Sampler) -> Callable[[int, int], tuple[str, ...]]:
    """The names of the documents in some samples."""

    def documents(first: int, count: int) -> tuple[str, ...]:
        found = ledger.step(corpus, rows, sampler, range(first, first + count))
        return tuple(dict.fromkeys(each["id"] for each in found["documents"]))

    return documents


def _reply_loss(run: Run, heldout: sft.Examples) -> Callable:
    """Mean loss of the assistant's tokens in held-out conversations."""

    def evaluate(model: Llama) -> dict[str, float]:
        nll, nats, count = scorer(model, run.precision), 0.0, 0
        for index in range(min(len(heldout), 64)):
            tokens, mask = heldout.tokens(index)[None].astype(np.int64), heldout.masks[index][1:]
            nats += float(nll(tokens)[0][mask].sum())
            count += int(mask.sum())
        return {"loss": nats / max(1, count)}

    return evaluate


SAMPLED = Sampling(max_tokens=60, temperature=0.7, top_p=0.95, seed=0)


def _samples(tokenizer: AnyTokenizer, prompts: list[str]) -> Callable:
    """How the model continues each prompt."""
    ids = [tokenizer.encode(prompt, bos=True) for prompt in prompts]
    return lambda model: _completed(Engine(model, tokenizer, mesh.from_first_rank), prompts, ids)


def _replies(tokenizer: AnyTokenizer, conversations: list[list[sft.Message]]) -> Callable:
    """What the model answers to the first message of each conversation."""
    ids = [render(tokenizer, messages[:1], reply=True)[0] for messages in conversations]
    return lambda model: _completed(
        Engine(model, tokenizer, mesh.from_first_rank), [messages[0]["content"] for messages in conversations], ids
    )


def _completed(engine: Engine, shown: list[str], ids: list[list[int]]) -> list[tuple[str, str]]:
    return [(text, done.text) for text, done in zip(shown, engine.complete(ids, SAMPLED), strict=True)]

"""Train one vocabulary with llamita and with its peers on the same text; time, peak memory, held-out compression.

Each trainer runs alone in a process of its own, in turn, and reads the same JSON lines. One document in fifty is held
out. A trainer that splits text in another way than Llama 3 does another task and is marked so. Writes one JSON row.

    python benchmarks/tokenizer_train.py PATH [PATH ...] --vocab-size 128256 --memory 2048
"""

import argparse
import base64
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import tiktoken

from llamita.data.read import documents
from llamita.tokenizer.llama3 import NUM_SPECIALS, PATTERN
from llamita.tokenizer.tally import Text
from llamita.tokenizer.train import train_within

TRAINERS = ("llamita", "rustbpe", "hf", "bpeasy", "sentencepiece", "gigatoken")
OTHER_TASK = {"sentencepiece": "its own split, characters before bytes", "gigatoken": "GPT-2's split"}
LONGEST_SECONDS = 1800


def rows(path: Path) -> Iterator[Text]:
    with path.open() as lines:
        for line in lines:
            yield Text(*json.loads(line))


def with_llamita(path: Path, num_ranks: int, memory: int) -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        found = train_within(
            rows(path), num_ranks + NUM_SPECIALS, folder=Path(folder) / "words", max_memory=memory * 2**20
        )
    print(json.dumps({"words": found.num_words, "left_out": found.left_out}))
    return found.tokenizer.tokens


def with_rustbpe(path: Path, num_ranks: int, memory: int) -> list[bytes]:
    import rustbpe

    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator((text for text, _, _ in rows(path)), num_ranks, pattern=PATTERN)
    return [bytes(token) for token, _ in sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])]


def with_hf(path: Path, num_ranks: int, memory: int) -> list[bytes]:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PATTERN), "isolated"), byte_level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=num_ranks, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator((text for text, _, _ in rows(path)), trainer)
    from llamita.tokenizer.emit import LETTERS

    byte_of = {letter: byte for byte, letter in enumerate(LETTERS)}
    by_id = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return [bytes(byte_of[letter] for letter in token) for token, _ in by_id]


def with_bpeasy(path: Path, num_ranks: int, memory: int) -> list[bytes]:
    import bpeasy

    ranks = bpeasy.train_bpe((text for text, _, _ in rows(path)), PATTERN, 1024, num_ranks)
    return sorted(ranks, key=ranks.__getitem__)


def with_sentencepiece(path: Path, num_ranks: int, memory: int) -> list[bytes]:
    import sentencepiece

    with tempfile.TemporaryDirectory() as folder:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text, _, _ in rows(path) for line in text.split("\n") if line),
            model_prefix=f"{folder}/m", vocab_size=num_ranks, model_type="bpe", byte_fallback=True,
            num_threads=os.cpu_count(), max_sentence_length=1_000_000, normalization_rule_name="identity",
            hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
        return [b""] * sentencepiece.SentencePieceProcessor(model_file=f"{folder}/m.model").vocab_size()


def with_gigatoken(path: Path, num_ranks: int, memory: int) -> list[bytes]:
    import gigatoken

    plain = path.with_suffix(".txt")
    plain.write_text("\n".join(text for text, _, _ in rows(path)))
    vocabulary, _ = gigatoken.train_bpe(plain, num_ranks, [])
    return [b""] * len(vocabulary)


def alone(name: str, path: Path, num_ranks: int, memory: int, out: Path) -> None:
    """Train, in this process; prints its measurements and writes the tokens."""
    start = time.perf_counter()
    tokens = globals()[f"with_{name}"](path, num_ranks, memory)
    seconds = time.perf_counter() - start
    usage = resource.getrusage(resource.RUSAGE_SELF)
    out.write_bytes(b"\n".join(base64.b64encode(token) for token in tokens))
    print(json.dumps({
        "seconds": round(seconds, 2), "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_mib": round(usage.ru_maxrss / 1024), "ranks": len(tokens),
    }))  # fmt: skip


def in_a_process(name: str, path: Path, args: argparse.Namespace, home: Path) -> dict:
    out = home / f"{name}.tokens"
    words = [sys.executable, __file__, "--alone", name, str(path), "--out", str(out)]
    words += ["--vocab-size", str(args.vocab_size), "--memory", str(args.memory)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=LONGEST_SECONDS)
    except subprocess.TimeoutExpired:
        return {"failed": f"more than {LONGEST_SECONDS} s"}
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1][:200] if done.stderr else f"exit {done.returncode}"}
    found: dict = {}
    for line in done.stdout.splitlines():
        found |= json.loads(line) if line.startswith('{"') else {}  # some trainers print words of their own
    if name in OTHER_TASK:
        return found | {"another task": OTHER_TASK[name]}
    tokens = [base64.b64decode(line) for line in out.read_bytes().split(b"\n")]
    encoding = tiktoken.Encoding("held", pat_str=PATTERN, mergeable_ranks={t: i for i, t in enumerate(tokens)},
                                 special_tokens={})  # fmt: skip
    held = [text for text, _, _ in rows(home / "heldout.jsonl")]
    num_tokens = sum(map(len, encoding.encode_ordinary_batch(held)))
    return found | {"heldout_bytes_per_token": round(sum(len(text.encode()) for text in held) / num_tokens, 4)}


def write_rows(paths: list[Path], home: Path) -> dict[str, int]:
    sizes = {"train": 0, "heldout": 0}
    with (home / "train.jsonl").open("w") as train, (home / "heldout.jsonl").open("w") as heldout:
        for number, doc in enumerate(documents(paths)):
            name, file = ("heldout", heldout) if number % 50 == 7 else ("train", train)
            sizes[name] += len(doc.text.encode())
            file.write(json.dumps([doc.text, doc.source, doc.lang], ensure_ascii=False) + "\n")
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--vocab-size", type=int, default=128_256)
    parser.add_argument("--memory", type=int, default=2048, help="MiB that llamita may take")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/tokenizer_train.json"))
    parser.add_argument("--alone", choices=TRAINERS)
    args = parser.parse_args()
    if args.alone:
        return alone(args.alone, args.paths[0], args.vocab_size - NUM_SPECIALS, args.memory, args.out)
    from llamita.runtime import machine  # brings torch, which no trainer is to carry

    row = {"command": " ".join(["python", *sys.argv]), "machine": machine(), "memory_mib": args.memory}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        row["bytes"] = write_rows(args.paths, home)
        print(row["bytes"], flush=True)
        for name in TRAINERS:
            row[name] = in_a_process(name, home / "train.jsonl", args, home)
            print(name, row[name], flush=True)
    args.out.write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main()

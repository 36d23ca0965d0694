"""What a small model of our own thinks of text: bits per byte, a signal as CCNet's perplexity is (arXiv 1911.00359)."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from llamita.data.curate import Judge

MAX_TOKENS = 512
BATCH = 8
CHARS = 16  # of a text that are encoded, a token: four times what prose takes


def perplexity(model: Path, max_tokens: int = MAX_TOKENS) -> Callable[[], Judge]:
    """Makes, in a worker, what measures the first `max_tokens` tokens of texts: bits per byte, float32 [len].

    `model` is a folder that `llamita.load` opens; it is run in float32. 0 for a text without tokens. What is returned
    pickles, so it can be sent to any worker.
    """
    return partial(_judge, model, max_tokens)


def _judge(model: Path, max_tokens: int) -> Judge:
    import torch

    from llamita.recipes import stages

    torch.set_num_threads(1)  # the workers are processes, one a core
    llama, tokenizer = stages.open_model(model)
    nll = stages.scorer(llama.float())
    first = tokenizer.bos_id if tokenizer.adds_bos else tokenizer.eos_id  # as in a corpus
    window = min(max_tokens, llama.shape.max_seq_len)

    def judge(texts: list[str]) -> np.ndarray:
        rows = [ids[:window] for ids in tokenizer.encode_batch(text[: CHARS * window] for text in texts)]
        found = np.zeros(len(rows), np.float32)
        order = sorted((i for i in range(len(rows)) if rows[i]), key=lambda i: len(rows[i]))  # so little is padded
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            tokens = np.full((len(batch), 1 + len(rows[batch[-1]])), first, np.int64)
            for place, i in enumerate(batch):
                tokens[place, 1 : 1 + len(rows[i])] = rows[i]
            nats = nll(tokens)
            for place, i in enumerate(batch):
                num_bytes = len(tokenizer.decode_bytes(rows[i]))
                found[i] = nats[place, : len(rows[i])].sum() / np.log(2) / num_bytes
        return found

    return judge

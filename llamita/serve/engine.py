"""Generation: prompts of mixed lengths in one batch, streamed as whole characters.

Shapes: B rows, T tokens, D dim, V the tokenizer's vocab_size.
"""

import codecs
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llamita.model.cache import KVCache
from llamita.model.llama import Llama
from llamita.serve.sample import Sampling, choose, row_generators
from llamita.tokenizer.carried import AnyTokenizer

# Prompts beyond this many wait, which bounds the KV cache; no row's text depends on it.
MAX_ROWS = 32


@dataclass(frozen=True)
class Completion:
    """What came after a prompt: "stop" if a stop token or a stop string ended it, "length" if the room did.

    `tokens` has no stop token; unlike `text`, it has those of a stop string.
    """

    text: str
    tokens: list[int]
    finish_reason: Literal["stop", "length"]


@dataclass(frozen=True)
class Chunk:
    """More text of prompt number `row`; the row's last chunk carries the whole completion."""

    row: int
    text: str
    completion: Completion | None = None


class TextStream:
    """Bytes in, text out that will never have to be taken back.

    It keeps what may be the beginning of a character or of a stop string. Of several stop strings the first
    that is complete wins, then the longest, so the text does not depend on where tokens begin and end.
    """

    def __init__(self, stop: tuple[str, ...]):
        self.stop = stop
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.held = ""
        self.stopped = False

    def feed(self, piece: bytes, *, final: bool = False) -> str:
        """The text that is now certain, all of it if `final`; `stopped` tells whether a stop string came."""
        self.held += self.decoder.decode(piece, final)
        found = [(start + len(stop), start) for stop in self.stop if (start := self.held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._release(min(found)[1])
        return self._release(len(self.held) - (0 if final else self._hopeful()))

    def _hopeful(self) -> int:
        """How many of the last held characters a stop string may begin with."""
        longest = max(map(len, self.stop), default=1) - 1
        for size in range(min(longest, len(self.held)), 0, -1):
            if any(stop.startswith(self.held[-size:]) for stop in self.stop):
                return size
        return 0

    def _release(self, end: int) -> str:
        text, self.held = self.held[:end], self.held[end:]
        return text


@dataclass
class _Row:
    index: int
    prompt: list[int]
    max_tokens: int
    generator: torch.Generator
    stream: TextStream
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    done: bool = False

    def take(self, token: int, piece: bytes, *, ended: bool) -> Chunk:
        """Add a token and its bytes; a stop token (`ended`) belongs to neither tokens nor text."""
        new = ""
        if not ended:
            self.tokens.append(token)
            new = self.stream.feed(piece)
        self.done = ended or self.stream.stopped or len(self.tokens) == self.max_tokens
        if self.done and not self.stream.stopped:
            new += self.stream.feed(b"", final=True)
        self.text += new
        if not self.done:
            return Chunk(self.index, new)
        reason: Literal["stop", "length"] = "stop" if ended or self.stream.stopped else "length"
        return Chunk(self.index, new, Completion(self.text, self.tokens, reason))


class Engine:
    """A model and its tokenizer, ready to write. Raises ValueError when they do not belong together.

    `agree` makes one choice of the tokens that several processes with one model have chosen, or they might part.
    """

    def __init__(self, model: Llama, tokenizer: AnyTokenizer, agree: Callable[[list[int]], list[int]] = list):
        if model.shape.vocab_size < tokenizer.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the model {model.shape.vocab_size}:"
                " give its own tokenizer"
            )
        self.model = model
        self.tokenizer, self.agree = tokenizer, agree
        self.special_ids = frozenset(tokenizer.specials.values())

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling) -> Iterator[Chunk]:
        """Continue each prompt (token ids; an empty one becomes BOS) and yield text as soon as it is certain.

        A row ends with a stop token, a stop string, `sampling.max_tokens`, or the model's max_seq_len. Raises
        ValueError at once for a prompt that leaves no room.
        """
        limit = self.model.shape.max_seq_len
        for number, prompt in enumerate(prompts):
            if len(prompt) > limit - 1:
                raise ValueError(
                    f"prompt {number} has {len(prompt)} tokens, but max_seq_len {limit} leaves room"
                    f" for {limit - 1}: shorten it"
                )
        empty = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        prompts = [list(prompt) or empty for prompt in prompts]
        if not all(prompts):
            raise ValueError("this model has no BOS to begin with: give a prompt")
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        rows: list[_Row] = []
        for prompt, generator in zip(prompts, row_generators(prompts, seed), strict=True):
            max_tokens = min(sampling.max_tokens, limit - len(prompt))
            rows.append(_Row(len(rows), prompt, max_tokens, generator, TextStream(sampling.stop)))
        return self._run(rows, sampling)

    def complete(self, prompts: Sequence[list[int]], sampling: Sampling) -> list[Completion]:
        """Like `generate`, whole: one completion a prompt, in order."""
        done = {chunk.row: chunk.completion for chunk in self.generate(prompts, sampling) if chunk.completion}
        return [done[row] for row in range(len(prompts))]

    @torch.no_grad()  # not inference_mode: what sharded weights are gathered into must serve training, too
    def _run(self, waiting: list[_Row], sampling: Sampling) -> Iterator[Chunk]:
        for first in range(0, len(waiting), MAX_ROWS):
            rows = waiting[first : first + MAX_ROWS]
            weight = self.model.tok_embeddings.weight
            # The last token of a row is never read back.
            max_len = max(len(row.prompt) + row.max_tokens - 1 for row in rows)
            cache = KVCache(self.model.shape, len(rows), max_len, weight.dtype, weight.device)
            new = [row.prompt for row in rows]
            while rows:
                logits_BV = self._forward(new, cache)
                contexts = [row.prompt + row.tokens for row in rows]
                chosen = choose(logits_BV, sampling, contexts, [row.generator for row in rows])
                new = [[token] for token in self.agree(chosen)]
                for row, [token] in zip(rows, new, strict=True):
                    piece = b"" if token in self.special_ids else self.tokenizer.decode_bytes([token])
                    chunk = row.take(token, piece, ended=token in self.tokenizer.stop_ids)
                    if chunk.text or chunk.completion:
                        yield chunk
                alive = [number for number, row in enumerate(rows) if not row.done]
                if 0 < len(alive) < len(rows):
                    cache.keep(alive)
                rows, new = [rows[number] for number in alive], [new[number] for number in alive]

    def _forward(self, new: list[list[int]], cache: KVCache) -> Tensor:
        """Read each row's new tokens; the logits that follow its last one, [B, V]."""
        device = self.model.tok_embeddings.weight.device
        counts = [len(tokens) for tokens in new]
        tokens_BT = pad_sequence([torch.tensor(tokens) for tokens in new], batch_first=True).to(device)
        hidden_BTD = self.model.hidden(tokens_BT, cache)
        cache.advance(counts)
        last_BD = hidden_BTD[torch.arange(len(new)), torch.tensor(counts) - 1]
        return self.model.output(last_BD)[:, : self.tokenizer.vocab_size]

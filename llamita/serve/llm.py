"""A trained model with its tokenizer: text in, text out.

Shapes: T tokens, V vocab_size.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from llamita.formats import open
from llamita.model.llama import Llama
from llamita.serve.engine import Engine, Sampling
from llamita.tokenizer.carried import AnyTokenizer
from llamita.tokenizer.chat import render


class LLM:
    """`LLM.load(folder)`, then `generate`, `chat`, `logprobs`; `sampling` takes the fields of `Sampling`."""

    def __init__(self, model: Llama, tokenizer: AnyTokenizer):
        self.model = model
        self.tokenizer = tokenizer
        self.engine = Engine(model, tokenizer)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "LLM":
        """Read a model in any format (Hugging Face, Meta, GGUF, llama2.c), or a run folder with one in `model/`.

        By default on the GPU in bfloat16 if there is one, else on the CPU in float32. Raises ValueError for
        anything else.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
        return cls(open.read(path).model(device=device, dtype=dtype), open.tokenizer(path))

    def generate(
        self, prompt: str | Sequence[str], *, stream: bool = False, **sampling: Any
    ) -> str | list[str] | Iterator[str]:
        """What the model writes after the prompt(s), without the prompt; `stream=True` takes one prompt."""
        chosen = Sampling(**sampling)
        if isinstance(prompt, str):
            return self._answer(self.tokenizer.encode(prompt, bos=True), stream, chosen)
        if stream:
            raise ValueError("stream=True takes one prompt, not a list")
        prompts = [self.tokenizer.encode(text, bos=True) for text in prompt]
        return [completion.text for completion in self.engine.complete(prompts, chosen)]

    def chat(self, messages: Sequence[dict[str, str]], *, stream: bool = False, **sampling: Any) -> str | Iterator[str]:
        """The assistant's reply to `messages`, a list of {"role", "content"}."""
        prompt, _ = render(self.tokenizer, messages, reply=True)
        return self._answer(prompt, stream, Sampling(**sampling))

    @torch.inference_mode()
    def logprobs(self, text: str) -> list[tuple[str, float]]:
        """Each token of `text` and ln p(token | BOS and the tokens before it); a model without BOS has no first one.

        Raises ValueError when BOS and the text are longer than max_seq_len.
        """
        if not text:
            return []
        tokens = self.tokenizer.encode(text, bos=True)
        limit = self.model.shape.max_seq_len
        if len(tokens) > limit:
            raise ValueError(f"the text has {len(tokens)} tokens with BOS, but max_seq_len is {limit}: shorten it")
        tokens_1T = torch.tensor([tokens], device=self.model.tok_embeddings.weight.device)
        logprobs_TV = self.model(tokens_1T[:, :-1])[0].float().log_softmax(dim=-1)
        chosen_T = logprobs_TV.gather(-1, tokens_1T[0, 1:, None])
        pieces = [self.tokenizer.token_bytes(token).decode("utf-8", "replace") for token in tokens[1:]]
        return list(zip(pieces, chosen_T.flatten().tolist(), strict=True))

    def _answer(self, prompt: list[int], stream: bool, sampling: Sampling) -> str | Iterator[str]:
        if stream:
            return (chunk.text for chunk in self.engine.generate([prompt], sampling) if chunk.text)
        return self.engine.complete([prompt], sampling)[0].text

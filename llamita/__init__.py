"""llamita: the whole Llama 3 system in one small package, from text to a chatting, exported model of one's own."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from llamita.serve.llm import LLM
    from llamita.tokenizer import Tokenizer

__version__ = "0.1.0"
__all__ = ["Tokenizer", "load"]


def load(path: "str | Path", **kwargs: Any) -> "LLM":
    """A model ready to write: `load(path).generate(prompt)`, `.chat(messages)`, `.logprobs(text)`."""
    from llamita.serve.llm import LLM

    return LLM.load(path, **kwargs)


def __getattr__(name: str) -> Any:
    if name == "Tokenizer":  # imported on demand, so that `import llamita` stays instant
        from llamita.tokenizer import Tokenizer

        return Tokenizer
    raise AttributeError(f"module 'llamita' has no attribute {name!r}")

"""Text to token ids and back in the Llama 3 manner: split, byte-level BPE, special tokens, dialog format."""

from llamita.tokenizer.llama3 import Tokenizer

__all__ = ["Tokenizer"]

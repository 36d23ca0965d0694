"""Supervised fine-tuning data: conversations read from files and turned into tokens with a mask of what bears loss."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from llamita.tokenizer.carried import AnyTokenizer
from llamita.tokenizer.chat import render

Message = dict[str, str]
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


class Examples:
    """Tokenized conversations, with the face of a corpus split: `tokens(i)`, `lengths`, and `masks[i]` beside them.

    masks[i][t] is True where token t is the assistant's, its end-of-turn included: only those are trained on.
    """

    def __init__(self, tokenizer: AnyTokenizer, conversations: Iterable[Sequence[Message]]):
        rendered = [render(tokenizer, list(messages)) for messages in conversations]
        self._tokens = [np.array(ids, dtype=np.uint32) for ids, _ in rendered]
        self.masks = [np.array(mask, dtype=bool) for _, mask in rendered]
        if not any(mask.any() for mask in self.masks):
            raise ValueError("no conversation has an assistant's turn, so there is nothing to learn from")
        self.lengths = np.array([len(ids) for ids in self._tokens], dtype=np.int64)

    @property
    def fingerprint(self) -> str:
        """Hash of all tokens and masks: a run is not resumed on other conversations."""
        digest = hashlib.sha256()
        for tokens, mask in zip(self._tokens, self.masks, strict=True):
            digest.update(tokens.tobytes() + mask.tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._tokens)

    def tokens(self, index: int) -> np.ndarray:
        return self._tokens[index]


def read(path: Path) -> Iterator[list[Message]]:
    """Conversations of a .jsonl or .json file, a row each, in one of three shapes: {"messages": [{"role", "content"}]},
    ShareGPT's {"conversations": [{"from", "value"}]}, Alpaca's {"instruction", "input", "output"}.

    Raises ValueError naming file and row for anything else.
    """
    if not path.is_file():
        raise ValueError(f"no file of conversations at {path}")
    text = path.read_text(encoding="utf-8")
    try:
        lines = [line for line in text.splitlines() if line.strip()]
        rows = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path} holds no rows of conversations")
    for number, row in enumerate(rows, 1):
        try:
            yield _messages(row)
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, row {number}: neither messages, nor conversations, nor instruction and output ({error!r})"
            ) from error


def _messages(row: dict) -> list[Message]:
    if "messages" in row:
        return [{"role": turn["role"], "content": turn["content"]} for turn in row["messages"]]
    if "conversations" in row:
        return [{"role": SHAREGPT_ROLES[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]
    asked = "\n".join(part for part in (row["instruction"], row.get("input", "")) if part)
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]


def write(path: Path, conversations: Iterable[Sequence[Message]]) -> None:
    """One {"messages": ...} a line, as `read` reads."""
    aside = path.with_name(path.name + ".tmp")
    with aside.open("w", encoding="utf-8") as file:
        for messages in conversations:
            file.write(json.dumps({"messages": list(messages)}, ensure_ascii=False) + "\n")
    aside.replace(path)

"""A chat in the terminal, or over a pipe with one message a line."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from rich.console import Console

from llamita.serve.llm import LLM
from llamita.serve.sample import Sampling
from llamita.tokenizer.chat import render

HELP = """/reset         forget the conversation, keep the system prompt
/system TEXT   set the system prompt and start anew; without TEXT remove it
/help          show this
/exit          end (Ctrl-D too); Ctrl-C stops a reply"""

# A model may write anything: no control character but tab and newline may reach the terminal.
PRINTABLE = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])

Message = dict[str, str]


def note(console: Console, text: str) -> None:
    console.print(text, style="dim", markup=False, highlight=False)


def fit(llm: LLM, system: list[Message], turns: list[Message], max_tokens: int) -> list[Message]:
    """The newest turns that leave room for a reply of max_tokens, or of half the context if that is less.

    `turns` is user, assistant, user, ...; the last one always stays.
    """
    limit = llm.model.shape.max_seq_len
    room = limit - min(max_tokens, limit // 2)
    while len(turns) > 2 and len(render(llm.tokenizer, system + turns, reply=True)[0]) > room:
        turns = turns[2:]
    return turns


def reply(llm: LLM, console: Console, messages: list[Message], sampling: Sampling) -> str:
    """Stream the answer to the console; Ctrl-C ends it early, and what was said is kept."""
    said = ""
    try:
        for text in llm.chat(messages, stream=True, **asdict(sampling)):
            said += text
            console.file.write(text.translate(PRINTABLE))
            console.file.flush()
    except KeyboardInterrupt:
        console.file.write(" [stopped]")
    console.file.write("\n")
    return said


def chat(
    llm: LLM,
    system: str | None = None,
    *,
    console: Console | None = None,
    read: Callable[[str], str] = input,
    **sampling: Any,
) -> None:
    """Talk until /exit or the end of input; `sampling` takes the fields of `Sampling`.

    `read(prompt)` gives the next line and raises EOFError at the end.
    """
    console, chosen = console or Console(), Sampling(**sampling)
    turns: list[Message] = []
    if console.is_terminal:
        with suppress(ImportError):  # Windows has none
            import readline  # noqa: F401  arrow keys and history for input()
        note(console, "/help shows the commands, Ctrl-D ends")
    while True:
        try:
            line = read("> " if console.is_terminal else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            note(console, "\nCtrl-D or /exit ends")
            continue
        command, _, rest = line.partition(" ")
        if not line:
            continue
        elif command == "/exit":
            return
        elif command == "/reset":
            turns = []
        elif command == "/system":
            system, turns = rest.strip() or None, []
        elif command.startswith("/"):
            note(console, HELP)
        else:
            turns = answer(llm, console, system, [*turns, {"role": "user", "content": line}], chosen)


def answer(llm: LLM, console: Console, system: str | None, turns: list[Message], sampling: Sampling) -> list[Message]:
    """Reply to the last turn; the conversation afterwards, without that turn if it does not fit."""
    head = [{"role": "system", "content": system}] if system else []
    kept = fit(llm, head, turns, sampling.max_tokens)
    if len(kept) < len(turns):
        note(console, f"(the context is full: the oldest {len(turns) - len(kept)} messages were dropped)")
    try:
        said = reply(llm, console, head + kept, sampling)
    except ValueError as error:
        note(console, str(error))
        return turns[:-1]
    return [*kept, {"role": "assistant", "content": said}]

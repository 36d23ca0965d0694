"""Ollama's Modelfile: where the weights lie, how a dialog is written, and what ends a reply.

Ollama knows few Jinja templates and runs Go's instead, so the one that is written here is found by asking: a dialog is
rendered with marks in place of its contents, and what stands between the marks is what the template puts there.
"""

import json
from collections.abc import Sequence
from typing import Any

from llamita.model.shape import Shape
from llamita.tokenizer.chat import render

MARK = "\ue000{}\ue001"


def _between(tokenizer: Any, roles: Sequence[str], reply: bool) -> list[str]:
    """What the template writes before, between and behind the contents of a dialog of these roles, BOS left out."""
    messages = [{"role": role, "content": MARK.format(i)} for i, role in enumerate(roles)]
    ids = render(tokenizer, messages, reply=reply)[0]
    text = tokenizer.decode(ids[1:] if tokenizer.adds_bos else ids)
    parts = []
    for i in range(len(roles)):
        before, found, text = text.partition(MARK.format(i))
        if not found:
            raise ValueError(f"the chat template leaves out the {roles[i]}'s message: no Modelfile can be written")
        parts.append(before)
    return [*parts, text]


def template(tokenizer: Any) -> str:
    """The dialog format as Go's text/template. BOS is left to llama.cpp, which adds it by the file's own word.

    Raises ValueError where there is none, or where it leaves a message out. One that refuses a system's message
    writes none.
    """
    first, reply = _between(tokenizer, ["user"], reply=True)
    _, _, following, _ = _between(tokenizer, ["user", "assistant", "user"], reply=False)
    parts = {'eq .Role "assistant"': reply, 'eq $last ""': first, "": following}
    try:
        system, from_system, _ = _between(tokenizer, ["system", "user"], reply=False)
        parts = {'eq .Role "system"': system, 'eq $last "system"': from_system} | parts
    except ValueError:
        parts = {'eq .Role "system"': ""} | parts
    branches = "".join(
        f"{{{{- {'if' if number == 0 else 'else if' if test else 'else'} {test} }}}}{{{{ {_quoted(text)} }}}}"
        for number, (test, text) in enumerate(parts.items())
    )
    content = "{{- end }}{{- .Content }}{{ $last = .Role }}{{ end }}"
    return f'{{{{- $last := "" }}}}{{{{ range .Messages }}}}{branches}{content}{{{{ {_quoted(reply)} }}}}'


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def modelfile(tokenizer: Any, weights_file: str, shape: Shape) -> str:
    """The text of a Modelfile beside `weights_file` (github.com/ollama/ollama, docs/modelfile)."""
    stops = sorted(tokenizer.decode([token]) for token in tokenizer.stop_ids)
    lines = [
        f"FROM ./{weights_file}",
        f'TEMPLATE """{template(tokenizer)}"""',
        f"PARAMETER num_ctx {min(shape.max_seq_len, 8192)}",
        *(f"PARAMETER stop {json.dumps(stop)}" for stop in stops),
    ]
    return "\n".join(lines) + "\n"

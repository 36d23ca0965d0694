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
    """The dialog format as Go's text/template. BOS is left to llama.cpp, which adds it by the file's own word."""
    first_user, reply = _between(tokenizer, ["user"], reply=True)
    system, from_system, _, from_assistant, _ = _between(
        tokenizer, ["system", "user", "assistant", "user"], reply=False
    )
    parts = dict(first=first_user, system=system, after=from_system, next=from_assistant, reply=reply)
    quoted = {name: json.dumps(text, ensure_ascii=False) for name, text in parts.items()}
    return (
        '{{- $last := "" }}{{ range .Messages }}'
        f'{{{{- if eq .Role "system" }}}}{{{{ {quoted["system"]} }}}}'
        f'{{{{- else if eq .Role "assistant" }}}}{{{{ {quoted["reply"]} }}}}'
        f'{{{{- else if eq $last "" }}}}{{{{ {quoted["first"]} }}}}'
        f'{{{{- else if eq $last "system" }}}}{{{{ {quoted["after"]} }}}}'
        f"{{{{- else }}}}{{{{ {quoted['next']} }}}}{{{{- end }}}}"
        "{{- .Content }}{{ $last = .Role }}{{ end }}"
        f"{{{{ {quoted['reply']} }}}}"
    )


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

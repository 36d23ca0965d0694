"""Llama 3's dialog format: each message is a header, a blank line, the trimmed content and <|eot_id|>.

Format: Meta's llama-models, `chat_format.py`. Content is trimmed as Hugging Face's template for Llama 3 does,
so that a header's two newlines are always the same ids, in training and at a reply.
"""

import json
from collections.abc import Mapping, Sequence

from llamita.tokenizer.llama3 import Tokenizer

HEADERS = {"system": "system", "user": "user", "assistant": "assistant", "tool": "ipython"}

# What Hugging Face and llama.cpp run where llamita runs `render`; `generation` spans what the mask spans.
TEMPLATE = (
    f"{{%- set headers = {json.dumps(HEADERS)} -%}}"
    + """
{{- bos_token }}
{%- for message in messages %}
    {%- if message["role"] not in headers %}
        {{- raise_exception("the role of a message must be system, user, assistant or tool") }}
    {%- endif %}
    {%- if message["content"] is not string %}
        {{- raise_exception("the content of a message must be text") }}
    {%- endif %}
    {{- "<|start_header_id|>" + headers[message["role"]] + "<|end_header_id|>\\n\\n" }}
    {%- if message["role"] == "assistant" %}
        {%- generation %}
            {{- (message["content"] | trim) + "<|eot_id|>" }}
        {%- endgeneration %}
    {%- else %}
        {{- (message["content"] | trim) + "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}
{%- endif %}
"""
)


def render(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], *, reply: bool = False
) -> tuple[list[int], list[bool]]:
    """Ids of a dialog and, for each, whether the assistant speaks it: its content and its <|eot_id|>.

    `messages` are {"role", "content"} with role system, user, assistant or tool; `reply` ends with an open
    assistant header. Content is never read for special tokens. ValueError on anything else.
    """
    if not messages:
        raise ValueError("a dialog needs at least one message")
    ids, mask = [tokenizer.bos_id], [False]

    def header(name: str) -> list[int]:
        start, end = (tokenizer.specials[f"<|{side}_header_id|>"] for side in ("start", "end"))
        return [start, *tokenizer.encode(name), end, *tokenizer.encode("\n\n")]

    for i, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in HEADERS:
            raise ValueError(f"message {i} has the role {role!r}; use one of {', '.join(HEADERS)}")
        if not isinstance(content, str):
            raise ValueError(f"message {i} ({role}) has no text: its content must be a string")
        head, body = header(HEADERS[role]), [*tokenizer.encode(content.strip()), tokenizer.eot_id]
        ids += head + body
        mask += [False] * len(head) + [role == "assistant"] * len(body)
    if reply:
        head = header("assistant")
        ids += head
        mask += [False] * len(head)
    return ids, mask

"""The tokenizer of an imported model that is not Llama 3's: it travels with the model, ids and all."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from jinja2 import Template

from llamita.tokenizer import template
from llamita.tokenizer.emit import added_token, begins_with, ranks, replace_files
from llamita.tokenizer.foreign import JsonTokenizer
from llamita.tokenizer.llama3 import FILE_NAME, MAX_TOKEN_BYTES, Tokenizer
from llamita.tokenizer.vocabulary import JSON_NAME

MAX_TOKENS = 1 << 20
# Tokens that llama.cpp takes for the end of a reply by their name alone, in any vocabulary.
ENDS = frozenset(("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "</s>", "<|endoftext|>"))


def ids_of(content: Any) -> dict[str, int]:
    """Every token of a tokenizer.json and its id.

    ValueError unless the model is BPE, with ids below MAX_TOKENS that no two tokens share and names of at most
    MAX_TOKEN_BYTES characters.
    """
    try:
        kind, vocab = content["model"].get("type", "BPE"), content["model"]["vocab"]
        pairs = [*vocab.items(), *((token["content"], token["id"]) for token in content.get("added_tokens") or ())]
    except (TypeError, KeyError, AttributeError):
        raise ValueError("no tokenizer.json with a table of tokens; give a whole one of a BPE model") from None
    if kind != "BPE":
        raise ValueError(f"the tokenizer's model is {kind}; llamita carries BPE alone")
    if len(pairs) > MAX_TOKENS:
        raise ValueError(f"the tokenizer has {len(pairs)} tokens; {MAX_TOKENS} is the most")
    names: dict[int, str] = {}
    for name, i in pairs:
        if not (type(i) is int and 0 <= i < MAX_TOKENS and isinstance(name, str) and 0 < len(name) <= MAX_TOKEN_BYTES):
            raise ValueError(
                f"the token {str(name)[:40]!r} with the id {str(i)[:20]} is refused: ids are below {MAX_TOKENS}, "
                f"names have 1 to {MAX_TOKEN_BYTES} characters"
            )
        if names.setdefault(i, name) != name:
            raise ValueError(f"the tokens {names[i]!r} and {name!r} share the id {i}; each needs its own")
    return {name: i for i, name in names.items()}


def merges_of(content: dict[str, Any]) -> list[tuple[str, str]]:
    """The merges of a tokenizer.json, in their order; ValueError for one that joins or makes an unknown token."""
    vocab, merges = content["model"]["vocab"], list[tuple[str, str]]()
    for merge in content["model"].get("merges") or ():
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
            raise ValueError(f"merge {len(merges)} is no pair of tokens, but {str(merge)[:80]!r}")
        left, right = pair
        if not {left, right, left + right} <= vocab.keys():
            raise ValueError(f"merge {len(merges)}, {left[:40]!r} with {right[:40]!r}, names a token that is unknown")
        merges.append((left, right))
    return merges


class CarriedTokenizer(JsonTokenizer):
    """Ids for text and text for ids as the tokenizers library gives them, and the model's own chat template.

    `content` is the tokenizer.json; `controls` has the ids of bos, eos, pad and unk, as far as there are any;
    `adds_bos` says whether a text begins with BOS; `specials` maps the names of special tokens to ids, and the
    names never come out of plain text. EOS, BOS where it is added, and added tokens that are control tokens here
    are special whatever the file says; `stop_ids` gains the end tokens that llama.cpp knows by name; ids below
    `vocab_size` that have no token stand for no text.
    ValueError as `ids_of` and JsonTokenizer, for a control id that has no token, without `eos_id`, if the library
    gives a token another id, or finds a special token in plain text, and for a template above MAX_TEMPLATE.
    """

    def __init__(
        self,
        content: dict[str, Any],
        *,
        eos_id: int | None,
        bos_id: int | None = None,
        pad_id: int | None = None,
        unk_id: int | None = None,
        stop_ids: Iterable[int] = (),
        adds_bos: bool = False,
        chat_template: str | None = None,
    ):
        ids = ids_of(content)
        if eos_id is None:
            raise ValueError("the tokenizer names no end token; give eos_token in tokenizer_config.json")
        if len(chat_template or "") > template.MAX_TEMPLATE:
            raise ValueError(f"the chat template has more than {template.MAX_TEMPLATE} characters")
        self.bos_id, self.eos_id, self.pad_id = bos_id, eos_id, pad_id
        ids_by_kind = {"bos": bos_id, "eos": eos_id, "pad": pad_id, "unk": unk_id}
        self.controls = {kind: i for kind, i in ids_by_kind.items() if i is not None}
        self.adds_bos = adds_bos and bos_id is not None
        self.chat_template = chat_template
        added = {token["content"]: token for token in content.get("added_tokens") or ()}
        self.stop_ids = frozenset((eos_id, *stop_ids, *(ids[name] for name in ENDS & added.keys())))
        self._names = {i: name for name, i in ids.items()}
        controls = {*self.stop_ids, *self.controls.values()}
        if lost := sorted(controls - self._names.keys()):
            raise ValueError(f"the control token {lost[0]} is not in the vocabulary; its {len(ids)} tokens lack it")
        bos = self._names[bos_id] if bos_id is not None and self.adds_bos else None
        # A stop or padding token that is a word (often "!") stays one.
        special = {self._names[i]: i for i in controls if i == eos_id or self._names[i] in {bos, *added}}
        self.content = _settled(content, special, bos)
        super().__init__(json.dumps(self.content).encode())
        for name, i in ids.items():
            if self._tokenizer.token_to_id(name) != i:
                raise ValueError(f"the tokenizers library gives the token {name!r} another id than its own, {i}")
        self.specials = {self._names[i]: i for i in sorted(self._special)}
        for name, i in self.specials.items():
            if len(name) < 2 or i in self.encode(name):
                raise ValueError(f"plain text may become the special token {name!r}; llamita carries no such tokenizer")
        holes = set(range(self.vocab_size)) - self._pieces.keys()
        self._pieces = dict(self._pieces) | dict.fromkeys(holes, b"")
        self._special = frozenset(holes.union(self._special))

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json, and generation_config.json, where all stops have room.

        A Llama 3 vocabulary also gets its tokenizer.model, which Meta's code reads.
        """
        from llamita.tokenizer.known import llama3  # which needs this module first

        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **self._control_names,
            "add_bos_token": self.adds_bos,
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            **({} if self.chat_template is None else {"chat_template": self.chat_template}),
        }
        stops = {"bos_token_id": self.bos_id, "eos_token_id": sorted(self.stop_ids), "pad_token_id": self.pad_id}
        files = {JSON_NAME: self.content, "tokenizer_config.json": config, "generation_config.json": stops}
        encoded = {name: json.dumps(data, ensure_ascii=False).encode() for name, data in files.items()}
        vocabulary = llama3(self.content)
        replace_files(Path(folder), encoded | ({FILE_NAME: ranks(vocabulary)} if vocabulary else {}))

    def encode(
        self,
        text: str,
        *,
        bos: bool = False,
        eos: bool = False,
        specials: Literal["text", "allow", "forbid"] = "text",
    ) -> list[int]:
        """Ids of `text`, with EOS behind it if asked for, and with BOS before it if asked for and `adds_bos`.

        So `bos` makes of a text what the model has seen at the beginning of one: SmolLM2 has seen no BOS there.
        The names of special tokens are plain text unless `specials` is "allow"; "forbid" refuses them with a
        ValueError. A surrogate pair counts as the character it stands for, a lone surrogate as U+FFFD.
        """
        if specials == "forbid" and (found := self._special_name.search(text)):
            raise ValueError(f"the text holds the special token {found[0]} at character {found.start()}; take it out")
        if specials == "allow":
            ids = list(self._reader.encode(template.kept(text), add_special_tokens=False).ids)
        else:
            ids = super().encode(text)
        start = [self.bos_id] if bos and self.adds_bos else []
        return [*start, *ids, *[self.eos_id] * eos]

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD. Specials give their names, or nothing."""
        return super().decode([i for i in ids if not (skip_special and self.is_special(i))])

    def render(self, messages: Sequence[Mapping[str, Any]], *, reply: bool = False) -> tuple[list[int], list[bool]]:
        """Ids of a dialog as the model's own template writes it and, for each, whether the assistant speaks it.

        `reply` ends with what opens the assistant's next message; then nothing is marked as spoken. BOS comes
        first where `adds_bos`, once, whether or not the template writes it. An assistant's message is what the
        template adds to the open dialog before it, up to a stop token. No text in the messages becomes a special
        token. ValueError without a template or messages, with the reason where the template refuses the messages,
        and where it writes a message otherwise when more follow it, for then no one can say who speaks.
        """
        if self.chat_template is None:
            raise ValueError("the model has no chat template, so it cannot chat; give it a text to continue")
        if not messages or not all(isinstance(m, Mapping) and isinstance(m.get("role"), str) for m in messages):
            raise ValueError('a dialog needs messages, each {"role": ..., "content": ...}')
        broken = template.broken_up(list(messages), self._special_name)
        text = self._filled(broken, reply)
        encoding = self._reader.encode(text, add_special_tokens=False)
        ids, mask = list(encoding.ids), [False] * len(encoding.ids)
        for first, end in [] if reply else self._spoken(broken, text):
            inside = [at for at, (start, _) in enumerate(encoding.offsets) if first <= start < end]
            stops = [at for at in inside if ids[at] in self.stop_ids]
            for at in inside:
                mask[at] = not stops or at <= stops[-1]
        if self.adds_bos and ids[:1] != [self.bos_id]:
            ids, mask = [self.bos_id, *ids], [False, *mask]
        return ids, mask

    def _spoken(self, messages: list[Any], text: str) -> Iterable[tuple[int, int]]:
        """From where to where in `text` each of the assistant's messages goes."""
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                before, whole = self._filled(messages[:i], True), self._filled(messages[: i + 1], False)
                if not (whole.startswith(before) and text.startswith(whole)):
                    raise ValueError(f"the chat template writes what comes up to message {i} otherwise if more follows")
                yield len(before), len(whole)

    def _filled(self, messages: list[Any], reply: bool) -> str:
        return template.filled(self._template, messages, reply, self._control_names)

    @property
    def _control_names(self) -> dict[str, str]:
        """As a tokenizer_config.json and a template have them; a word is none, for others would make it special."""
        return {f"{kind}_token": self._names[i] for kind, i in self.controls.items() if i in self._special}

    @cached_property
    def _template(self) -> Template:
        return template.compiled(self.chat_template or "")

    @cached_property
    def _special_name(self) -> Any:
        return template.any_of(self.specials)

    @cached_property
    def _reader(self) -> Any:
        """The library's tokenizer that finds special tokens in text."""
        return type(self._tokenizer).from_str(json.dumps(template.undoing(self.content)))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the tokenizer.json: two that are equal give equal ids."""
        return hashlib.sha256(json.dumps(self.content, sort_keys=True).encode()).hexdigest()


def _settled(content: dict[str, Any], controls: dict[str, int], bos: str | None) -> dict[str, Any]:
    """`content` with its control tokens special, special tokens found in text as it stands, and BOS as asked."""
    added = {token["content"]: token for token in content.get("added_tokens") or ()}
    for name, i in controls.items():
        added[name] = added.get(name, added_token(name, i)) | {"special": True}
    for name, token in added.items():
        # The library normalises a name with "normalized" as if it began a text, and so misses it elsewhere.
        added[name] = token | {"normalized": bool(token.get("normalized") and not token.get("special"))}
    return content | {
        "added_tokens": sorted(added.values(), key=lambda token: token["id"]),
        "truncation": None,
        "padding": None,
        "post_processor": None if bos is None else begins_with(bos, controls[bos]),
        "model": content["model"] | {"merges": [*map(list, merges_of(content))], "dropout": None},
    }


AnyTokenizer = Tokenizer | CarriedTokenizer

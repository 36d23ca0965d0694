"""Layer: tokenizers of imported models: ids, chat, files and GGUF fields, against the libraries and damaged files."""

import json
import re
import shutil
import struct
import sys

import pytest
from hypothesis import given, settings

from llamita.tokenizer import Tokenizer, chat, emit, template
from llamita.tokenizer.carried import CarriedTokenizer, ids_of
from llamita.tokenizer.llama2 import SentencePieceTokenizer
from llamita.tokenizer.llamacpp import from_gguf
from llamita.tokenizer.opened import open_tokenizer
from llamita.tokenizer.pieces import from_llama2c, from_sentencepiece
from llamita.tokenizer.train import train
from tests.test_tokenizer import SOURCE, TORTURE
from tests.test_vocabularies import ODD, PROPERTY, TEXT, _trained, _vectors

tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe good.<|im_end|>\n"
    "{% endif %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NAMES = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
DIALOG = [
    {"role": "user", "content": "Hi there"},
    {"role": "assistant", "content": "hello,\nyou"},
    {"role": "user", "content": "More"},
    {"role": "assistant", "content": "bye"},
]
TEXTS = [*TORTURE, *ODD, "1234 12a3", "<|im_end|><|endoftext|>"]
META_3_0 = [f"<|reserved_special_token_{i}|>" for i in range(4)]


def key(name: str) -> str:
    return f"tokenizer.ggml.{name}"


def smol_fields(**changes) -> dict:
    """The fields of a small vocabulary shaped like SmolLM2's: specials first, digits one by one, no BOS."""
    ours = train(SOURCE, 700)
    tokens = [*NAMES, *map(emit.spell, ours.tokens)]
    fields = {
        "model": "gpt2", "pre": "smollm", "tokens": tokens, "token_type": [3] * 3 + [1] * len(ours.tokens),
        "merges": [" ".join(pair) for pair in emit.merges(ours)], "bos_token_id": 1, "eos_token_id": 2,
        "unknown_token_id": 0, "padding_token_id": 2, "add_bos_token": False, "add_space_prefix": False,
    }  # fmt: skip
    return {key(name): value for name, value in (fields | changes).items()} | {"tokenizer.chat_template": CHATML}


@pytest.fixture(scope="module")
def smol() -> CarriedTokenizer:
    return from_gguf(smol_fields())


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return train(SOURCE, 700)


@pytest.fixture(scope="module")
def llama2(shared_data) -> CarriedTokenizer:
    pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    return open_tokenizer(shared_data / "tokenizers" / "llama2_tokenizer.model")


def changed(tokenizer: CarriedTokenizer, **changes) -> CarriedTokenizer:
    given = {name: getattr(tokenizer, name) for name in ("stop_ids", "adds_bos", "chat_template")}
    given |= {f"{kind}_id": i for kind, i in tokenizer.controls.items()}
    return CarriedTokenizer(changes.pop("content", tokenizer.content), **(given | changes))


# ---- ids ----


def test_ids_are_those_of_the_splits_that_the_name_stands_for():
    from tokenizers import models, pre_tokenizers

    for pre, digits in (("smollm", True), ("gpt-2", False)):
        fields = smol_fields(pre=pre)
        vocab = {name: i for i, name in enumerate(fields[key("tokens")])}
        theirs = tokenizers.Tokenizer(models.BPE(vocab, [tuple(m.split(" ")) for m in fields[key("merges")]]))
        steps = [pre_tokenizers.Digits(individual_digits=True)] * digits
        theirs.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        mine, other = (from_gguf(fields), from_gguf(smol_fields(pre="default" if digits else "smollm")))
        texts = [text for text in TEXTS if text.isprintable()] + ["a1 22 333 4444+=5"]
        ids = [theirs.encode(text).ids for text in texts]
        assert [mine.encode(text) for text in texts] == ids and mine.encode_batch(texts) == ids
        assert [other.encode(text) for text in texts] != ids
        assert [mine.decode(i) for i in ids] == texts


def test_control_tokens(smol):
    assert (smol.bos_id, smol.eos_id, smol.pad_id, smol.vocab_size) == (1, 2, 2, 447)
    assert smol.stop_ids == {0, 2} and smol.adds_bos is False
    assert smol.specials == dict(zip(NAMES, range(3), strict=True))
    plain = smol.encode("a<|im_end|>b")
    assert smol.encode("a<|im_end|>b", bos=True, eos=True) == [*plain, 2] and not any(map(smol.is_special, plain))
    assert smol.encode("a<|im_end|>b", specials="allow") == [*smol.encode("a"), 2, *smol.encode("b")]
    with pytest.raises(ValueError, match=r"special token <\|im_end\|> at character 1"):
        smol.encode("a<|im_end|>b", specials="forbid")
    assert smol.decode([1, *smol.encode("hi"), 2]) == "<|im_start|>hi<|im_end|>"
    assert smol.decode([1, *smol.encode("hi"), 2], skip_special=True) == "hi"
    with pytest.raises(ValueError, match="outside the vocabulary of 447"):
        smol.decode([447])


def test_bos_comes_where_the_tokenizer_puts_it(smol, llama2):
    assert llama2.encode("Hello", bos=True) == [1, 15043] and llama2.adds_bos
    assert smol.encode("Hello", bos=True) == smol.encode("Hello")
    assert Tokenizer.adds_bos and chat.TEMPLATES["llama3"] == train(SOURCE, 600).chat_template


@pytest.mark.parametrize("where", ["trained", "llama2"])
def test_sentencepiece_as_json_equals_sentencepiece(where, tmp_path, request):
    pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    path = tmp_path / "tokenizer.model"
    if where == "llama2":
        path = request.getfixturevalue("shared_data") / "tokenizers" / "llama2_tokenizer.model"
    else:
        path.write_bytes(_trained())
    theirs, mine = SentencePieceTokenizer.load(path), from_sentencepiece(path)
    again = from_gguf(emit.gguf_fields(mine))
    content = mine.content
    merges = content["model"]["merges"]
    mutant, poorer = (
        changed(mine, content=content | {"model": content["model"] | {"merges": other}})
        for other in (merges[::-1], merges[1:])
    )
    texts = [*TEXTS, " " * 41, "the cat sat on a mat, Hello"]
    ids = [theirs.encode(text) for text in texts]
    assert [mine.encode(text) for text in texts] == ids == [again.encode(text) for text in texts]
    assert [mutant.encode(text) for text in texts] != ids
    assert [mine.decode(i) for i in ids] == [theirs.decode(i) for i in ids]
    with pytest.raises(ValueError, match="follow no scores"):
        emit.gguf_fields(poorer)

    @settings(PROPERTY, max_examples=50)
    @given(TEXT)
    def check(text):
        assert mine.encode(text) == theirs.encode(text)

    check()


def test_a_real_gguf_and_the_vectors_of_llama_cpp(llama2, shared_data):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    reader = gguf.GGUFReader(shared_data / "tokenizers" / "ggml-vocab-llama-spm.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    read, (texts, ids) = from_gguf(fields), _vectors(shared_data)
    assert read.encode_batch(texts) == ids and read.fingerprint == llama2.fingerprint
    assert from_gguf(fields | {key("add_space_prefix"): False}).encode_batch(texts) != ids
    back = emit.gguf_fields(read)
    assert {name for name in back if back[name] != fields.get(name)} == {key("scores"), key("add_space_prefix")}


def test_llama2c(shared_data, tmp_path):
    path = shared_data / "weights" / "tok512.bin"
    tokenizer = from_llama2c(path, 512)
    written, at = [], 4
    while at < path.stat().st_size:
        length = struct.unpack_from("<fi", path.read_bytes(), at)[1]
        written.append(path.read_bytes()[at + 8 : at + 8 + length])
        at += 8 + length
    assert [tokenizer.token_bytes(i) for i in range(3, 259)] == [bytes([byte]) for byte in range(256)]
    assert [tokenizer.token_bytes(i) for i in range(259, 512)] == written[259:]
    assert tokenizer.encode("Once upon a time", bos=True) == [1, 403, 407, 261, 378]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids, tokenizer.is_special(0)) == (1, 2, {2}, True)
    assert not any(map(tokenizer.is_special, tokenizer.encode("<s></s><unk>")))
    for size, said in ((511, "after 511 tokens"), (513, "breaks at token 512"), (1 << 40, "breaks at token 512")):
        with pytest.raises(ValueError, match=said):
            from_llama2c(path, size)
    cut = tmp_path / "tokenizer.bin"
    cut.write_bytes(struct.pack("<ifi", 4, 0.0, -8) + b"x" * 40)
    with pytest.raises(ValueError, match="breaks at token 0"):
        from_llama2c(cut, 1)


def test_every_id_survives_holes_and_added_tokens(tmp_path):
    fields = smol_fields()
    tokens, types = fields[key("tokens")], fields[key("token_type")]
    tokens[1:1], types[1:1] = ["[PAD1]", "<think>"], [5, 4]  # everything else moves up by two
    tokens += ["<|extra|>", "[PAD450]", "<tool>"]
    types += [3, 5, 4]
    fields |= {
        key("bos_token_id"): 3,
        key("eos_token_id"): 4,
        key("padding_token_id"): 1 + tokens.index("<|extra|>") - 1,
    }
    tokenizer = from_gguf(fields)
    assert tokenizer.vocab_size == len(tokens) and emit.gguf_fields(tokenizer) == fields
    assert tokenizer.decode([1]) == "" and tokenizer.is_special(1) and not tokenizer.is_special(2)
    assert (
        tokenizer.encode("<think>a<|extra|>")[0] == 2 and tokenizer.decode(tokenizer.encode("<think> a")) == "<think> a"
    )
    tokenizer.save(tmp_path)
    again = open_tokenizer(tmp_path)
    assert emit.gguf_fields(again) == fields and again.fingerprint == tokenizer.fingerprint


# ---- chat ----


def test_a_dialog_and_who_speaks(smol):
    ids, mask = chat.render(smol, DIALOG)
    assert smol.decode(ids) == (
        "<|im_start|>system\nBe good.<|im_end|>\n<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n"
        "hello,\nyou<|im_end|>\n<|im_start|>user\nMore<|im_end|>\n<|im_start|>assistant\nbye<|im_end|>\n"
    )
    assert (
        smol.decode([i for i, spoken in zip(ids, mask, strict=True) if spoken]) == "hello,\nyou<|im_end|>bye<|im_end|>"
    )
    prompt, none = smol.render(DIALOG[:3], reply=True)
    assert prompt == ids[: len(prompt)] and not any(none) and smol.decode(prompt).endswith("<|im_start|>assistant\n")
    with pytest.raises(ValueError, match=r"llama3\.1 format"):
        chat.render(smol, DIALOG, tools=[{}])


def test_transformers_reads_the_folder_and_writes_the_same_dialog(smol, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    smol.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.apply_chat_template(DIALOG)["input_ids"] == smol.render(DIALOG)[0]
    prompt = theirs.apply_chat_template(DIALOG[:1], add_generation_prompt=True)["input_ids"]
    assert prompt == smol.render(DIALOG[:1], reply=True)[0]
    assert [theirs(text, split_special_tokens=True)["input_ids"] for text in TORTURE] == smol.encode_batch(TORTURE)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, len(theirs)) == (1, 2, 2, smol.vocab_size)


@pytest.mark.parametrize(
    "text", ["".join(NAMES), "<|im_<|im_end|>end|>", "\ufdd0", "<\ufdd01|im_end|>", "a\ufdd00b\ud800"]
)
def test_no_text_becomes_a_special_token(smol, text):
    def names(role: str, content: str) -> list[int]:
        return [i for i in smol.render([{"role": role, "content": content}], reply=True)[0] if i < 3]

    assert names(text, text) == names("x", "x") == [1, 2, 1, 2, 1]
    ids, _ = smol.render([{"role": "system", "content": text}])
    start, end = smol.encode("<|im_start|>system\n", specials="allow"), smol.encode("<|im_end|>\n", specials="allow")
    assert ids == [*start, *smol.encode(text), *end]
    if "<|im_end|>" in text and text[0] != "\ufdd0":
        assert 2 in smol.encode(text, specials="allow")


def test_special_names_that_overlap_are_all_broken_up(smol):
    pattern = re.compile(re.escape("<x>") + "|" + re.escape("x><"))
    assert template.broken_up(["<x><"], pattern) == ["<\ufdd01x\ufdd01><"]


def test_bos_comes_once(llama2):
    for written in ("{{ messages[0].content }}", "{{ bos_token + messages[0].content }}"):
        ids, mask = changed(llama2, chat_template=written).render([{"role": "user", "content": "Hello"}])
        assert ids == [1, *llama2.encode("Hello")] and mask == [False] * len(ids)


def test_llama_2s_template_and_its_generation_block(llama2):
    written = "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    written += "{% else %}{% generation %} {{ m.content }} {{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    tokenizer = changed(llama2, chat_template=written)
    ids, mask = tokenizer.render(DIALOG)
    assert tokenizer.decode(ids) == "<s>[INST] Hi there [/INST] hello,\nyou </s><s> [INST] More [/INST] bye </s>"
    assert tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m]) == "hello,\nyou </s> bye </s>"


BAD_TEMPLATES = {
    "{{ raise_exception('only\nusers') }}": "refuses the messages: only$",
    "{{ messages[9].content.x }}": "refuses the messages",
    "{{ 1 // 0 }}": "refuses the messages",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": "refuses the messages: .*unsafe",
    "{{ messages.append(1) }}": "refuses the messages: .*not safely callable|unsafe",
    "{% for": "is no Jinja",
    "{% include '/etc/passwd' %}": "refuses the messages",
    "{{ messages | length }}": "up to message 1 otherwise if",
    "{% for a in [1] %}" * 25 + "x" + "{% endfor %}" * 25: "is no Jinja that can be read: too many statically nested",
}


@pytest.mark.parametrize("written", BAD_TEMPLATES)
def test_bad_and_hostile_templates_are_one_line(smol, written):
    with pytest.raises(ValueError, match=BAD_TEMPLATES[written]) as error:
        changed(smol, chat_template=written).render(DIALOG)
    assert "\n" not in str(error.value)


GROWS = "{%% set n = namespace(x=%s) %%}{%% for i in range(60) %%}%s{%% endfor %%}{{ n.x | string | length }}"
ENDLESS = [
    "{{ ('a' * 3000000000) | length }}",
    "{{ (3 ** 3000000000) > 1 }}",
    "{{ ('%3000000000d' % 1) | length }}",
    "{{ ('%*d' % (3000000000, 1)) | length }}",
    "{{ '{:3000000000}'.format(1) | length }}",
    "{{ 'a' | center(3000000000) | length }}",
    "{{ 'a'.center(3000000000) | length }}",
    "{{ 'a'.encode().center(3000000000) | length }}",
    "{{ ('a' * 90000).replace('a', 'b' * 90000) | length }}",
    "{{ ([('a' * 90000)] * 90000) | join | length }}",
    "{{ lipsum(1000000000) }}",
    "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
    "{% for a in range(90) recursive %}{% if loop.depth < 30 %}{{ loop(range(90)) }}{% endif %}{% endfor %}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "{{ range(90000) | map('center', 90000) | list | length }}",
    "{% for i in range(90000) %}" + "long text " * 9000 + "{% endfor %}",
    GROWS % ("'ab'", "{% set n.x = n.x ~ n.x %}"),
    GROWS % ("'ab'", "{% set n.x = n.x + n.x %}"),
    GROWS % ("'ab'", "{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}"),
    GROWS % ("'ab' * 1000000", "{% set n.x = n.x[:-1] %}"),
    GROWS % ("[1]", "{% set n.x = [n.x, n.x] %}"),
    GROWS % ("3", "{% set n.x = n.x * n.x %}"),
]


@pytest.mark.parametrize("written", ENDLESS)
def test_no_template_works_without_end(smol, written):
    with pytest.raises(ValueError, match=r"more work or memory than a dialog needs$|'lipsum' is undefined"):
        changed(smol, chat_template=written).render(DIALOG)


def test_a_long_dialog_is_not_too_much_work():
    dialog = [{"role": role, "content": "many words in a message " * 20} for role in ("user", "assistant") * 500]
    program = template.compiled(chat.TEMPLATES["llama3.1"])
    assert len(template.filled(program, dialog, True, {"bos_token": ""})) > 500_000


def test_what_cannot_chat_says_so(smol):
    with pytest.raises(ValueError, match="no chat template"):
        changed(smol, chat_template=None).render(DIALOG)
    with pytest.raises(ValueError, match="more than 131072 characters"):
        changed(smol, chat_template="x" * 131_073)
    for messages in ([], ["text"], [{"content": "x"}]):
        with pytest.raises(ValueError, match="a dialog needs messages"):
            smol.render(messages)
    with pytest.raises(ValueError, match="refuses the messages"):
        smol.render([{"role": "user", "content": None}])


def test_functions_that_templates_expect(smol):
    written = "{{ messages | tojson }}{{ strftime_now('%Y') | length }}{% for _ in [1, 2] %}{% break %}{% endfor %}"
    ids, _ = changed(smol, chat_template=written).render([{"role": "user", "content": "<\u00e9>"}])
    assert smol.decode(ids) == '[{"role": "user", "content": "<\u00e9>"}]4'


# ---- files ----


@pytest.mark.parametrize("chat_format", ["llama3", "llama3.1"])
def test_llama_3_is_known_without_its_ranks(chat_format, tmp_path, ours):
    tokenizer = Tokenizer(ours.tokens, chat_format)
    tokenizer.save(tmp_path)
    assert type(open_tokenizer(tmp_path)) is Tokenizer
    (tmp_path / "tokenizer.model").unlink()
    for opened in (
        open_tokenizer(tmp_path),
        open_tokenizer(tmp_path / "tokenizer.json"),
        from_gguf(emit.gguf_fields(tokenizer)),
    ):
        assert type(opened) is Tokenizer and opened.chat_format == chat_format
        assert opened.fingerprint == tokenizer.fingerprint


def test_llama_3_by_its_other_names_and_what_only_looks_like_it(ours):
    fields = emit.gguf_fields(ours)
    first, tokens = len(ours.tokens), fields[key("tokens")]
    early = [
        *tokens[: first + 2],
        *META_3_0,
        *tokens[first + 6 : first + 8],
        "<|reserved_special_token_4|>",
        tokens[first + 9],
    ]
    early += [f"<|reserved_special_token_{i}|>" for i in range(5, 251)]
    assert len(early) == len(tokens)
    assert type(from_gguf(fields | {key("tokens"): early})) is Tokenizer
    merges = fields[key("merges")]
    for other in (
        {key("tokens"): [name.replace("eot_id", "im_end") for name in tokens]},
        {key("tokens"): [name.replace("eom_id", "mine") for name in tokens]},
        {key("merges"): [merges[1], merges[0], *merges[2:]]},
        {key("add_bos_token"): False},
        {key("pre"): "smollm"},
        {"tokenizer.chat_template": CHATML},
    ):
        assert type(from_gguf(fields | other)) is CarriedTokenizer, other


def test_a_carried_llama_3_gives_the_ids_of_ours(ours):
    fields = emit.gguf_fields(ours)
    carried = from_gguf(fields | {"tokenizer.chat_template": CHATML})
    assert carried.encode_batch(TEXTS) == ours.encode_batch(TEXTS) and carried.specials == ours.specials
    assert carried.encode("a", bos=True) == ours.encode("a", bos=True) and carried.stop_ids == ours.stop_ids
    assert emit.gguf_fields(carried)[key("pre")] == "llama-bpe"


HERMES = chat.TEMPLATES["llama3"].replace(
    "{{- bos_token }}",
    "{{- bos_token + '<|start_header_id|>system<|end_header_id|>\\n\\nYou are Hermes<|eot_id|>' }}",
)
NOT_OURS = {
    "another system block": HERMES,
    "a system block where there is none": HERMES.replace("bos_token + ", "bos_token if messages[1:] else bos_token + "),
    "another end of many turns": chat.TEMPLATES["llama3"] + "{{ 'Go on.' if messages[3:] }}",
    "no trimming": chat.TEMPLATES["llama3"].replace(" | trim", ""),
    "another end": chat.TEMPLATES["llama3"] + "{% if not add_generation_prompt %}.{% endif %}",
    "no system": chat.TEMPLATES["llama3"].replace('"system": "system", ', ""),
    "dated by the clock, as Llama 3.2": chat.TEMPLATES["llama3.1"].replace('"26 Jul 2024"', "strftime_now('%d %b %Y')"),
    "no Jinja": "{% for <|start_header_id|>",
}


@pytest.mark.parametrize("why", NOT_OURS)
def test_a_llama_3_with_another_template_is_carried(why, ours):
    assert NOT_OURS[why] not in chat.TEMPLATES.values()
    carried = from_gguf(emit.gguf_fields(ours) | {"tokenizer.chat_template": NOT_OURS[why]})
    assert type(carried) is CarriedTokenizer and carried.chat_template == NOT_OURS[why]


def test_a_template_in_other_words_that_writes_our_dialogs_is_ours(ours):
    header = "'<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\n\n'"
    written = (
        f"{{% for m in messages %}}{{{{ bos_token * loop.first + {header} + m.content | trim + '<|eot_id|>' }}}}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    )
    fields = emit.gguf_fields(ours) | {key("eos_token_id"): ours.eot_id}
    by_eos = {"tokenizer.chat_template": written.replace("'<|eot_id|>'", "eos_token")}
    for one in (written, written.replace("bos_token * loop.first + ", ""), *by_eos.values()):
        assert type(from_gguf(fields | {"tokenizer.chat_template": one})) is Tokenizer
    assert type(from_gguf(fields | by_eos | {key("eos_token_id"): ours.eos_id})) is CarriedTokenizer


@pytest.mark.parametrize("left", ["tokenizer.model", "tokenizer.json", "both"])
def test_llama_3_beside_anothers_files(left, ours, tmp_path):
    ours.save(tmp_path)
    for name in {"tokenizer.model", "tokenizer.json"} - {left} if left != "both" else ():
        (tmp_path / name).unlink()
    config, generation = tmp_path / "tokenizer_config.json", tmp_path / "generation_config.json"
    for stops in (ours.eos_id, [ours.eot_id], sorted(ours.stop_ids), [ours.vocab_size]):
        generation.write_text(json.dumps({"eos_token_id": stops}))
        assert type(open_tokenizer(tmp_path)) is Tokenizer
    other = "<|reserved_special_token_9|>"
    for file, change, told in (
        (generation, {"eos_token_id": [ours.specials[other]]}, lambda it: ours.specials[other] in it.stop_ids),
        (config, {"eos_token": other}, lambda it: it.eos_id == ours.specials[other]),
        (config, {"bos_token": other}, lambda it: it.bos_id == ours.specials[other]),
        (config, {"add_bos_token": False}, lambda it: not it.adds_bos),
        (config, {"chat_template": HERMES}, lambda it: it.chat_template == HERMES),
    ):
        before = file.read_text()
        file.write_text(json.dumps(json.loads(before) | change))
        carried = open_tokenizer(tmp_path)
        file.write_text(before)
        assert type(carried) is CarriedTokenizer and told(carried) and carried.stop_ids >= ours.stop_ids
        assert carried.encode_batch(TEXTS) == ours.encode_batch(TEXTS) and carried.specials == ours.specials
    assert carried.decode(carried.render(DIALOG)[0]).count("You are Hermes<|eot_id|>") == 1
    fields = emit.gguf_fields(carried)
    assert fields[key("pre")] == "llama-bpe" and fields[key("tokens")] == emit.gguf_fields(ours)[key("tokens")]
    carried.save(tmp_path / "again")
    for again in (from_gguf(fields), open_tokenizer(tmp_path / "again")):
        assert type(again) is CarriedTokenizer and again.chat_template == HERMES
        assert again.encode_batch(TEXTS) == ours.encode_batch(TEXTS) and again.specials == ours.specials


def test_a_template_beside_ranks_sets_the_format(ours, tmp_path):
    ours.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(chat.TEMPLATES["llama3.1"])
    for path in (tmp_path, tmp_path / "tokenizer.model"):
        opened = open_tokenizer(path)
        assert type(opened) is Tokenizer and opened.chat_format == "llama3.1"
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"^.*tokenizer\.model: generation_config.json is no JSON object"):
        open_tokenizer(tmp_path)


def test_stops_of_config_json_where_generation_config_has_none(smol, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(smol.content))
    for stops in (2, [2, 5]):
        (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": stops, "bos_token_id": 1}))
        (tmp_path / "generation_config.json").write_text('{"eos_token_id": null}')
        opened = open_tokenizer(tmp_path)
        assert (opened.bos_id, opened.eos_id, opened.stop_ids) == (1, 2, {0, 2} | set([stops] if stops == 2 else stops))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 0}')
    assert open_tokenizer(tmp_path).eos_id == 0 and open_tokenizer(tmp_path).stop_ids == {0, 2}


def test_a_panic_of_the_library_is_one_line(smol, tmp_path):
    hostile = smol.content | {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(hostile))
    with pytest.raises(BaseException) as raw:
        tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("Hello")
    assert not isinstance(raw.value, Exception)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 2}')
    with pytest.raises(ValueError, match=r"no whole .* give one that tokenizers can read"):
        open_tokenizer(tmp_path)


def test_files_beside_a_tokenizer_json(smol, tmp_path):
    def write(name: str, content) -> None:
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))

    write("tokenizer.json", smol.content)
    with pytest.raises(ValueError, match="names no end token"):
        open_tokenizer(tmp_path)
    write("generation_config.json", {"eos_token_id": [2, 5]})
    assert open_tokenizer(tmp_path).eos_id == 2 and open_tokenizer(tmp_path).stop_ids == {0, 2, 5}
    write("special_tokens_map.json", {"eos_token": {"content": "<|endoftext|>"}, "bos_token": "<|im_start|>"})
    write("tokenizer_config.json", {"pad_token": "[none]", "add_bos_token": True,
                                    "chat_template": [{"name": "default", "template": CHATML}]})  # fmt: skip
    opened = open_tokenizer(tmp_path)
    assert (opened.eos_id, opened.bos_id, opened.pad_id, opened.adds_bos, opened.chat_template) == (
        0,
        1,
        None,
        True,
        CHATML,
    )
    assert opened.specials.keys() == set(NAMES)  # 5 is text that ends a reply
    write("chat_template.jinja", "{{ messages[0].content }}")
    assert open_tokenizer(tmp_path).chat_template == "{{ messages[0].content }}"
    opened.save(tmp_path / "again")
    shutil.copy(tmp_path / "generation_config.json", tmp_path / "again")
    again = open_tokenizer(tmp_path / "again")
    assert again.adds_bos and (again.eos_id, again.bos_id, again.stop_ids) == (0, 1, {0, 2, 5})
    (tmp_path / "again" / "tokenizer_config.json").write_text(
        '{"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}'
    )
    assert open_tokenizer(tmp_path / "again").adds_bos  # by the post-processor
    for content in ("[]", "{", "[" * 100_000):
        write("generation_config.json", content)
        with pytest.raises(ValueError, match=r"^.*tokenizer.json: generation_config.json is no JSON"):
            open_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="no tokenizer; give a folder"):
        open_tokenizer(tmp_path / "none")
    for odd in ({"pre_tokenizer": "x"}, {"pre_tokenizer": [1]}, {"post_processor": {"single": 1}}, {"normalizer": 1}):
        (tmp_path / "again" / "tokenizer.json").write_text(json.dumps(smol.content | odd))
        with pytest.raises(ValueError, match=r"tokenizer\.json: no whole tokenizer\.json"):
            open_tokenizer(tmp_path / "again")


BAD_FIELDS = {
    "no model": ({"model": None}, "tokenizer.ggml.model is None"),
    "another model": ({"model": "bert"}, "'bert'; llamita reads gpt2 and llama"),
    "another split": ({"pre": "qwen2"}, "'qwen2'; the splits known are llama-bpe, smollm, gpt-2, default"),
    "types": ({"token_type": [1]}, "447 tokens with 1 types"),
    "a type": ({"token_type": [9] * 447}, "token 0 has the type 9 and"),
    "text for ids": ({"eos_token_id": "2"}, "eos_token_id is str"),
    "numbers for tokens": ({"tokens": [1, 2]}, "tokens holds other values"),
    "a token twice": ({"tokens": ["a"] * 447}, "holds the token 'a' twice"),
    "a long token": ({"tokens": ["a" * 1025], "token_type": [1], "merges": []}, "and 1025 characters"),
    "an empty token": ({"tokens": [""], "token_type": [1], "merges": []}, "is refused"),
    "merges": ({"merges": ["Q no_such"]}, "merge 0, 'Q' with 'no_such', names a token that is unknown"),
    "half a merge": ({"merges": ["Q"]}, "merge 0 is no pair"),
    "an id": ({"bos_token_id": 447}, "control token 447 is not in the vocabulary"),
    "no end": ({"eos_token_id": None}, "names no end token"),
    "no scores": ({"model": "llama"}, "447 tokens with 0 scores"),
    "no bytes": ({"tokens": NAMES, "token_type": [3] * 3, "merges": []}, "tokens"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_FIELDS)
def test_bad_gguf_fields_are_one_clear_line(kind):
    changes, said = BAD_FIELDS[kind]
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        from_gguf(smol_fields(**changes))
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("vocab", "said"),
    [
        ({"a": 1 << 20}, "ids are below"),
        ({"a": True}, "is refused"),
        ({"a": -1}, "is refused"),
        ({"a": 0, "b": 0}, "share the id 0"),
    ],
)
def test_ids_are_bounded(vocab, said):
    with pytest.raises(ValueError, match=said):
        ids_of({"model": {"type": "BPE", "vocab": vocab}})


def test_other_tokenizer_jsons_are_refused(smol, monkeypatch):
    for content in (
        {},
        {"model": None},
        {"model": {"type": "BPE"}},
        {"model": {"vocab": []}},
        {"model": {"vocab": {}}, "added_tokens": [1]},
    ):
        with pytest.raises(ValueError, match="give a whole one"):
            changed(smol, content=content)
    with pytest.raises(ValueError, match="is Unigram; llamita carries BPE alone"):
        changed(smol, content={"model": {"type": "Unigram", "vocab": {}}})
    word = smol.content | {
        "model": smol.content["model"] | {"ignore_merges": True},
        "pre_tokenizer": emit.byte_level(use_regex=False),
    }
    with pytest.raises(ValueError, match="plain text may become the special token"):
        changed(smol, content=word)
    moved = smol.content | {"added_tokens": [*smol.content["added_tokens"], emit.added_token("<far>", 900)]}
    with pytest.raises(ValueError, match="gives the token '<far>' another id"):
        changed(smol, content=moved)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"pip install 'llamita\[compare\]'"):
        changed(smol)


def test_what_llama_cpp_could_not_run_is_not_written(smol, llama2):
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
    for tokenizer, change in (
        (smol, {"pre_tokenizer": emit.byte_level(use_regex=True) | {"add_prefix_space": True}}),
        (smol, {"normalizer": {"type": "NFC"}}),
        (smol, {"model": smol.content["model"] | {"ignore_merges": True}}),
        (llama2, {"normalizer": None, "pre_tokenizer": metaspace}),
    ):
        other = changed(tokenizer, content=tokenizer.content | change)
        with pytest.raises(ValueError, match=r"llama\.cpp knows no split like"):
            emit.gguf_fields(other)
    with pytest.raises(ValueError, match="4 stop tokens more than EOS; a GGUF file has room for two"):
        emit.gguf_fields(changed(smol, stop_ids=[5, 6, 7, 8]))
    fields = emit.gguf_fields(changed(smol, stop_ids=[5, 6]))
    assert (fields[key("eot_token_id")], fields[key("eom_token_id")]) == (5, 6) and from_gguf(fields).stop_ids == {
        0,
        2,
        5,
        6,
    }


def test_a_carried_llama_3_keeps_its_ranks_for_metas_code(tmp_path):
    """Its own template makes it carried; tokenizer.model lies beside all the same, and gives way on reopening."""
    tokens = [*(bytes([byte]) for byte in range(256)), b"th", b"the"]
    Tokenizer(tokens).save(tmp_path / "a")
    config = json.loads((tmp_path / "a/tokenizer_config.json").read_text())
    config["chat_template"] = "{{ bos_token }}You are Hermes.{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (tmp_path / "a/tokenizer_config.json").write_text(json.dumps(config))
    carried = open_tokenizer(tmp_path / "a")
    assert isinstance(carried, CarriedTokenizer)
    carried.save(tmp_path / "b")
    assert (tmp_path / "b/tokenizer.model").read_bytes() == (tmp_path / "a/tokenizer.model").read_bytes()
    again = open_tokenizer(tmp_path / "b")
    assert again.chat_template == config["chat_template"] and again.fingerprint == carried.fingerprint

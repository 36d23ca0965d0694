"""Layer: parity with others (sentencepiece, llama.cpp's vectors, tokenizers, transformers) and damaged files."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamita.tokenizer import Tokenizer
from llamita.tokenizer.foreign import JsonTokenizer
from llamita.tokenizer.llama2 import SentencePieceTokenizer
from llamita.tokenizer.train import train
from llamita.tokenizer.vocabulary import MAX_FILE_BYTES, PROBE, open_vocabulary
from tests.test_tokenizer import SOURCE, TORTURE

PROPERTY = settings(deadline=None, database=None)
NAMES = ["<s>", "</s>", "<unk>", "<0x0A>", "<|eot_id|>", "<|begin_of_text|>"]
TEXT = st.lists(st.text(max_size=8) | st.sampled_from([" ", "  ", "\n", "Hello", "\u2581", *NAMES])).map("".join)
ODD = ["\ud83d\ude00", "a\ud83d b\udc00", "\ufeff \ufeff", "".join(NAMES)]

# The settings at the end of Llama 2's file: add_dummy_prefix on, remove_extra_whitespaces off
SETTINGS = b"\x18\x01\x20\x00\x32\x00"


@pytest.fixture(scope="module")
def llama2_file(shared_data) -> Path:
    pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    return shared_data / "tokenizers" / "llama2_tokenizer.model"


@pytest.fixture(scope="module")
def llama2(llama2_file) -> SentencePieceTokenizer:
    return SentencePieceTokenizer.load(llama2_file)


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return train(SOURCE, 1024)


@pytest.fixture(scope="module")
def folder(ours, tmp_path_factory) -> Path:
    pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    path = tmp_path_factory.mktemp("ours")
    ours.save(path)
    return path


@pytest.fixture(scope="module")
def byte_level(folder) -> JsonTokenizer:
    return JsonTokenizer.load(folder / "tokenizer.json")


@pytest.fixture(scope="module")
def merges(llama2) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Llama 2's pieces and, as transformers derives them from the scores, its merges."""
    convert = pytest.importorskip("transformers.convert_slow_tokenizer", reason="transformers is not installed")
    processor = llama2._processor
    names = [processor.id_to_piece(i) for i in range(llama2.vocab_size)]
    scores = {name: processor.get_score(i) for i, name in enumerate(names)}
    ids = {name: i for i, name in enumerate(names)}
    return ids, convert.generate_merges(ids, scores)


@pytest.fixture(scope="module")
def byte_fallback_json(merges) -> dict:
    """Llama 2 as a tokenizer.json, in the form in which Hugging Face gave it out."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    from tokenizers import decoders, normalizers

    ids, pairs = merges
    model = tokenizers.models.BPE(vocab=ids, merges=pairs, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return json.loads(tokenizer.to_str())


@pytest.fixture(scope="module")
def byte_fallback(byte_fallback_json) -> JsonTokenizer:
    return _from(byte_fallback_json)


def _from(content: dict) -> JsonTokenizer:
    return JsonTokenizer(json.dumps(content).encode())


@pytest.fixture(params=["ours", "llama2", "byte_level", "byte_fallback"])
def vocabulary(request):
    return request.getfixturevalue(request.param)


def _vectors(shared_data) -> tuple[list[str], list[list[int]]]:
    names = (shared_data / "tokenizers" / f"ggml-vocab-llama-spm.gguf.{end}" for end in ("inp", "out"))
    given_text, wanted = (name.read_bytes().decode("utf-8") for name in names)
    texts = given_text.split("\n__ggml_vocab_test__\n")
    ids = [[int(i) for i in line.split()] for line in wanted.split("\n")]
    assert len(texts) == len(ids) == 47
    return texts, ids


# ---- ids ----


def test_vectors_of_llama_cpp(llama2, llama2_file, shared_data):
    texts, ids = _vectors(shared_data)
    assert [llama2.encode(text) for text in texts] == ids
    assert [llama2.decode(i) for i in ids] == texts

    no_prefix = SentencePieceTokenizer(llama2_file.read_bytes().replace(SETTINGS, b"\x18\x00" + SETTINGS[2:]))
    assert [no_prefix.encode(text) for text in texts] != ids
    assert [no_prefix.decode(no_prefix.encode(text)) for text in texts] == texts


def test_the_rule_of_the_docstring(llama2):
    def pieces(text: str) -> list[str]:
        return [llama2._processor.id_to_piece(i) for i in llama2.encode(text)]

    assert pieces("") == [] and pieces(" ") == ["\u2581\u2581"]
    assert pieces("Hello") == ["\u2581Hello"] and pieces(" Hello") == ["\u2581", "\u2581Hello"]
    assert pieces("\n") == ["\u2581", "<0x0A>"] and pieces("</s>") == ["\u2581</", "s", ">"]


def test_json_with_byte_fallback_equals_sentencepiece(llama2, byte_fallback, byte_fallback_json, shared_data):
    texts, ids = _vectors(shared_data)
    assert [byte_fallback.encode(text) for text in texts] == ids
    texts += [*TORTURE, *ODD, *NAMES]
    assert [byte_fallback.encode(text) for text in texts] == [llama2.encode(text) for text in texts]
    every = range(llama2.vocab_size)
    for of in ("token_bytes", "is_fallback", "is_special"):
        assert [getattr(byte_fallback, of)(i) for i in every] == [getattr(llama2, of)(i) for i in every]

    model = byte_fallback_json["model"]
    mutant = _from(byte_fallback_json | {"model": model | {"merges": model["merges"][::-1]}})
    assert [mutant.encode(text) for text in texts] != [llama2.encode(text) for text in texts]


def test_transformers_gives_equal_ids(llama2, merges):
    """LlamaTokenizer puts no space before a space, and takes names for specials: elsewhere ids are equal."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    theirs = transformers.LlamaTokenizer(vocab=merges[0], merges=merges[1])
    texts = [text for text in [*TORTURE, PROBE] if not re.match(" ", text) and "</s>" not in text]
    assert len(texts) > 15
    assert [theirs(text)["input_ids"] for text in texts] == [llama2.encode(text) for text in texts]
    assert theirs(" a")["input_ids"] != llama2.encode(" a")


def test_pieces_are_those_of_llama_cpps_file(llama2, shared_data):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    reader = gguf.GGUFReader(shared_data / "tokenizers" / "ggml-vocab-llama-spm.gguf")
    names, types = (reader.fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type"))
    every = range(llama2.vocab_size)
    assert [llama2._processor.id_to_piece(i) for i in every] == names
    assert [llama2.is_special(i) for i in every] == [kind in (2, 3) for kind in types]
    assert [llama2.is_fallback(i) for i in every] == [kind == 6 for kind in types]


def test_json_of_our_own_equals_our_own(ours, byte_level):
    assert [byte_level.encode(text) for text in [*TORTURE, *ODD]] == [ours.encode(text) for text in [*TORTURE, *ODD]]
    assert byte_level.vocab_size == ours.vocab_size
    every = range(ours.vocab_size)
    for of in ("token_bytes", "is_fallback", "is_special"):
        assert [getattr(byte_level, of)(i) for i in every] == [getattr(ours, of)(i) for i in every]


@pytest.mark.parametrize("change", ["cut", "pad", "dropout", "bos"])
def test_what_a_json_adds_to_ids_is_off(ours, folder, change):
    content = json.loads((folder / "tokenizer.json").read_bytes())
    if change == "cut":
        content["truncation"] = {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    elif change == "pad":
        content["padding"] = {
            "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "!",
        }  # fmt: skip
    elif change == "dropout":
        content["model"]["dropout"] = 0.9
    import tokenizers

    plain = tokenizers.Tokenizer.from_str(json.dumps(content))
    assert plain.encode(SOURCE[0]).ids != ours.encode(SOURCE[0])
    vocabulary = _from(content)
    assert vocabulary.encode(SOURCE[0]) == vocabulary.encode_batch([SOURCE[0]])[0] == ours.encode(SOURCE[0])


def test_added_tokens_that_are_not_special_are_text(folder):
    content = json.loads((folder / "tokenizer.json").read_bytes())
    flags = content["added_tokens"][0] | {"special": False}
    content["added_tokens"] += [
        flags | {"id": 1024, "content": "<think>"},
        flags | {"id": 1025, "content": " \u4e2d"},
    ]
    vocabulary = _from(content)
    ids = vocabulary.encode("<think> \u4e2d<|eot_id|>")
    assert ids[:2] == [1024, 1025] and vocabulary.vocab_size == 1026
    assert not any(map(vocabulary.is_special, ids)) and not vocabulary.is_fallback(1024)
    assert vocabulary.token_bytes(1025) == " \u4e2d".encode()
    assert vocabulary.decode(ids) == "<think> \u4e2d<|eot_id|>"


def test_what_a_model_needs_of_llama_2(llama2):
    assert (llama2.bos_id, llama2.eos_id, llama2.pad_id, llama2.stop_ids) == (1, 2, None, {2})
    assert llama2.encode("Hi", bos=True, eos=True) == [1, *llama2.encode("Hi"), 2]
    assert llama2.decode([1, *llama2.encode(" Hi"), 2]) == "<s> Hi</s>"
    assert llama2.decode([1]) == "<s>" and llama2.decode([]) == ""
    assert llama2.fingerprint == "9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347"


@PROPERTY
@given(ids=st.lists(st.integers(259, 31_999)))
def test_any_pieces_decode_as_in_sentencepiece(llama2, ids):
    assert llama2.decode(ids) == llama2._processor.decode(ids)
    assert llama2.decode([1, *ids]) == "<s>" + llama2._processor.decode([1, *ids])


# ---- text comes back ----


def test_a_json_may_normalise_characters(folder):
    content = json.loads((folder / "tokenizer.json").read_bytes())
    vocabulary = _from(content | {"normalizer": {"type": "NFC"}})
    assert vocabulary.decode(vocabulary.encode("e\u0301 \ufb01")) == "\u00e9 \ufb01"


def test_round_trip(vocabulary):
    spaced = not isinstance(vocabulary, Tokenizer) and vocabulary._adds_space

    @PROPERTY
    @given(TEXT)
    def check(text):
        ids = vocabulary.encode(text)
        whole = text.replace("\u2581", " ") if spaced else text  # the one thing that SentencePiece loses
        assert vocabulary.decode(ids) == whole
        space = " " if spaced and text else ""
        assert b"".join(map(vocabulary.token_bytes, ids)) == vocabulary.decode_bytes(ids) == (space + whole).encode()
        assert not any(map(vocabulary.is_special, ids))

    check()


def test_joined_texts_of_sentencepiece_get_a_space_between(llama2):
    first, second = llama2.encode("one"), llama2.encode("two")
    assert llama2.decode(first + second) == "one two"
    assert llama2.decode(second) == "two" and llama2.decode_bytes(second) == b" two"


def test_surrogates(vocabulary):
    assert vocabulary.decode(vocabulary.encode("\ud83d\ude00")) == "\U0001f600"
    assert vocabulary.decode(vocabulary.encode("a\ud83d b\udc00")) == "a\ufffd b\ufffd"


def test_batch_equals_one_by_one(vocabulary):
    texts = [*TORTURE, *ODD]
    assert vocabulary.encode_batch(iter(texts)) == [vocabulary.encode(text) for text in texts]
    assert vocabulary.encode_batch([]) == []


def test_broken_utf8_decodes_with_replacement(vocabulary):
    byte = next(i for i in range(vocabulary.vocab_size) if vocabulary.token_bytes(i) == b"\xff")
    assert vocabulary.is_fallback(byte) and not vocabulary.is_special(byte)
    assert vocabulary.decode([byte, *vocabulary.encode("a")]).startswith("\ufffd")


def test_unknown_ids(vocabulary):
    for bad in (-1, vocabulary.vocab_size, 2**40):
        message = f"token id {bad} is outside the vocabulary of {vocabulary.vocab_size}"
        for use in (vocabulary.token_bytes, lambda i: vocabulary.decode([0, i])):
            with pytest.raises(ValueError, match=message):
                use(bad)
        assert not vocabulary.is_fallback(bad) and not vocabulary.is_special(bad)


# ---- files ----


def test_every_kind_opens_by_its_content(llama2, llama2_file, ours, folder, tmp_path):
    (tmp_path / "ours").symlink_to(folder)  # tokenizer.model and tokenizer.json: the former wins
    (tmp_path / "json").mkdir()
    shutil.copy(folder / "tokenizer.json", tmp_path / "json")
    (tmp_path / "llama2").mkdir()
    shutil.copy(llama2_file, tmp_path / "llama2" / "tokenizer.model")
    shutil.copy(folder / "tokenizer.json", tmp_path / "llama2")
    for name in ("ours/tokenizer.model", "json/tokenizer.json", "llama2/tokenizer.model"):
        shutil.copy(tmp_path / name, tmp_path / f"{name.partition('/')[0]}.any")
    for name, kind in (("ours", Tokenizer), ("json", JsonTokenizer), ("llama2", SentencePieceTokenizer)):
        for path in (tmp_path / name, str(tmp_path / f"{name}.any")):
            opened = open_vocabulary(path)
            assert type(opened) is kind
            assert opened.encode("Hello") == (llama2 if name == "llama2" else ours).encode("Hello")


def _one_line(path: Path, load, *words: str) -> None:
    with pytest.raises(ValueError) as error:
        load(path)
    message = str(error.value)
    assert message.startswith(str(path)) and "\n" not in message and "; give " in message, message
    assert len(message) < 400 + len(str(path)) and all(word in message for word in words), message


@pytest.mark.parametrize("content", [None, b"", b"version https://git-lfs.github.com/spec/v1\n", b"\x00\x01GGUF", b"["])
def test_what_is_no_vocabulary_names_what_is_accepted(tmp_path, content):
    path = tmp_path / "thing"
    if content is not None:
        path.write_bytes(content)
    _one_line(path, open_vocabulary, "tokenizer.model", "tiktoken", "SentencePiece", "tokenizer.json")
    _one_line(tmp_path, open_vocabulary, "tokenizer.model", "tokenizer.json")


def test_missing_and_oversized_files(tmp_path):
    for kind, name in ((SentencePieceTokenizer, "tokenizer.model"), (JsonTokenizer, "tokenizer.json")):
        with pytest.raises(ValueError, match=f"{name}: no such file"):
            kind.load(tmp_path)
        path = tmp_path / name
        with path.open("wb") as file:
            file.truncate(MAX_FILE_BYTES + 1)
        _one_line(path, kind.load, "more than 64 MiB")


def _cut_before(part: bytes):
    return lambda model: model[: model.rindex(part)]


SPM_DAMAGE = {
    "empty": lambda model: b"",
    "cut": lambda model: model[:-4],
    "cut in half": lambda model: model[: len(model) // 2],
    "cut before the trainer's part": _cut_before(b"\x12\x87\x02\n;/large"),
    "cut before the normaliser's part": _cut_before(b"\x1a\x12\n\x08identity"),
    "garbage": lambda model: b"\n" + bytes(range(256)) * 9,
    "ranks": lambda model: b"IQ== 0\n",
    "name that is no UTF-8": lambda model: model.replace("\u2581t".encode(), b"\xff\xff\xfft", 1),
    "group": lambda model: model + b"\x7b\x7c",
    "removes blanks": lambda model: model.replace(SETTINGS, b"\x18\x01\x20\x01\x32\x00"),
    "type unigram": lambda model: model.replace(b"v2\x18\x02\x20", b"v2\x18\x01\x20"),
}


@pytest.mark.parametrize("kind", SPM_DAMAGE)
def test_damaged_sentencepiece_file_is_one_clear_line(llama2_file, tmp_path, kind):
    whole = llama2_file.read_bytes()
    damaged = SPM_DAMAGE[kind](whole)
    assert damaged != whole
    path = tmp_path / "damaged.model"
    path.write_bytes(damaged)
    _one_line(path, SentencePieceTokenizer.load)


def _trained(**options) -> bytes:
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    from io import BytesIO

    defaults = {
        "model_type": "bpe", "byte_fallback": True, "vocab_size": 300, "hard_vocab_limit": False, "minloglevel": 2,
        "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
    }  # fmt: skip
    out = BytesIO()
    text = ["the cat sat on the mat", "Hello, World!"] * 20
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(text), model_writer=out, **{**defaults, **options})
    return out.getvalue()


def test_a_vocabulary_of_ones_own_and_its_padding():
    assert SentencePieceTokenizer(_trained()).pad_id is None
    padded = SentencePieceTokenizer(_trained(pad_id=3))
    assert padded.pad_id == 3 and padded.is_special(3) and padded.token_bytes(3) == b"<pad>"


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"model_type": "unigram"}, "unigram"),
        ({"model_type": "char"}, "char"),
        ({"model_type": "word", "vocab_size": 270}, "word"),
        ({"bos_id": -1}, "<s>"),
        ({"eos_id": -1}, "</s>"),
        ({"byte_fallback": False, "vocab_size": 40}, "byte_fallback"),
        ({"normalization_rule_name": "nmt_nfkc_cf"}, "changes no text"),
        ({"treat_whitespace_as_suffix": True}, "changes no text"),
    ],
)
def test_other_sentencepiece_models_are_refused(tmp_path, options, word):
    path = tmp_path / "other.model"
    path.write_bytes(_trained(**options))
    _one_line(path, SentencePieceTokenizer.load, word)


def _changed(content: dict, **changes) -> bytes:
    return json.dumps(content | changes).encode()


JSON_DAMAGE = {
    "empty": lambda content: b"",
    "cut": lambda content: _changed(content)[:-4],
    "garbage": lambda content: b"{" + bytes(range(256)) * 9,
    "deep": lambda content: b'{"a":' * 100_000,
    "list": lambda content: b"[1]",
    "another object": lambda content: b'{"model_type": "llama"}',
    "no model": lambda content: _changed(content, model=None),
    "wrong merges": lambda content: _changed(content, model=content["model"] | {"merges": [["q", "no such"]]}),
    "bad split": lambda content: _changed(
        content, pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}
    ),
    "no decoder": lambda content: _changed(content, decoder=None),
    "lower case": lambda content: _changed(content, normalizer={"type": "Lowercase"}),
    "no tokens": lambda content: _changed(
        content, added_tokens=[], model=content["model"] | {"vocab": {}, "merges": []}
    ),
    "words, none unknown": lambda content: _changed(
        content, decoder=None, model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}
    ),
    "words": lambda content: _changed(
        content, decoder=None, model={"type": "WordLevel", "vocab": {"[UNK]": 0}, "unk_token": "[UNK]"}
    ),
}


@pytest.mark.parametrize("kind", JSON_DAMAGE)
def test_damaged_or_lossy_json_is_one_clear_line(folder, tmp_path, kind):
    path = tmp_path / "damaged.json"
    path.write_bytes(JSON_DAMAGE[kind](json.loads((folder / "tokenizer.json").read_bytes())))
    _one_line(path, JsonTokenizer.load)


@pytest.mark.parametrize(
    ("library", "kind", "name"),
    [("sentencepiece", SentencePieceTokenizer, "tokenizer.model"), ("tokenizers", JsonTokenizer, "tokenizer.json")],
)
def test_a_missing_library_says_how_to_install_it(monkeypatch, tmp_path, library, kind, name):
    monkeypatch.setitem(sys.modules, library, None)
    (tmp_path / name).write_bytes(b"anything")
    with pytest.raises(ValueError, match=rf"^{re.escape(str(tmp_path))}.*: {library} is not installed; .*compare\]'$"):
        kind.load(tmp_path)

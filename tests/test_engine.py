"""Layer: numerics against plain twins (an uncached loop, Hugging Face's generate); the chat by script."""

import io
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import nn

from llamita.model.cache import KVCache
from llamita.model.llama import build
from llamita.model.shape import Shape
from llamita.serve import engine as engine_module
from llamita.serve.chat import chat, fit
from llamita.serve.engine import Completion, Engine, Sampling, TextStream
from llamita.serve.llm import LLM
from llamita.serve.sample import choose, row_generators
from llamita.tokenizer import Tokenizer
from llamita.tokenizer.chat import render
from tests.folders import save

PIECES = [b"ab", b"bc", b" END", b"ED", b" EN", b"\xe2\x82", b"\xac!", "\u00e9".encode()]
TOKENIZER = Tokenizer([bytes([byte]) for byte in range(256)] + PIECES)
GREEDY = Sampling(temperature=0, max_tokens=20)


def ids(*pieces: bytes) -> list[int]:
    return [TOKENIZER.tokens.index(piece) for piece in pieces]


class Scripted(nn.Module):
    """Stands for a model that says the script's tokens after BOS, whatever it sees."""

    def __init__(self, script: list[int], max_seq_len: int = 64):
        super().__init__()
        self.shape = Shape(
            dim=2,
            num_layers=1,
            num_heads=1,
            num_kv_heads=1,
            ffn_dim=1,
            vocab_size=TOKENIZER.vocab_size,
            max_seq_len=max_seq_len,
        )
        self.script = torch.tensor(script)
        self.tok_embeddings = nn.Embedding(1, 1)

    def hidden(self, tokens_BT, attend):
        return attend.positions(tokens_BT).unsqueeze(-1)

    def output(self, position_BD):
        return nn.functional.one_hot(self.script[position_BD[:, 0]], self.shape.vocab_size)


def say(script: list[int], **sampling) -> tuple[list[str], Completion]:
    """The pieces that are streamed, and the completion."""
    chunks = list(Engine(Scripted(script), TOKENIZER).generate([[]], Sampling(**({"temperature": 0} | sampling))))
    assert all(chunk.completion is None for chunk in chunks[:-1])
    streamed = [chunk.text for chunk in chunks if chunk.text]
    assert "".join(streamed) == chunks[-1].completion.text
    return streamed, chunks[-1].completion


def make_model(max_seq_len: int = 64, dtype: torch.dtype = torch.float64, vocab_size: int | None = None):
    shape = Shape(
        dim=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        ffn_dim=48,
        vocab_size=vocab_size or TOKENIZER.vocab_size,
        max_seq_len=max_seq_len,
    )
    model = build(shape, dtype=dtype).init_weights(1)
    with torch.no_grad():  # livelier than a fresh model: what comes next depends on all that came before
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                weight.mul_(2 if "tok" in name else 12)
    return model


def uncached(model, prompt: list[int], sampling: Sampling) -> tuple[list[int], str]:
    """The plain twin of the engine: one row, no cache, the text cut afterwards."""
    generators, tokens, text = row_generators([prompt], sampling.seed or 0), [], ""
    while len(tokens) < sampling.max_tokens and len(prompt) + len(tokens) < model.shape.max_seq_len:
        with torch.no_grad():
            logits_BV = model(torch.tensor([prompt + tokens]))[:, -1, : TOKENIZER.vocab_size]
        [token] = choose(logits_BV, sampling, [prompt + tokens], generators)
        if token in TOKENIZER.stop_ids:
            break
        tokens.append(token)
        text = TOKENIZER.decode(tokens, skip_special=True)
        if any(stop in text for stop in sampling.stop):
            return tokens, min((text.split(stop)[0] for stop in sampling.stop), key=len)
    return tokens, text


PROMPTS = [TOKENIZER.encode(text, bos=True) for text in ("The cat", "", "One two three four", "abc", "?")]
LETTERS = tuple("abcdefghijklmnop")


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0, max_tokens=30),
        Sampling(temperature=0, max_tokens=30, repetition_penalty=1.5, stop=LETTERS),
        Sampling(temperature=1.5, top_p=1, seed=3, max_tokens=40, stop=LETTERS),
        Sampling(temperature=1, top_p=0.9, top_k=40, min_p=0.01, seed=4, max_tokens=200),
    ],
    ids=["greedy", "penalty", "sampled", "to the limit"],
)
def test_a_batch_equals_each_row_alone_without_a_cache(sampling, monkeypatch):
    model = make_model()
    wanted = [uncached(model, prompt, sampling) for prompt in PROMPTS]
    for max_rows in (32, 2):
        monkeypatch.setattr(engine_module, "MAX_ROWS", max_rows)
        got = Engine(model, TOKENIZER).complete(PROMPTS, sampling)
        assert [(completion.tokens, completion.text) for completion in got] == wanted
    if sampling.stop:
        assert len({len(tokens) for tokens, _ in wanted}) > 2, "rows should leave at different times"


def keeps_the_first(cache, rows):
    for tensors in (cache.keys, cache.values):
        tensors[:] = [x_BSKH[: len(rows)] for x_BSKH in tensors]
    cache.lengths = cache.lengths[: len(rows)]


def counts_pads(cache, counts):
    cache.lengths = [length + max(counts) for length in cache.lengths]


@pytest.mark.parametrize("method, mutant", [("keep", keeps_the_first), ("advance", counts_pads)])
def test_negative_control_a_broken_cache_changes_the_text(method, mutant, monkeypatch):
    model, sampling = make_model(), Sampling(temperature=1.5, top_p=1, seed=3, max_tokens=20, stop=LETTERS)
    whole = Engine(model, TOKENIZER).complete(PROMPTS, sampling)
    monkeypatch.setattr(KVCache, method, mutant)
    assert Engine(model, TOKENIZER).complete(PROMPTS, sampling) != whole


def test_same_seed_same_text_other_seed_other_text():
    engine, prompt = Engine(make_model(), TOKENIZER), [PROMPTS[0]]
    one, again, other = (
        engine.complete(prompt, Sampling(temperature=1, top_p=1, max_tokens=10, seed=seed)) for seed in (1, 1, 2)
    )
    free = [engine.complete(prompt, Sampling(temperature=1, top_p=1, max_tokens=10)) for _ in range(2)]
    assert one == again != other
    assert free[0] != free[1]


def test_whole_characters_are_streamed():
    script = ids(b"\xe2\x82", b"\xac!", b"\xf0", b"\x9f", b"\x98", b"\x80", "\u00e9".encode(), b"\xe2\x82")
    streamed, completion = say(script, max_tokens=8)
    assert streamed == ["\u20ac!", "\U0001f600", "\u00e9", "\ufffd"]
    assert completion == Completion("\u20ac!\U0001f600\u00e9\ufffd", script, "length")
    naive = "".join(TOKENIZER.decode([token]) for token in script)
    assert naive != completion.text, "negative control: one token at a time breaks the characters"


def test_a_stop_string_across_tokens_ends_the_text_before_it():
    script = ids(b"x", b" EN", b"z", b" EN", b"D", b"y", b"y")
    streamed, completion = say(script, stop=(" END",), max_tokens=7)
    assert streamed == ["x", " ENz"]
    assert completion == Completion("x ENz", script[:5], "stop")
    assert say(script, stop=(" ENDED",), max_tokens=5)[1] == Completion("x ENz END", script[:5], "length")
    assert say(ids(b"x", b" END"), stop=("x", "D"), max_tokens=2)[1].text == ""


def test_stop_tokens_end_the_text_and_other_special_tokens_have_none():
    for stop_id in TOKENIZER.stop_ids:
        script = [*ids(b"x", b" EN"), TOKENIZER.bos_id, stop_id, *ids(b"y")]
        _, completion = say(script, stop=(" END",), max_tokens=5)
        assert completion == Completion("x EN", script[:3], "stop")


TEXT = st.text(st.sampled_from("ab\u20ac\U0001f600 "), max_size=12)


@given(TEXT, st.lists(TEXT.filter(bool), max_size=3), st.lists(st.integers(0, 40), max_size=12))
def test_text_does_not_depend_on_where_tokens_end(text, stops, cuts):
    data = text.encode()
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    wanted = text
    if ends:
        ending = [stop for stop in stops if text[: ends[0]].endswith(stop)]
        wanted = text[: ends[0] - max(map(len, ending))]
    stream, got = TextStream(tuple(stops)), ""
    borders = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    for start, end in pairwise(borders):
        got += stream.feed(data[start:end])
        assert wanted.startswith(got), "what was said cannot be taken back"
        if stream.stopped:
            break
    else:
        got += stream.feed(b"", final=True)
    assert (got, stream.stopped) == (wanted, bool(ends))


def test_the_context_is_used_to_its_last_token():
    model = make_model(max_seq_len=16)
    for length in (1, 15):
        prompt = [TOKENIZER.bos_id] * length
        [completion] = Engine(model, TOKENIZER).complete([prompt], Sampling(temperature=0, max_tokens=99))
        assert (len(completion.tokens), completion.finish_reason) == (16 - length, "length")
    with pytest.raises(ValueError, match="prompt 1 has 16 tokens, but max_seq_len 16") as error:
        Engine(model, TOKENIZER).generate([[1], [1] * 16], GREEDY)
    assert "\n" not in str(error.value)


def test_an_empty_prompt_is_bos_and_no_prompt_is_nothing():
    engine = Engine(make_model(), TOKENIZER)
    assert engine.complete([[]], GREEDY) == engine.complete([[TOKENIZER.bos_id]], GREEDY)
    assert engine.complete([], GREEDY) == []


def test_a_padded_vocabulary_is_never_spoken_and_a_small_one_is_refused():
    model = make_model(vocab_size=2 * TOKENIZER.vocab_size)
    [completion] = Engine(model, TOKENIZER).complete([[]], Sampling(temperature=100, top_p=1, seed=0))
    assert max(completion.tokens) < TOKENIZER.vocab_size
    with pytest.raises(ValueError, match="tokenizer has 520 tokens, the model 300"):
        Engine(make_model(vocab_size=300), TOKENIZER)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "model"
    save(make_model(dtype=torch.float32), TOKENIZER, folder)
    return folder


def test_greedy_with_penalty_equals_hugging_faces_generate(folder):
    from transformers import AutoModelForCausalLM

    engine = LLM.load(folder, device="cpu").engine
    start = TOKENIZER.encode("The cat", bos=True)
    # A prompt of the model's own words, which the penalty must count too.
    prompt = start + engine.complete([start], Sampling(temperature=0, max_tokens=20))[0].tokens
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    wanted = theirs.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt)),
        do_sample=False,
        max_new_tokens=20,
        repetition_penalty=1.3,
        eos_token_id=sorted(TOKENIZER.stop_ids),
    )[0, len(prompt) :].tolist()
    [ours] = engine.complete([prompt], Sampling(temperature=0, max_tokens=20, repetition_penalty=1.3))
    assert ours.tokens == [token for token in wanted if token not in TOKENIZER.stop_ids]
    [other] = engine.complete([prompt], Sampling(temperature=0, max_tokens=20))
    assert other.tokens != ours.tokens


def test_llm_from_a_model_folder_and_from_a_run_folder(folder):
    text = LLM.load(folder, device="cpu").generate("The cat", temperature=0, max_tokens=9)
    assert LLM.load(str(folder.parent), device="cpu").generate("The cat", temperature=0, max_tokens=9) == text
    wide = LLM.load(folder, device="cpu", dtype=torch.float64)
    assert wide.model.tok_embeddings.weight.dtype == torch.float64


def test_any_other_folder_is_refused_with_what_was_looked_for(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json .* params\.json .* \.gguf"):
        LLM.load(tmp_path)
    (tmp_path / "run.toml").write_text("")
    with pytest.raises(ValueError, match="export"):
        LLM.load(tmp_path)


def test_generate_and_chat_are_the_engine_with_bos_once(folder):
    llm = LLM.load(folder, device="cpu")
    settings = dict(temperature=1.0, seed=2, max_tokens=12)
    [wanted] = llm.engine.complete([TOKENIZER.encode("The cat", bos=True)], Sampling(**settings))
    assert llm.generate("The cat", **settings) == wanted.text
    assert llm.generate(["The cat", "abc"], **settings)[0] == wanted.text
    assert "".join(llm.generate("The cat", stream=True, **settings)) == wanted.text
    messages = [{"role": "user", "content": "Hi"}]
    [reply] = llm.engine.complete([render(TOKENIZER, messages, reply=True)[0]], Sampling(**settings))
    assert llm.chat(messages, **settings) == "".join(llm.chat(messages, stream=True, **settings)) == reply.text
    with pytest.raises(ValueError, match="one prompt"):
        llm.generate(["a"], stream=True)


def test_logprobs_are_those_after_bos(folder):
    llm = LLM.load(folder, device="cpu")
    tokens = TOKENIZER.encode("abc\u00e9", bos=True)
    with torch.no_grad():
        all_TV = llm.model(torch.tensor([tokens]))[0].log_softmax(-1)
    got = llm.logprobs("abc\u00e9")
    assert [piece for piece, _ in got] == [TOKENIZER.decode([token]) for token in tokens[1:]]
    wanted = [all_TV[place, token].item() for place, token in enumerate(tokens[1:])]
    assert [logprob for _, logprob in got] == pytest.approx(wanted, abs=1e-5)
    assert llm.logprobs("") == []
    assert len(llm.logprobs("?" * 63)) == 63
    with pytest.raises(ValueError, match="max_seq_len is 64"):
        llm.logprobs("?" * 64)


class FakeLLM:
    """Says the scripted replies in turn, notes what it was asked; an exception in a reply is raised there."""

    def __init__(self, replies, max_seq_len=200):
        self.tokenizer = TOKENIZER
        self.model = SimpleNamespace(shape=SimpleNamespace(max_seq_len=max_seq_len))
        self.replies = iter(replies)
        self.asked: list[list[tuple[str, str]]] = []

    def chat(self, messages, *, stream, **sampling):
        assert stream
        Sampling(**sampling)
        self.asked.append([(message["role"], message["content"]) for message in messages])
        return self.say(next(self.replies))

    def say(self, reply):
        for part in reply:
            if isinstance(part, BaseException):
                raise part
            yield part


def talk(llm, lines, *, terminal=False, **arguments) -> str:
    """What the console shows."""
    heard = iter(lines)

    def read(prompt: str) -> str:
        assert bool(prompt) == terminal
        line = next(heard, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    shown = io.StringIO()
    console = Console(file=shown, force_terminal=terminal, width=100)
    chat(llm, console=console, read=read, **arguments)
    return shown.getvalue()


def test_chat_over_a_pipe_is_one_plain_reply_a_line_and_remembers():
    llm = FakeLLM([["Hel", "lo"], ["Fine"]])
    assert talk(llm, ["Hi", "", "  How are you?"], system="Be kind.") == "Hello\nFine\n"
    system = ("system", "Be kind.")
    assert llm.asked[0] == [system, ("user", "Hi")]
    assert llm.asked[1] == [system, ("user", "Hi"), ("assistant", "Hello"), ("user", "How are you?")]


def test_chat_commands():
    llm = FakeLLM([["one"], ["two"], ["three"], ["four"]])
    lines = [
        "a",
        "/reset",
        "b",
        "/system Rhyme [b]!",
        "c",
        "/system",
        "d",
        "/help",
        "/nonsense",
        "/exit",
        "e",
    ]
    shown = talk(llm, lines)
    assert llm.asked == [
        [("user", "a")],
        [("user", "b")],
        [("system", "Rhyme [b]!"), ("user", "c")],
        [("user", "d")],
    ]
    assert shown.count("/system TEXT") == 2
    assert "\x1b" not in shown


def test_ctrl_c_stops_the_reply_and_keeps_what_was_said():
    llm = FakeLLM([["Once ", KeyboardInterrupt(), "upon"], ["Yes"]])
    shown = talk(llm, ["Tell", KeyboardInterrupt(), "More"], terminal=True)
    assert "Once  [stopped]\n" in shown and "upon" not in shown
    assert llm.asked[1][1] == ("assistant", "Once ")


def test_model_text_cannot_command_the_terminal():
    shown = talk(FakeLLM([["a\x1b[2J\r\x9bb\tc\n", "[bold]d"]]), ["Hi"])
    assert shown == "a[2Jb\tc\n[bold]d\n"


def test_the_oldest_turns_go_first_and_it_says_so():
    llm = FakeLLM([["r" * 20]] * 4, max_seq_len=200)
    shown = talk(llm, ["a" * 20, "b" * 20, "c" * 20], system="S", max_tokens=50)
    sizes = [len(render(TOKENIZER, [{"role": r, "content": c} for r, c in one], reply=True)[0]) for one in llm.asked]
    assert all(size <= 150 for size in sizes)
    assert llm.asked[-1][0] == ("system", "S")
    assert llm.asked[-1][-1] == ("user", "c" * 20)
    assert [role for role, _ in llm.asked[-1]] == ["system", "user", "assistant", "user"]
    assert "oldest 2 messages were dropped" in shown


def test_what_stays_begins_with_a_user_and_fits():
    turns = [{"role": role, "content": role} for role in ("user", "assistant") * 4][:7]
    kept = []
    for limit in range(40, 260, 5):
        llm = FakeLLM([], max_seq_len=limit)
        kept.append(fit(llm, [], turns, max_tokens=20))
        assert kept[-1][0]["role"] == "user" and kept[-1][-1] is turns[-1]
        size = len(render(TOKENIZER, kept[-1], reply=True)[0])
        assert len(kept[-1]) == 1 or size <= limit - 20
    assert sorted(map(len, kept)) == list(map(len, kept))
    assert {len(one) for one in kept} == {1, 3, 5, 7}


def test_a_message_too_long_is_refused_and_forgotten(folder):
    llm = LLM.load(folder, device="cpu")
    shown = talk(llm, ["x" * 100, "y"], temperature=0, max_tokens=2)
    assert shown.count("max_seq_len 64") == 1, "the second message stands alone again"

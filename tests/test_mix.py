"""Layer: arithmetic, and one small run. Shares are those that were asked for, and what cannot be is told."""

import dataclasses
import json
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamita import config
from llamita.data import mix
from llamita.data.build import build_documents
from llamita.data.pack import PackedRows, packed
from llamita.data.read import Document
from llamita.data.sampler import Phase, Sampler
from llamita.recipes import stages
from llamita.train.run import Data
from tests import training
from tests.fakes import Texts, byte_tokenizer


class Corpus(Texts):
    """Documents of `tokens` tokens each, with their columns."""

    def __init__(self, rows):
        super().__init__([np.arange(tokens) for *_, tokens in rows])
        columns = dict(zip(mix.COLUMNS, zip(*(row[:3] for row in rows), strict=True), strict=True))
        self.names = {column: sorted(set(values)) for column, values in columns.items()}
        self.indices = {column: [self.names[column].index(v) for v in values] for column, values in columns.items()}

    def column(self, name):
        return np.array(self.indices[name], np.uint16)


CORPUS = Corpus(
    [
        ("web", "en", "prose", 400),
        ("web", "de", "prose", 90),
        ("web", "sw", "prose", 10),
        ("github", "", "code", 100),
        ("math-web", "en", "prose", 200),
        ("novels", "en", "prose", 150),
        ("novels", "de", "prose", 50),
    ]
)


def shares(*lines, phase=0):
    """The share of each pool, by name."""
    blends = mix.parse(lines)
    pools, _ = mix.pools(CORPUS, blends)
    found = mix.weights(pools, blends, phase)
    assert sum(found) == pytest.approx(1) and sum(pool.tokens for pool in pools) == 1000
    return {pool.name: pytest.approx(share) for pool, share in zip(pools, found, strict=True)}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("natural", {"rest": 1}),
        ("4x-code", {"kind=code": 0.4, "rest": 0.6}),
        ("5%-other-languages", {"lang!=en": 0.05, "rest": 0.95}),
        ("llama3", {"kind=code": 0.17, "source=*math*|*reasoning*": 0.25, "lang!=en": 0.08, "rest": 0.5}),
        ("kind=code:17% rest", {"kind=code": 0.17, "rest": 0.83}),
        ("source=novels lang=de rest:40%", {"source=novels": 0.6 * 200 / 290, "lang=de": 0.6 * 90 / 290, "rest": 0.4}),
        ("lang=de,kind=prose:30% lang=sw:20x rest", {"lang=de,kind=prose": 0.3, "lang=sw": 0.2, "rest": 0.5}),
        ("lang=de|sw:50% kind=prose:50%", {"lang=de|sw": 0.5, "kind=prose": 0.5, "unused": 0}),
        ("kind=code:0% rest", {"kind=code": 0, "rest": 1}),
        ("rest:100.0%", {"rest": 1}),
    ],
)  # fmt: skip
def test_shares_are_those_asked_for(line, expected):
    assert shares(line) == expected


def test_temperature_lifts_what_is_rare():
    parts = np.array([0.14, 0.01]) / 0.15
    power = parts**0.3 / (parts**0.3).sum()
    expected = {"lang!=en,lang=de": 0.08 * power[0], "lang!=en,lang=sw": 0.08 * power[1], "rest": 0.92}
    assert shares("lang!=en,lang^0.3:8% rest") == expected
    assert shares("lang^1") == {"lang=": 0.1, "lang=de": 0.14, "lang=en": 0.75, "lang=sw": 0.01}
    assert list(shares("source^0").values()) == [0.25] * 4


UNTOLD = Corpus([("web", "en", "prose", 600), ("web", "de", "prose", 100), ("web", "und", "prose", 200),
                 ("und", "", "code", 100)])  # fmt: skip


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("lang!=en:5% rest", {"lang!=en": [1], "rest": [0, 2, 3]}),
        ("lang!=en,lang^0.3:8% rest", {"lang!=en,lang=de": [1], "rest": [0, 2, 3]}),
        ("lang^1", {"lang=": [2, 3], "lang=de": [1], "lang=en": [0]}),
        ("lang=und:1% rest", {"lang=und": [2], "rest": [0, 1, 3]}),
        ("source!=web:1% rest", {"source!=web": [3], "rest": [0, 1, 2]}),
    ],
)
def test_a_language_that_could_not_be_told_is_none(line, expected):
    blends = mix.parse([line])
    pools, docs = mix.pools(UNTOLD, blends)
    assert {pool.name: chosen.tolist() for pool, chosen in zip(pools, docs, strict=True)} == expected


def test_phases_have_their_own_shares_of_common_pools():
    lines = ("kind=code:20% rest", "90%: source=novels:50% rest")
    first, second = shares(*lines), shares(*lines, phase=1)
    assert first == {"kind=code then rest": 0.2, "rest then source=novels": 0.8 * 2 / 9, "rest": 0.8 * 7 / 9}
    assert second == {"kind=code then rest": 0.5 / 8, "rest then source=novels": 0.5, "rest": 0.5 * 7 / 8}
    blends = mix.parse((*lines, "990: natural"))
    starts = [start for start, _ in mix.schedule(mix.pools(CORPUS, blends)[0], blends, 1000, 8)]
    assert starts == [0, 7200, 7920]


def test_every_document_is_in_the_pool_of_the_first_term_it_fits():
    pools, docs = mix.pools(CORPUS, mix.parse(["source=web,lang=*:10% lang=de:10% rest"]))
    found = {pool.name: chosen.tolist() for pool, chosen in zip(pools, docs, strict=True)}
    assert found == {"source=web,lang=*": [0, 1, 2], "lang=de": [6], "rest": [3, 4, 5]}
    assert [mix.Pool.from_json(json.loads(json.dumps(dataclasses.asdict(pool)))) for pool in pools] == pools


LINES = st.lists(st.sampled_from(["lang=de", "kind=code", "source=web", "lang!=en,lang^0.5", "kind^0.3"]), unique=True)


@given(LINES, st.booleans())
def test_pools_part_the_documents_and_shares_make_one(selectors, has_rest):
    terms = [f"{selector}:{i + 3}%" for i, selector in enumerate(selectors)] + ["rest"]
    if "kind^0.3" in selectors:  # holds for all that is left
        terms = [*(t for t in terms[:-1] if "kind^" not in t), "kind^0.3"]
    blends = mix.parse([" ".join(terms)])
    try:
        pools, docs = mix.pools(CORPUS, blends)
    except ValueError as error:
        assert "no document belongs to" in str(error)
        return
    assert sorted(np.concatenate(docs).tolist()) == list(range(7))
    assert [int(CORPUS.lengths[chosen].sum()) for chosen in docs] == [pool.tokens for pool in pools]
    assert sum(mix.weights(pools, blends, 0)) == pytest.approx(1)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["kind=code:17"], "'kind=code:17' has no amount after the colon"),
        (["kind=code:17 %"], "'kind=code:17' has no amount"),
        (["kind=code:-3%"], "has no amount"),
        (["language=de rest"], "'language=de' is no selector; write terms such as"),
        (["lama3"], "'lama3' is no selector; .* one of the mixtures natural, 4x-code, 5%-other-languages, llama3"),
        (["lang=en,,kind=code"], "'' is no selector"),
        (["lang^x"], "a term is split once, by a power from 0 up"),
        (["lang^0.3,source^0.3"], "a term is split once"),
        (["  "], "an empty line"),
        (["10%: natural"], "all lines but the first begin with their start"),
        (["natural", "llama3"], "all lines but the first begin with their start"),
        (["natural", "100%: llama3"], "starts at no step of the run"),
        (["natural", "2.5: llama3"], "starts at no step of the run"),
    ],
)
def test_what_cannot_be_read_is_told(lines, message):
    with pytest.raises(ValueError, match=message):
        mix.parse(lines)
    with pytest.raises(ValueError, match=message):
        Data(mix=tuple(lines))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["source=books:20% rest"], "no document belongs to 'source=books'; the corpus has source=github|math"),
        (["lang!=en,kind=code:3% rest"], "no document belongs to 'lang!=en,kind=code'"),
        (["rest lang=de:5%"], "no document belongs to 'lang=de'"),
        (["kind=code:20% lang=de:20%"], r"the amounts make 40.0% .* \(kind=code 20.0%, lang=de 20.0%\): add `rest`"),
        (["kind=code:20% rest:85%"], "the amounts make 105.0% of the samples, not 100%"),
        (["source=web:4x rest"], r"the amounts make 200.0% .* \(source=web 200.0%\): give less"),
        (["natural", "500: natural", "40%: natural"], r"start later and later, .* \[0, 500, 400\]"),
        (["natural", "1000: natural"], "start later and later, within the 1000 steps"),
        (["natural", "0%: natural"], "start later and later"),
    ],
)  # fmt: skip
def test_what_the_corpus_or_the_run_cannot_give_is_told(lines, message):
    blends = mix.parse(lines)
    with pytest.raises(ValueError, match=message):
        mix.schedule(mix.pools(CORPUS, blends)[0], blends, 1000, 4)


def test_repeats_are_worth_less_and_less():
    assert [mix.worth(epochs) for epochs in (0, 0.5, 1)] == [0, 0.5, 1]
    assert mix.worth(5) == pytest.approx(1 + 15.39 * (1 - math.exp(-4 / 15.39)))
    assert mix.worth(4) / 4 > 0.93 and mix.worth(40) / 40 < 0.4 and mix.worth(1e6) < 16.5
    gains = np.diff([mix.worth(epochs) for epochs in range(1, 60)])
    assert (np.diff(gains) < 0).all() and (gains > 0).all()


def test_advice_warns_of_worn_text():
    blends = mix.parse(["kind=code:8% source=novels:12% rest"])
    pools, _ = mix.pools(CORPUS, blends)
    sizes = [pool.tokens for pool in pools]
    assert mix.epochs(sizes, [0.08, 0.12, 0.8], 10_000) == pytest.approx([8, 6, 80 / 7])
    few, some, many = (
        mix.advice(pools, sizes, mix.weights(pools, blends, 0), total) for total in (1000, 10_000, 30_000)
    )
    assert few[0] == "mix: kind=code  8.0% of the run  100 tokens  0.80 epochs"
    assert some[1].startswith("mix: source=novels  12.0% of the run  200 tokens  6.00 epochs, worth 88% of as much new")
    assert "beyond 4 epochs" in some[1] and "beyond 16 epochs" in many[0]
    assert not any("beyond" in line for line in few)


def test_the_sampler_keeps_the_shares_of_each_phase():
    lines = ("kind=code:20% rest", "50%: source=novels:50% rest")
    blends = mix.parse(lines)
    pools, packings = packed(CORPUS, lines, 16, "corpus")
    rows = [PackedRows(CORPUS, 16, packing=packing) for packing in packings]
    (_, start), *later = mix.schedule(pools, blends, 1000, 8)
    sampler = Sampler([len(each) for each in rows], start, 0, [Phase(*each) for each in later])
    for k in (1, 77, 4000, 4001, 5555, 8000):
        before, after = min(k, 4000), max(0, k - 4000)
        target = before * np.array(start) + after * np.array(later[0][1])
        assert np.abs(np.array(sampler.drawn(k)) - target).max() < 2


def documents():
    rng = np.random.RandomState(0)
    for i in range(80):
        source = ("web", "books")[i % 4 == 0]
        text = f"{i} " + " ".join(map(str, rng.randint(0, 10**6, 20)))
        yield Document(text, f"{source}/{i}", source, "en" if i % 3 else "de")


LINES_OF_RUN = ("source=books:50% rest", "50%: lang=de:100%")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Settings of a run of ten steps on a corpus of two sources and two languages."""
    folder = tmp_path_factory.mktemp("mix")
    build_documents(documents(), byte_tokenizer(), folder / "corpus")
    shape = dataclasses.replace(training.SHAPE, vocab_size=byte_tokenizer().vocab_size)
    data = Data(corpus=str(folder / "corpus"), seq_len=64, mix=LINES_OF_RUN)
    every = dataclasses.replace(training.RUN.log, every=1)
    return dataclasses.replace(training.RUN, shape=shape, data=data, steps=10, log=every)


def test_a_run_trains_on_its_mixture_and_says_so(run, tmp_path, capsys):
    stages.pretrain(run, tmp_path / "run", prompts=[])
    told = capsys.readouterr().err
    assert "mix: source=books then unused" in told and "epochs" in told
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    drawn = [line["drawn"] for line in lines if line["kind"] == "train"]
    books = [sum(share for name, share in each.items() if name.startswith("source=books")) for each in drawn]
    german = [sum(share for name, share in each.items() if name.endswith("lang=de")) for each in drawn]
    assert books[4] == pytest.approx(0.5, abs=0.05)
    assert german[9] - german[4] / 2 == pytest.approx(0.5)  # all of the second half
    assert config.load(type(run), tmp_path / "run/run.toml").data.mix == LINES_OF_RUN
    with pytest.raises(ValueError, match=r"data\.mix differs before step 10, which is done already"):
        other = dataclasses.replace(run, data=dataclasses.replace(run.data, mix=("natural",)))
        stages.pretrain(other, tmp_path / "run", prompts=[])


def test_the_rows_of_a_run_are_those_of_its_pools(run, tmp_path):
    found, sampler, pools = stages.mixed_rows(run, stages.open_corpus(run)[0], tmp_path / "packing")
    again, same = stages.rows_and_sampler(run, stages.open_corpus(run)[0])
    assert sampler.fingerprint == same.fingerprint
    for rows, others, pool in zip(found, again, pools, strict=True):
        assert [row.inputs.tolist() for row in rows] == [row.inputs.tolist() for row in others]
        docs = {piece.doc for pieces in rows.packing for piece in pieces}
        sources = Counter(rows.texts.names["source"][rows.texts.column("source")[doc]] for doc in docs)
        assert set(sources) == ({"books"} if pool.name.startswith("source=books") else {"web"})


def test_without_a_mixture_rows_are_drawn_as_ever(run):
    plain = dataclasses.replace(run, data=dataclasses.replace(run.data, mix=()))
    corpus, _ = stages.open_corpus(plain)
    rows, sampler = stages.rows_and_sampler(plain, corpus)
    assert list(rows[0].packing) == list(PackedRows(corpus.split("train"), 64).packing)
    alone = Sampler([len(rows[0])], None, plain.data.seed)
    assert [sampler.at(k) for k in (*range(200), 10**9)] == [alone.at(k) for k in (*range(200), 10**9)]

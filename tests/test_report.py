"""Layer 1 (pure, no model): the report page stands alone, escapes, and bears every kind of unfinished run."""

import base64
import hashlib
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamita.report import page, svg, units
from llamita.report.read import read

VOID = {"meta", "link", "input", "br", "img", "path", "rect"}
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>'\"&{{ 7 * 7 }}\x00\ud800\u202e]]>"


class Page(HTMLParser):
    """Parses strictly: every tag must be closed by its own end tag."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes what it did not open"

    def handle_data(self, data):
        self.texts.append(data)
        if self.open and self.open[-1] == "script" and "type" in self.tags[-1][1]:
            json.loads(data)

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def foreign(self) -> list[str]:
        """Whatever the page would fetch, or run beyond its own script."""
        found = [f"{tag} {key}" for tag, attrs in self.tags for key in attrs if key in ("src", "srcset", "data")]
        found += [key for _, attrs in self.tags for key in attrs if key.startswith("on")]
        found += [v for _, attrs in self.tags if (v := attrs.get("href")) is not None and not v.startswith("#")]
        return found + [tag for tag, _ in self.tags if tag in ("link", "iframe", "img", "object", "base")]


def train(step: int, loss: float | None = None, stage: str = "train", **values) -> dict:
    row = {"kind": "train", "stage": stage, "step": step, "steps": 100, "tokens": 1000 * step, "lr": 1e-3}
    row |= {"loss": 8 / (step + 1) if loss is None else loss, "grad_norm": 1.0, "tokens_per_second": 5e3}
    return row | {"mfu": None, "memory_gib": 0.5, "elapsed": 0.2 * step, "eta": 1.0} | values


SETTINGS = {
    "kind": "settings",
    "stage": "train",
    "values": {
        "optim.lr": {"value": 0.003, "source": "recipe demo"},
        "shape.dim": {"value": 256, "source": "default"},
    },
    "shape": {"num_params": 4_196_608},
    "machine": {"device": "a small one"},
}
EVAL = {"kind": "eval", "stage": "train", "step": 50, "tokens": 50_000, "loss": 2.0, "bits_per_byte": 1.25}
SAMPLE = {"kind": "sample", "stage": "train", "step": 50, "prompt": "Once", "text": "Once upon a time"}
EVENT = {"kind": "event", "stage": "train", "step": 40, "message": "resumed from the checkpoint of step 40"}
READERS = {"llamita": {"max_logit_diff": 1.5e-6}, "transformers": "not installed"}
RESULTS = {
    "parameters": 4_196_608,
    "tokens": 100_000,
    "bits_per_byte": 1.2345,
    "gzip": 2.5,
    "xz": 2.25,
    "tokens_per_second": 4321.0,
    "train_flops": 2.5e12,
    "stages": [{"name": "pretraining", "seconds": 90.0, "note": "next token"}],
    "chat_examples": [{"prompt": "Who?", "reply": "A llama."}],
}


def folder_of(folder: Path, *entries: dict, tail: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries) + tail)
    return folder


def full(folder: Path) -> Path:
    rows = [train(step, mfu=0.4) for step in range(1, 101)]
    folder_of(folder, SETTINGS, *rows, EVAL, SAMPLE, EVENT)
    folder_of(folder / "sft", *(train(step, stage="sft") for step in range(1, 6)))
    (folder / "model").mkdir()
    (folder / "model" / "proof.json").write_text(json.dumps({"readers": READERS, "sha256": {"config.json": "ab"}}))
    (folder / "results.json").write_text(json.dumps(RESULTS))
    (folder / "run.toml").write_text("[optim]\nlr = 0.003\n")
    return folder


def written(folder: Path) -> tuple[str, Page]:
    html = page.write(folder).read_text(encoding="utf-8")
    return html, Page(html)


def test_a_whole_run_is_told_on_a_page_that_stands_alone(tmp_path):
    html, parsed = written(full(tmp_path / "my run"))
    assert parsed.foreign() == [] and not re.search(r"https?:|url\(|@import", html)
    for told in (
        "my run", "4.20M", "4,196,608", "1.234", "2.250", "xz -9e", "4,321", "1 min 30 s", "2.50 \u00d7 10\u00b9\u00b2",
        "upon a time", "recipe demo", "lr = 0.003", "1.5e-06", "not installed", "A llama.", "a small one",
        "resumed from the checkpoint of step 40", "Stage sft", "next token",
    ):  # fmt: skip
        assert told in parsed.text, told
    assert "missing" not in [attrs.get("class") for _, attrs in parsed.tags]
    assert [path.name for path in (tmp_path / "my run").glob("report*")] == ["report.html"]


def test_the_policy_allows_the_pages_own_script_only(tmp_path):
    html, _ = written(full(tmp_path / "run"))
    script = re.search(r"<script>(.*?)</script>", html, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in html


@pytest.mark.parametrize(
    "html", ["<img src=x>", "<a href='https://a.b'></a>", "<link href=#>", "<p onclick=x></p>", "<p></b></p>", "<div>"]
)
def test_control_the_checker_sees_foreign_and_broken_markup(html):
    try:
        assert Page(html).foreign() != []
    except AssertionError as error:
        assert "close" in str(error)


def test_hostile_text_stays_text(tmp_path):
    values = {HOSTILE: {"value": HOSTILE, "source": HOSTILE}}
    entries = [
        SETTINGS | {"values": values, "machine": {HOSTILE: HOSTILE}, "shape": {HOSTILE: HOSTILE}},
        *(entry | {"stage": HOSTILE} for entry in (train(1), EVAL, SAMPLE)),
        SAMPLE | {"prompt": HOSTILE, "text": HOSTILE * 2},
        EVENT | {"message": HOSTILE},
    ]
    folder = folder_of(tmp_path / "<b>&", *entries)
    told = {"chat_examples": [{"prompt": HOSTILE, "reply": HOSTILE}], "proof": {HOSTILE: HOSTILE}}
    stages = [{"name": HOSTILE, "seconds": 1, "note": HOSTILE}]
    (folder / "results.json").write_text(json.dumps(told | {"stages": stages}))
    (folder / "run.toml").write_text("</pre><script>alert(3)</script>")
    html, parsed = written(folder)
    assert parsed.foreign() == []
    assert [attrs for tag, attrs in parsed.tags if tag == "script" and "type" not in attrs] == [{}]
    assert parsed.text.count("alert(1)") >= 14 and "{{ 7 * 7 }}" in parsed.text
    assert not re.search("[\x00-\x08\x0b-\x1f\ud800-\udfff]", html)


def test_a_torn_last_line_is_ignored_and_a_broken_one_before_it_is_told(tmp_path):
    rows = [train(step) for step in range(1, 4)]
    torn = folder_of(tmp_path / "a" / "run", *rows, tail='{"kind": "train", "stage": "tr')
    clean = folder_of(tmp_path / "b" / "run", *rows)
    assert written(torn)[0] == written(clean)[0]
    broken = folder_of(tmp_path / "c", *rows, tail='{"kind": "tr\n[1]\n' + json.dumps(train(4)) + "\n")
    assert read(broken).num_unreadable == 2 and "2 unreadable lines" in written(broken)[1].text
    assert read(broken).stages["train"].table("train")["step"].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("absent", "command"),
    [
        ("results.json", "llamita eval run --corpus FOLDER"),
        ("results.json", "llamita sft --base run"),
        ("model/proof.json", "llamita export run --out run/model"),
        ("run.toml", "llamita train RECIPE --dir run"),
    ],
)
def test_a_missing_part_names_the_command_that_makes_it(tmp_path, absent, command):
    folder = full(tmp_path / "run")
    assert command not in written(folder)[1].text
    (folder / absent).unlink()
    assert command in written(folder)[1].text


def test_metrics_alone_are_enough(tmp_path):
    _, parsed = written(folder_of(tmp_path / "run", SETTINGS))
    for command in ("llamita train", "llamita generate", "llamita sft", "llamita export", "llamita eval"):
        assert command in parsed.text, command
    _, parsed = written(folder_of(tmp_path / "run", train(7)))
    assert "step 7 \u00b7 7.00k tokens" in parsed.text


def test_after_a_resume_the_later_lines_win(tmp_path):
    first = [train(step, 9.0) for step in (10, 20, 30, 40, 45)]
    again = [train(step, 1.0) for step in (30, 40)]
    sample = [SAMPLE | {"step": step, "text": f"draft {step} {n}"} for n, step in enumerate((20, 40, 20, 60))]
    run = read(folder_of(tmp_path / "run", *first, *sample, EVENT, *again))
    table = run.stages["train"].table("train")
    assert table["step"].tolist() == [10, 20, 30, 40] and table["loss"].tolist() == [9, 9, 1, 1]
    assert run.stages["train"].samples == {"Once": [(20, "draft 20 2"), (60, "draft 60 3")]}


def test_a_very_long_run_is_thinned_but_keeps_its_spikes(tmp_path):
    rows = [json.dumps(train(step, 2.0)) for step in range(1, 200_001)]
    rows[123_456] = json.dumps(train(123_457, 77.5))
    folder = folder_of(tmp_path / "run", tail="\n".join(rows))
    html, parsed = written(folder)
    assert len(html.encode()) < 2e6 and "77.50" in parsed.text and "200,000 logged lines" in parsed.text
    assert "step 123,457" in html.replace("\\u00b7", "\u00b7")


def test_a_loss_that_is_no_number_leaves_a_gap_and_a_remark(tmp_path):
    losses = [3.0, 2.9, math.nan, math.inf, 2.7, 1e30, 2.5]
    html, parsed = written(folder_of(tmp_path / "run", *(train(i + 1, loss) for i, loss in enumerate(losses))))
    line = next(attrs["d"] for _, attrs in parsed.tags if attrs.get("class") == "line" and "d" in attrs)
    assert line.count("M") == 2 and line.count("L") == 3
    assert "2 of 7 logged lines is not a finite number, first at step 3" in parsed.text
    assert not re.search(r"\b(nan|inf)\b", html[html.index("<main>") :], re.IGNORECASE)
    everywhere = [train(step, math.nan, grad_norm=None, lr=math.nan) for step in (1, 2)]
    assert "Not logged in this stage: loss" in written(folder_of(tmp_path / "none", *everywhere))[1].text


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({}, "holds no metrics.jsonl"),
        ({"metrics.jsonl": ""}, "no readable line"),
        ({"metrics.jsonl": "not json\n[]\n3\n"}, "no readable line"),
        ({"results.json": "{"}, "is not JSON"),
        ({"results.json": "[]"}, "must hold a JSON object"),
        ({"results.json": '{"stages": 3}'}, "stages must be a list"),
        ({"results.json": '{"chat_examples": ["a"]}'}, "chat_examples must be a list"),
        ({"results.json": '{"proof": [1]}'}, "proof must be an object"),
    ],
)
def test_a_bad_run_folder_is_refused_in_one_line(tmp_path, files, told):
    folder = tmp_path / "run"
    folder.mkdir()
    if "results.json" in files:
        folder_of(folder, train(1))
    for name, text in files.items():
        (folder / name).write_text(text)
    with pytest.raises(ValueError, match=told) as caught:
        page.write(folder)
    assert "\n" not in str(caught.value) and not (folder / "report.html").exists()


def test_the_running_median_is_not_pulled_by_spikes():
    y = np.linspace(4, 2, 400)
    spiked = y.copy()
    spiked[50::40] = 1e9
    x = np.arange(400.0)
    plain, robust = (svg.running_median(svg.Series("loss", "raw", x, v, x)) for v in (y, spiked))
    assert np.abs(robust.y - plain.y).max() < 0.02
    assert np.abs(np.convolve(spiked, np.ones(11) / 11, "same") - y).max() > 1e6  # a running mean is


@given(st.floats(-1e12, 1e12), st.floats(1e-9, 1e12), st.sampled_from([3, 5]))
def test_ticks_are_few_round_and_inside(low, width, num):
    high = low + width
    if high - low <= 1e-9 * abs(low):
        return
    found = svg.ticks(low, high, num)
    assert 1 <= len(found) <= num + 1
    assert all(low - 1e-6 * width <= tick <= high + 1e-6 * width for tick in found)


@given(st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), min_size=1, max_size=3000))
def test_thinning_keeps_the_extremes_and_the_end(values):
    y = np.array(values)
    kept = svg.thin(y)
    assert len(kept) <= 2 * svg.NUM_BUCKETS + 1 and kept[-1] == len(y) - 1
    if np.isfinite(y).any():
        assert np.nanmax(y[kept]) == np.nanmax(y) and np.nanmin(y[kept]) == np.nanmin(y)


def test_numbers_read_well():
    assert [units.count(v) for v in (950, 12_345, 5_242_880, 41e6, 8.03e9, 15e12)] == [
        "950", "12.3k", "5.24M", "41.0M", "8.03B", "15.0T",
    ]  # fmt: skip
    assert [units.duration(v) for v in (3.21, 59.7, 372, 7500, 200_000)] == [
        "3.2 s", "1 min 00 s", "6 min 12 s", "2 h 05 min", "2 d 7 h",
    ]  # fmt: skip


def test_the_room_never_imports_torch():
    probe = "import sys, llamita.report.page; print([name in sys.modules for name in ('torch', 'jinja2')])"
    run = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[False, True]"


def test_the_report_says_where_a_steps_time_went(tmp_path):
    shares = {
        "data": 0.01,
        "forward": 0.3,
        "backward": 0.5,
        "communication": 0.0,
        "optimizer": 0.15,
        "checkpoint": 0.04,
    }
    rows = [train(step, time=shares) for step in range(10, 60, 10)]
    text = written(folder_of(tmp_path / "timed", SETTINGS, *rows))[1].text
    assert "Of the time, by mean: backward 50.0%, forward 30.0%, optimizer 15.0%, checkpoint 4.0%, data 1.0%" in text
    assert "Of the time" not in written(folder_of(tmp_path / "old", SETTINGS, train(10)))[1].text

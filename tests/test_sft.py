"""Fine-tuning data: what bears loss, which shapes of rows are read, and what is refused."""

import json

import numpy as np
import pytest

from llamita.align import sft
from llamita.data.pack import PackedRows
from llamita.tokenizer.train import train

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What does copy do?"},
    {"role": "assistant", "content": "It copies."},
    {"role": "user", "content": "And move?"},
    {"role": "assistant", "content": "It moves."},
]


@pytest.fixture(scope="module")
def tokenizer():
    words = [f"word{number} copies and moves things, it does! {number * 7}\n" for number in range(600)]
    return train(words, 600)


def test_only_the_assistants_tokens_and_their_end_bear_loss(tokenizer):
    examples = sft.Examples(tokenizer, [TALK])
    rows = PackedRows(examples, 256, masks=examples.masks, keep_whole=True)
    row = rows[0]
    learnt = row.targets[row.targets != -1].tolist()
    assert tokenizer.decode(learnt) == "It copies.<|eot_id|>It moves.<|eot_id|>"
    everything = PackedRows(examples, 256, keep_whole=True)[0]  # negative control: without masks the user is learnt too
    assert "What does copy do?" in tokenizer.decode(everything.targets[everything.targets != -1].tolist())


def test_conversations_are_never_cut_in_two(tokenizer):
    examples = sft.Examples(tokenizer, [TALK] * 30)
    rows = PackedRows(examples, 128, masks=examples.masks, keep_whole=True)
    begins = sum(int((rows[i].inputs == tokenizer.bos_id).sum()) for i in range(len(rows)))
    assert begins == 30 and all(rows[i].inputs[start] in (tokenizer.bos_id, 0) for i in range(len(rows))
                                for start in rows[i].starts)  # fmt: skip


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TALK[1:3]},
        {"conversations": [{"from": "human", "value": "What does copy do?"}, {"from": "gpt", "value": "It copies."}]},
        {"instruction": "What does copy do?", "input": "", "output": "It copies."},
    ],
)
def test_three_shapes_of_rows_mean_the_same(row, tmp_path):
    lines, whole = tmp_path / "a.jsonl", tmp_path / "a.json"
    lines.write_text(json.dumps(row) + "\n\n" + json.dumps(row) + "\n")
    whole.write_text(json.dumps([row, row]))
    assert list(sft.read(lines)) == list(sft.read(whole)) == [TALK[1:3], TALK[1:3]]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "is not JSON"),
        ("", "holds no rows"),
        ('{"question": "?"}', "row 1: neither messages"),
        ('{"conversations": [{"from": "alien", "value": "x"}]}', "row 1"),
    ],
)
def test_bad_files_are_refused_in_one_line(text, complaint, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=complaint) as error:
        list(sft.read(path))
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_a_missing_file_and_talk_without_answers_are_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="no file of conversations"):
        list(sft.read(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match="no conversation has an assistant's turn"):
        sft.Examples(tokenizer, [TALK[:2]])


def test_written_conversations_read_back_and_the_fingerprint_sees_a_change(tokenizer, tmp_path):
    sft.write(tmp_path / "a.jsonl", [TALK, TALK[1:3]])
    assert list(sft.read(tmp_path / "a.jsonl")) == [TALK, TALK[1:3]]
    prints = {sft.Examples(tokenizer, talks).fingerprint for talks in ([TALK], [TALK[1:3]], [TALK, TALK[1:3]])}
    assert len(prints) == 3
    assert np.array_equal(sft.Examples(tokenizer, [TALK]).masks[0], sft.Examples(tokenizer, [TALK]).masks[0])

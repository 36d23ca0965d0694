"""Layer: datatrove's filters, rule by rule, on a sample. Peer lane; benchmarks/rules_parity.py takes all.

In a sample of a few hundred a document is worth more than the half percent that all of them may differ by.
"""

import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.peer
ROOT = Path(__file__).parents[1]
PEER = ROOT / ".venv/peers-data/bin/python"
SAMPLE = 16  # every n-th document
MOST_DIFFERENT = 2


@pytest.fixture(scope="module")
def decisions(shared_data):
    if not PEER.exists():
        pytest.skip("datatrove's Python does not lie in .venv/peers-data")
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import rules_parity

    texts = rules_parity.documents(shared_data / "pretrain")[::SAMPLE]
    theirs, their_lines = rules_parity.peer_decisions(str(PEER), texts)
    ours, our_lines = rules_parity.our_decisions(list(theirs), texts)
    return theirs, ours, their_lines, our_lines


def test_the_same_documents_are_kept(decisions):
    theirs, ours, _, _ = decisions
    different = {name: sum(a != b for a, b in zip(kept, ours[name], strict=True)) for name, kept in theirs.items()}
    assert {name: count for name, count in different.items() if count > MOST_DIFFERENT} == {}
    assert sum(kept.count(False) for kept in theirs.values()) > 200  # the comparison is of something


def test_c4_leaves_the_same_lines(decisions):
    _, _, theirs, ours = decisions
    assert sum(a != b for a, b in zip(theirs, ours, strict=True)) <= MOST_DIFFERENT

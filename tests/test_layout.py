"""Layer: arithmetic. Every rank has one place, for a laptop and for 16,384 ranks."""

import pytest

from llamita.parallel.layout import AXES, Layout

LLAMA_405B = Layout(pp=16, dp=2, fsdp=64, tp=8)


@pytest.mark.parametrize("layout", [Layout(fsdp=1), Layout(pp=2, dp=3, fsdp=4, cp=2, tp=2), LLAMA_405B])
def test_places_are_all_different_and_lead_back(layout):
    places = [layout.coordinates(rank) for rank in range(layout.world)]
    assert len({tuple(place.values()) for place in places}) == layout.world
    assert [layout.rank_of(place) for place in places] == list(range(layout.world))
    assert all(0 <= place[axis] < getattr(layout, axis) for place in places for axis in AXES)


def test_neighbours_along_the_innermost_axis_are_the_next_ranks():
    assert LLAMA_405B.world == 16_384
    assert [LLAMA_405B.coordinates(rank)["tp"] for rank in range(9)] == [0, 1, 2, 3, 4, 5, 6, 7, 0]
    assert LLAMA_405B.coordinates(16_383) == {"pp": 15, "dp": 1, "fsdp": 63, "cp": 0, "tp": 7}


def test_every_part_of_a_batch_is_read_by_a_whole_group():
    readers = [LLAMA_405B.data_rank(rank) for rank in range(LLAMA_405B.world)]
    assert {readers.count(part) for part in range(LLAMA_405B.num_data_ranks)} == {16 * 8}
    for rank in range(0, 16_384, 1_111):
        place = LLAMA_405B.coordinates(rank)
        neighbour = LLAMA_405B.rank_of({**place, "tp": 7 - place["tp"], "pp": 15 - place["pp"]})
        assert readers[rank] == readers[neighbour]
        assert place["dp"] == 1 - (other := {**place, "dp": 1 - place["dp"]})["dp"]
        assert readers[rank] != readers[LLAMA_405B.rank_of(other)]


def test_the_rest_goes_to_fsdp():
    assert Layout().resolved(1).sizes == dict.fromkeys(AXES, 1)
    assert Layout(tp=2).resolved(8).fsdp == 4
    assert Layout(fsdp=2, dp=2).resolved(4).world == 4
    for layout, world in ((Layout(tp=3), 8), (Layout(fsdp=2), 4), (Layout(tp=4), 2)):
        with pytest.raises(ValueError, match="start as many with torchrun"):
            layout.resolved(world)
    with pytest.raises(ValueError, match=r"parallel\.tp must be at least 1"):
        Layout(tp=0)

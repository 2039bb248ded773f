"""Collectives read from programs small enough to count by hand."""

from pathlib import Path

from layerskip_jax.planning.hlo import Program

GATHER_AND_SCATTER = (Path(__file__).parent / "gather_and_scatter.hlo").read_text()


def _found(text):
    return {
        one.written + "/" + one.kind: one
        for one in Program(text).collectives()
        if not one.between_slices
    }


def test_a_kind_is_read_from_what_a_collective_is_for():
    found = _found(GATHER_AND_SCATTER.replace("STEP", "1"))
    assert set(found) == {
        "all-gather/all-gather",
        "all-reduce/all-gather",
        "all-reduce/reduce-scatter",
        "all-reduce/all-reduce",
    }
    assert found["all-gather/all-gather"].source == "forward"
    assert found["all-reduce/reduce-scatter"].shape == (64, 8)
    assert found["all-reduce/reduce-scatter"].size == 64 * 8 * 2
    assert found["all-reduce/all-reduce"].size == 4


def test_a_loop_counts_by_its_turns():
    turns = {key: one.turns for key, one in _found(GATHER_AND_SCATTER.replace("STEP", "1")).items()}
    assert turns["all-gather/all-gather"] == 12
    assert turns["all-reduce/all-reduce"] == 1
    unrolled = _found(GATHER_AND_SCATTER.replace("STEP", "2"))
    assert unrolled["all-gather/all-gather"].turns == 6


def test_groups_are_read_however_they_are_written():
    found = _found(GATHER_AND_SCATTER.replace("STEP", "1"))
    assert found["all-gather/all-gather"].group == (0, 1, 2, 3)
    assert found["all-reduce/all-gather"].group == (0, 1, 2, 3)
    assert found["all-reduce/reduce-scatter"].group == (0, 4)
    assert found["all-reduce/all-reduce"].group == tuple(range(8))


def test_counting_takes_a_loop_once_and_goes_by_what_is_written():
    program = Program(GATHER_AND_SCATTER.replace("STEP", "1"))
    assert program.counts(program.entry) == {"all-gather": 1, "all-reduce": 4}


def test_a_loop_without_a_constant_bound_takes_the_given_turns():
    text = GATHER_AND_SCATTER.replace("STEP", "1").replace(
        "s32[] constant(12)", "s32[] copy(%turn)"
    )
    assert {one.turns for one in Program(text, 5.0).collectives()} == {5.0, 1.0}


def test_slices_exchange_by_way_of_their_hosts():
    every = Program(GATHER_AND_SCATTER.replace("STEP", "1")).collectives()
    (one,) = (one for one in every if one.between_slices)
    assert (one.kind, one.shape, one.size, one.turns) == ("all-reduce", (16, 8), 16 * 8 * 2, 1)

"""The windows of each step, by hand."""

import math

import pytest

from layerskip_jax.data.batch_sizes import BatchSizes

GROWING = BatchSizes(8, (2, 5))  # 2 2 4 4 4 8 8 ...


def test_a_batch_doubles_up_to_its_full_size():
    assert GROWING.stages == ((0, 2), (2, 4), (5, 8))
    assert [GROWING.at(step) for step in range(7)] == [2, 2, 4, 4, 4, 8, 8]
    assert [GROWING.before(step) for step in range(8)] == [0, 2, 4, 8, 12, 16, 24, 32]
    assert GROWING.between(1, 6).tolist() == [2, 4, 4, 4, 8]
    assert GROWING.between(3, 3).tolist() == []


@pytest.mark.parametrize(
    "first, last, sizes",
    [(0, 9, [2, 4, 8]), (0, 2, [2]), (2, 5, [4]), (1, 3, [2, 4]), (5, 9, [8]), (9, 9, [])],
)
def test_the_sizes_of_some_steps(first, last, sizes):
    assert GROWING.within(first, last) == sizes
    assert sorted(set(GROWING.between(first, last).tolist())) == sizes


@pytest.mark.parametrize("sizes", [GROWING, BatchSizes(3), BatchSizes(4, (1,))])
def test_the_fewest_steps_for_some_windows(sizes):
    for windows in (1, 2, 2.5, 4, 4.01, 5, 16, 17, 31, 32, 100):
        steps = sizes.steps_for(windows)
        assert sizes.before(steps) >= windows > sizes.before(steps - 1)


def test_a_batch_that_does_not_grow_is_the_same_at_every_step():
    sizes = BatchSizes(6)
    assert sizes.stages == ((0, 6),)
    assert sizes.at(10**9) == 6 and sizes.before(10**9) == 6 * 10**9
    assert sizes.steps_for(2.5 * 40) == math.ceil(2.5 * 40 / 6)

"""The order of windows: by hand, against grain's own pipeline, and against a row-by-row account."""

import tracemalloc

import grain
import numpy as np
import pytest

from layerskip_jax.data.batch_sizes import BatchSizes
from layerskip_jax.data.order import MixtureWeights, Order


def of_grain(counts, seed, weights):
    """The order that runs had when grain held it, and that old runs go on with."""
    orders, first = [], 0
    for number, count in enumerate(counts):
        drawn = int(np.random.SeedSequence((seed, number)).generate_state(1)[0])
        order = grain.MapDataset.range(first, first + count)
        orders.append(order.seed(drawn if number else seed).shuffle().repeat())
        first += count
    return grain.MapDataset.mix(orders, weights) if len(orders) > 1 else orders[0]


@pytest.mark.parametrize(
    "counts, weights",
    [
        ((1,), (1.0,)),
        ((57,), (1.0,)),
        ((40, 7), (0.7, 0.3)),
        ((40, 7, 1, 300), (0.1, 3.0, 1.0, 0.25)),
        ((10**9, 10**6), (1.0, 1e-7)),
        ((50, 60), (1e-30, 1.0)),  # whole numbers beyond int64
    ],
)
def test_the_order_is_the_one_that_grain_gives(counts, weights):
    ours = Order(counts, seed=3, weights=MixtureWeights(weights))
    theirs = of_grain(counts, 3, weights)
    for first in (0, 3 * sum(counts), 10**12):
        places = np.arange(first, first + 50)
        assert ours.windows(places).tolist() == [theirs[place] for place in places.tolist()]


# fmt: off
PINNED = [1, 2, 4, 5, 9, 7, 8, 6, 0, 3, 9, 6, 1, 8, 2, 0, 3, 5, 4, 7]
# fmt: on


def test_an_order_is_pinned():
    """The shuffle is another library's: these numbers are those of every version of ours."""
    order = Order((10,), seed=0)
    assert order.windows(np.arange(20)).tolist() == PINNED
    assert sorted(PINNED[:10]) == sorted(PINNED[10:]) == list(range(10))


def corpora_of(order, counts, places):
    """The corpus of each place, and what each corpus gave, in turn."""
    firsts = np.cumsum([0, *counts])
    numbers = order.windows(np.arange(places))
    corpora = np.searchsorted(firsts, numbers, side="right") - 1
    return corpora, [numbers[corpora == corpus].tolist() for corpus in range(len(counts))]


def test_weights_change_by_step_and_each_corpus_goes_on():
    """Steps 0 and 1 of four rows half and half, then three to one, then the second corpus alone."""
    counts = (9, 5)
    weights = MixtureWeights((1.0, 1.0), ((2, (3.0, 1.0)), (4, (0.0, 1.0))))
    order = Order(counts, seed=5, weights=weights, sizes=BatchSizes(4))
    corpora, given = corpora_of(order, counts, 5 * 4)
    assert [list(corpora[step * 4 : step * 4 + 4]).count(0) for step in range(5)] == [2, 2, 3, 3, 0]
    for corpus, numbers in enumerate(given):
        _, alone = corpora_of(Order(counts, seed=5, weights=MixtureWeights((1.0, 1.0))), counts, 60)
        assert numbers == alone[corpus][: len(numbers)]
    # 10 of the first one's 9 windows, 10 of the other's 5: epochs are whole, across all changes
    assert sorted(given[0][:9]) == list(range(9))
    assert sorted(given[1][:5]) == sorted(given[1][5:]) == list(range(9, 14))


def test_a_corpus_may_join_later_and_leave():
    counts = (30, 20, 10)
    weights = MixtureWeights((1.0, 0.0, 0.0), ((3, (1.0, 0.0, 2.0)), (6, (0.0, 1.0, 0.0))))
    order = Order(counts, seed=1, weights=weights, sizes=BatchSizes(6))
    corpora, given = corpora_of(order, counts, 60)
    assert (corpora[:18] == 0).all() and (corpora[36:] == 1).all()
    assert [(corpora[18:36] == corpus).sum() for corpus in range(3)] == [6, 0, 12]
    assert len(set(given[0])) == 24


def account(counts, seed, weights, sizes, skips, steps):
    """Every batch, row by row: what state a reader would keep. Yields the windows of each step."""
    alone = [grain_order(counts, seed, corpus) for corpus in range(len(counts))]
    taken, shares, row, mixed = [0] * len(counts), None, 0, None

    def batch(step):
        nonlocal shares, row, mixed
        now = weights.first
        for change, later in weights.changes:
            now = later if step >= change else now
        if now != shares:
            shares, row = now, 0
            used = [corpus for corpus, share in enumerate(now) if share > 0]
            ranges = [grain.MapDataset.range(c, c + 1).repeat() for c in used]
            positive = [share for share in now if share > 0]
            mixed = grain.MapDataset.mix(ranges, positive) if len(used) > 1 else ranges[0]
        numbers = []
        for _ in range(sizes.at(step)):
            corpus = mixed[row]
            numbers.append(alone[corpus](taken[corpus]))
            taken[corpus] += 1
            row += 1
        return numbers

    for step in range(steps):
        for at, count in skips:
            if at == step:
                for passed in range(at, at + count):
                    batch(passed)
        yield batch(step)


def grain_order(counts, seed, corpus):
    drawn = int(np.random.SeedSequence((seed, corpus)).generate_state(1)[0])
    first = sum(counts[:corpus])
    order = grain.MapDataset.range(first, first + counts[corpus])
    return order.seed(drawn if corpus else seed).shuffle().repeat().__getitem__


@pytest.mark.parametrize("case", range(8))
def test_any_step_is_what_reading_all_before_it_gives(case):
    """Random corpora, weights, changes, ramps and skips; the steps asked for in any order."""
    draw = np.random.default_rng(case)
    corpora = int(draw.integers(2, 5))
    counts = draw.integers(1, 40, corpora).tolist()

    def shares():
        drawn = np.where(draw.random(corpora) < 0.2, 0.0, draw.random(corpora) + 0.05)
        drawn[draw.integers(corpora)] = 0.5
        return tuple(drawn.tolist())

    changes = sorted(set(draw.integers(1, 25, draw.integers(0, 5)).tolist()))
    weights = MixtureWeights(shares(), tuple((step, shares()) for step in changes))
    ramp = sorted(set(draw.integers(1, 20, draw.integers(0, 3)).tolist()))
    sizes = BatchSizes(int(draw.integers(1, 4)) << len(ramp), tuple(ramp))
    at = sorted(draw.integers(0, 25, draw.integers(0, 4)).tolist())
    skips = [(step, int(draw.integers(1, 9))) for step in at]
    order = Order(counts, seed=case, weights=weights, sizes=sizes, skips=skips)
    expected = list(account(counts, case, weights, sizes, skips, 25))
    for step in draw.permutation(25).tolist():
        passed = sum(sizes.before(s + n) - sizes.before(s) for s, n in skips if s <= step)
        first = sizes.before(step) + passed
        places = np.arange(first, first + sizes.at(step))
        assert order.windows(places).tolist() == expected[step]


def test_a_skip_across_a_change_leaves_out_the_windows_that_the_bad_batches_had():
    counts, sizes = (500, 500), BatchSizes(8)
    weights = MixtureWeights((1.0, 1.0), ((5, (1.0, 9.0)),))
    tried = Order(counts, seed=0, weights=weights, sizes=sizes)
    again = Order(counts, seed=0, weights=weights, sizes=sizes, skips=[(3, 4)])
    batches = tried.windows(np.arange(12 * 8)).reshape(12, 8)
    bad = batches[3:7].ravel()
    np.testing.assert_array_equal(again.windows(np.arange(7 * 8)).reshape(7, 8), batches[:7])
    after = again.windows(np.arange(7 * 8, 60 * 8))
    assert not set(after) & set(bad)
    # The steps after are mixed by their own weights again: 3 and 4 half and half.
    assert [(after[i : i + 8] < 500).sum() for i in (0, 8)] == [4, 4]
    assert (after[16 : 16 + 80] < 500).sum() == 8
    # Nothing is lost but what was bad.
    first = np.concatenate([batches[:3].ravel(), bad, after])
    for of_corpus in (first[first < 500], first[first >= 500]):
        epoch = of_corpus[:500]
        assert len(set(epoch)) == len(epoch)


def test_a_billion_windows_take_no_memory():
    """Of a step after millions, too: nothing is counted up to it."""
    tracemalloc.start()
    try:
        weights = MixtureWeights((0.7, 0.3), ((10**6, (0.4, 0.6)), (4 * 10**6, (0.1, 0.9))))
        sizes = BatchSizes(1024, (1000, 2000))
        order = Order((10**9, 3 * 10**8), seed=7, weights=weights, sizes=sizes, skips=[(10**6, 3)])
        for step in (0, 1, 10**6, 5 * 10**7):
            first = sizes.before(step)
            numbers = order.windows(np.arange(first, first + sizes.at(step)))
            assert len(set(numbers.tolist())) == len(numbers)
            assert numbers.max() >= 10**9 > numbers.min()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20

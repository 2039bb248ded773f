import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip_jax.data.packing import OPEN_WINDOWS, Completed, pack, pack_whole, unpack

END = 0


def packed(documents, length):
    arrays = (np.array(document, np.int32) for document in documents)
    windows = list(pack(arrays, length, END))
    return np.stack(windows) if windows else np.zeros((0, 2, length + 1), np.int32)


def test_documents_share_a_window():
    windows = packed([[5, 6], [7, 8, 9]], 6)
    np.testing.assert_array_equal(windows, [[[5, 6, 0, 7, 8, 9, 0], [1, 1, 1, 2, 2, 2, 2]]])
    batch = unpack(windows)
    np.testing.assert_array_equal(batch.tokens, [[5, 6, 0, 7, 8, 9]])
    np.testing.assert_array_equal(batch.targets, [[6, 0, 7, 8, 9, 0]])
    # The end token is predicted; what follows it, another document, is not.
    np.testing.assert_array_equal(batch.valid, [[True, True, False, True, True, True]])
    np.testing.assert_array_equal(batch.positions, [[0, 1, 2, 0, 1, 2]])


def test_a_document_goes_on_in_the_next_window_as_its_first():
    windows = packed([[5], [6, 7, 8]], 3)
    np.testing.assert_array_equal(windows[0], [[5, 0, 6, 7], [1, 1, 2, 2]])
    # Token 7 comes again as the input for 8; then the last window is padded.
    np.testing.assert_array_equal(windows[1], [[7, 8, 0, 0], [1, 1, 1, 0]])
    batch = unpack(windows)
    np.testing.assert_array_equal(batch.positions, [[0, 1, 0], [0, 1, 2]])
    np.testing.assert_array_equal(batch.valid, [[True, False, True], [True, True, False]])


def test_a_last_window_without_a_target_is_left_out():
    assert len(packed([[5, 6]], 2)) == 1
    assert len(packed([[5, 6, 7]], 2)) == 2
    assert len(packed([[]], 4)) == 0


def test_padding_has_no_segment_and_no_target():
    batch = unpack(packed([[5]], 4))
    np.testing.assert_array_equal(batch.segment_ids, [[1, 1, 0, 0]])
    np.testing.assert_array_equal(batch.valid, [[True, False, False, False]])


corpora = st.lists(st.lists(st.integers(1, 50), max_size=30), min_size=1, max_size=8)


@settings(deadline=None)
@given(corpora, st.integers(2, 12))
def test_every_token_but_the_first_is_a_target_once(documents, length):
    stream = [token for document in documents for token in [*document, END]]
    windows = packed(documents, length)
    batch = unpack(windows)
    is_target = windows[:, 1, 1:] > 0
    assert batch.targets[is_target].tolist() == stream[1:]
    assert batch.tokens[is_target].tolist() == stream[:-1]


@settings(deadline=None)
@given(corpora, st.integers(2, 12))
def test_valid_targets_are_those_within_a_document(documents, length):
    within = [
        pair for document in documents for pair in zip(document, [*document, END][1:], strict=True)
    ]
    batch = unpack(packed(documents, length))
    valid = zip(batch.tokens[batch.valid], batch.targets[batch.valid], strict=True)
    assert list(valid) == within


@settings(deadline=None)
@given(corpora, st.integers(2, 12))
def test_segments_count_from_one_and_positions_count_within_them(documents, length):
    batch = unpack(packed(documents, length))
    for segments, positions in zip(batch.segment_ids, batch.positions, strict=True):
        real = segments[segments > 0]
        assert real[0] == 1
        assert set(np.diff(real)) <= {0, 1}
        for segment in np.unique(segments):
            count = (segments == segment).sum()
            assert positions[segments == segment].tolist() == list(range(count))


def completed(prompt, completion):
    """Returns a document of a prompt, a completion and the end token."""
    tokens = np.array([*prompt, *completion, END], np.int32)
    return Completed(tokens, np.arange(len(tokens)) >= len(prompt))


def whole(documents, length):
    windows = list(pack_whole(iter(documents), length, END))
    return np.stack(windows) if windows else np.zeros((0, 2, length + 1), np.int32)


def test_only_completions_are_targets():
    windows = whole([completed([5, 6], [7]), completed([8], [9, 4])], 8)
    np.testing.assert_array_equal(
        windows, [[[5, 6, 7, 0, 8, 9, 4, 0, 0], [-1, -1, 1, 1, -2, 2, 2, 2, 0]]]
    )
    rows = unpack(windows)
    np.testing.assert_array_equal(rows.tokens, [[5, 6, 7, 0, 8, 9, 4, 0]])
    np.testing.assert_array_equal(rows.targets, [[6, 7, 0, 8, 9, 4, 0, 0]])
    np.testing.assert_array_equal(rows.valid, [[0, 1, 1, 0, 1, 1, 1, 0]])
    np.testing.assert_array_equal(rows.segment_ids, [[1, 1, 1, 1, 2, 2, 2, 2]])
    np.testing.assert_array_equal(rows.positions, [[0, 1, 2, 3, 0, 1, 2, 3]])


def test_a_document_goes_where_it_leaves_the_least_room():
    # Windows of 8: the last of 2 goes after the one of 6, not after the one of 5.
    windows = whole([completed([5], [1] * n) for n in (3, 4, 0)], 7)
    np.testing.assert_array_equal(windows[0, 0], [5, 1, 1, 1, 1, 0, 5, 0])
    np.testing.assert_array_equal(windows[1, 0], [5, 1, 1, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(windows[1, 1], [-1, 1, 1, 1, 1, 0, 0, 0])


def test_the_fullest_window_makes_room_and_is_not_held_back():
    # None fits beside another, so that one window is given away for each past so many.
    taken = 0

    def documents():
        nonlocal taken
        for number in itertools.count():
            taken += 1
            yield completed([1], [2] * (4 if number == 5 else 3))

    windows = pack_whole(documents(), 7, END)
    assert next(windows)[0].tolist() == [1, 2, 2, 2, 2, 0, 0, 0]
    assert next(windows)[0].tolist() == [1, 2, 2, 2, 0, 0, 0, 0]
    assert taken == OPEN_WINDOWS + 2


lengths = st.tuples(st.integers(1, 8), st.integers(1, 5))


@settings(deadline=None)
@given(st.lists(lengths, max_size=200), st.integers(13, 30))
def test_whole_documents_lose_nothing_and_completions_are_targets_once(sizes, length):
    # Every token has an id of its own, above the end token.
    number = itertools.count(1)
    documents = [
        completed(*([next(number) for _ in range(size)] for size in pair)) for pair in sizes
    ]
    windows = whole(documents, length)
    rows = unpack(windows)
    found = []
    for tokens, marks in windows:
        count = int(np.abs(marks).max())
        for segment in range(1, count + 1):
            part = np.flatnonzero(np.abs(marks) == segment)
            assert part.tolist() == list(range(part[0], part[-1] + 1))  # not cut
            found.append((tokens[part].tolist(), (marks[part] > 0).tolist()))
        assert (tokens[marks == 0] == END).all()
    expected = [(d.tokens.tolist(), d.is_target.tolist()) for d in documents]
    assert sorted(found) == sorted(expected)
    targets = rows.targets[rows.valid].tolist()
    learned = [token for d in documents for token in d.tokens[d.is_target].tolist()]
    assert sorted(targets) == sorted(learned)
    # The input of each is the token before it in its document.
    before = {}
    for d in documents:
        before |= dict(zip(d.tokens[1:-1].tolist(), d.tokens[:-2].tolist(), strict=True))
    for token, target in zip(rows.tokens[rows.valid], rows.targets[rows.valid], strict=True):
        assert target == END or before[int(target)] == token
    # Two windows that are half empty would have been one.
    assert len(windows) <= 2 * sum(len(d.tokens) for d in documents) // (length + 1) + 1
    np.testing.assert_array_equal(windows, whole(documents, length))

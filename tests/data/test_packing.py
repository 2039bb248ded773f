import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip_jax.data.packing import pack, unpack

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

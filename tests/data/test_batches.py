import dataclasses
import hashlib
import json
import shutil
import tracemalloc

import numpy as np
import pytest

from layerskip_jax.data.batches import BatchSource, mixture_fingerprint
from layerskip_jax.data.prepare import prepare
from layerskip_jax.data.shards import Shards
from layerskip_jax.data.tokenizer import file_sha256
from layerskip_jax.schema import ConfigError, UserError
from tests.data.conftest import small_request

BATCH = 6


def source(folder, split="train", *, seed=3, batch_size=BATCH, **options):
    return BatchSource(folder, split, batch_size=batch_size, seed=seed, **options)


def assert_same(a, b):
    for name, x, y in zip(a._fields, a, b, strict=True):
        np.testing.assert_array_equal(x, y, err_msg=name)


def row_keys(batch):
    return [row.tobytes() for row in np.concatenate([batch.tokens, batch.segment_ids], axis=1)]


def keys_in_order(batches, steps):
    return [key for step in steps for key in row_keys(batches.batch(step))]


def test_a_growing_batch_cuts_the_same_order_otherwise(prepared):
    """2 rows for two steps, 4 for three, then 8: rows 0, 2, 4, 8, 12, 16, 24 begin batches."""
    plain = source(prepared, batch_size=4)
    growing = source(prepared, batch_size=8, batch_ramp=(2, 5))
    assert [len(growing.batch(step).tokens) for step in range(7)] == [2, 2, 4, 4, 4, 8, 8]
    assert keys_in_order(growing, range(7)) == keys_in_order(plain, range(8))
    numbers = [number for step in range(8) for number in plain.window_numbers(step)]
    assert growing.window_numbers(1) == numbers[2:4]
    assert growing.window_numbers(5) == numbers[16:24]
    assert_same(growing.rows(5, [3, 0]), type(plain.batch(4))(*(a[[3, 0]] for a in plain.batch(4))))
    with growing.prefetch(range(1, 3), lambda step: range(2 + 2 * (step == 2))) as batches:
        assert [len(rows.tokens) for _, rows in batches] == [2, 4]
    with pytest.raises(IndexError, match="row 2 is not in a batch of 2"):
        growing.rows(1, [2])
    count = growing.num_windows
    assert growing.epochs(7) == [(str(prepared), 32 / count)]


def test_a_skip_leaves_out_the_rows_of_the_batches_that_were_bad(prepared):
    """Steps 1 to 2, across the first doubling, had 2 + 4 rows; later step 2 alone, 4."""
    plain = source(prepared, batch_size=1)
    skipped = source(prepared, batch_size=8, batch_ramp=(2, 5), skips=[(1, 2), (2, 1)])

    def rows(first, last):
        return keys_in_order(plain, range(first, last))

    assert keys_in_order(skipped, [0]) == rows(0, 2)
    assert keys_in_order(skipped, [1]) == rows(2 + 6, 4 + 6)
    assert keys_in_order(skipped, [2, 3]) == rows(4 + 6 + 4, 12 + 6 + 4)
    assert keys_in_order(skipped, [5]) == rows(16 + 6 + 4, 24 + 6 + 4)


def test_shapes_and_kinds(prepared):
    batch = source(prepared).batch(0)
    for name in ("tokens", "targets", "segment_ids", "positions"):
        array = getattr(batch, name)
        assert array.shape == (BATCH, 16)
        assert array.dtype == np.int32
    assert batch.valid.dtype == bool


def test_a_batch_depends_on_seed_and_step_alone(prepared):
    assert_same(source(prepared).batch(17), source(prepared).batch(17))
    assert row_keys(source(prepared).batch(0)) != row_keys(source(prepared, seed=4).batch(0))
    # Reading others before it changes nothing.
    used = source(prepared)
    for step in (5, 2, 40):
        used.batch(step)
    assert_same(used.batch(17), source(prepared).batch(17))


@pytest.mark.parametrize("readers", [2, 3, 6])
def test_readers_of_some_rows_read_the_same_batch(prepared, readers):
    whole = source(prepared).batch(9)
    part = BATCH // readers
    for reader in range(readers):
        rows = slice(reader * part, (reader + 1) * part)
        mine = source(prepared).rows(9, rows)
        assert_same(mine, whole.__class__(*(array[rows] for array in whole)))
        assert_same(mine, source(prepared).rows(9, list(range(BATCH)[rows])))
    scattered = [4, 0, 5]
    assert_same(
        source(prepared).rows(9, scattered),
        whole.__class__(*(array[scattered] for array in whole)),
    )


def test_epochs_are_shuffled_anew_and_cover_every_window(prepared):
    singles = source(prepared, shuffle=False, batch_size=1)
    count = singles.num_windows
    every = [row_keys(singles.batch(step))[0] for step in range(count)]
    shuffled = source(prepared, batch_size=1)
    epochs = [
        [row_keys(shuffled.batch(epoch * count + step))[0] for step in range(count)]
        for epoch in range(2)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(every)
    assert epochs[0] != epochs[1]
    assert epochs[0] != every


def test_validation_comes_once_and_ends_in_padding(prepared):
    validation = source(prepared, "validation", shuffle=False, batch_size=4)
    count = validation.num_windows
    assert validation.steps_per_epoch == -(-count // 4)
    assert count % 4, "take another batch size, so that the last batch is not full"
    last = validation.batch(validation.steps_per_epoch - 1)
    assert (last.segment_ids[: count % 4, 0] > 0).all()
    assert (last.segment_ids[count % 4 :] == 0).all()
    assert not last.valid[count % 4 :].any()


def test_every_validation_token_is_predicted_once(prepared):
    validation = source(prepared, "validation", shuffle=False)
    valid = sum(validation.batch(s).valid.sum() for s in range(validation.steps_per_epoch))
    counts = validation.manifest.validation
    assert valid == counts.tokens - counts.documents


def test_prefetch_gives_what_rows_gives(prepared):
    reading = source(prepared)
    with reading.prefetch(range(3, 9), lambda _: [1, 4], buffer_size=2) as batches:
        fetched = list(batches)
    assert [step for step, _ in fetched] == list(range(3, 9))
    for step, batch in fetched:
        assert_same(batch, reading.rows(step, [1, 4]))


def test_a_billion_windows_are_read_without_a_list_of_them(prepared, monkeypatch):
    """As many as an order may have, of which the files here stand for all."""
    count = 10**9
    plain = source(prepared)
    records = plain.num_windows
    tracemalloc.start()
    try:
        monkeypatch.setattr(
            "layerskip_jax.data.batches.Shards.__getitem__",
            lambda self, number, read=Shards.__getitem__: read(self, number % records),
        )
        monkeypatch.setattr("layerskip_jax.data.batches.Shards.__len__", lambda self: count)
        monkeypatch.setattr(
            "layerskip_jax.data.batches.read_manifest",
            lambda folder: dataclasses.replace(
                plain.manifest, train=dataclasses.replace(plain.manifest.train, windows=count)
            ),
        )
        faked = source(prepared, batch_size=8)
        with faked.prefetch(range(10**8, 10**8 + 5), lambda _: slice(None)) as batches:
            read = list(batches)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert faked.num_windows == count and faked.steps_per_epoch == count // 8
    assert peak < 2**22
    step, batch = read[2]
    numbers = faked.window_numbers(step)
    assert len(set(numbers)) == 8 and max(numbers) > 2**24
    unshuffled = source(prepared, batch_size=8, shuffle=False)
    for row, number in enumerate(numbers):
        assert_same(
            type(batch)(*(array[[row]] for array in batch)),
            unshuffled.rows(number // 8, [number % 8]),
        )


def test_prefetch_can_be_left_early_and_be_empty(prepared):
    with source(prepared).prefetch(range(1000), lambda _: slice(None)) as batches:
        assert next(batches)[0] == 0
    with source(prepared).prefetch(range(5, 5), lambda _: slice(None)) as batches:
        assert list(batches) == []


def test_rows_outside_the_batch_and_empty_batches_are_refused(prepared):
    with pytest.raises(IndexError, match="row 6 is not in a batch of 6"):
        source(prepared).rows(0, [BATCH])
    with pytest.raises(ConfigError, match="batch_size=0 must be at least 1"):
        source(prepared, batch_size=0)


@pytest.fixture(scope="module")
def other(prepared, tmp_path_factory):
    """A second, smaller corpus with the first one's tokenizer."""
    texts = tmp_path_factory.mktemp("other")
    for number in range(12):
        (texts / f"{number}.txt").write_text(f"Another {number}. " + "one more word " * number)
    output = texts / "data"
    sha = file_sha256(prepared / "tokenizer.json")
    request = small_request(texts, vocab_size=0, tokenizer_sha256=sha)
    prepare(request, output, tokenizer_file=prepared / "tokenizer.json")
    return output


def test_corpora_are_mixed_by_weight_each_in_epochs_of_its_own(prepared, other):
    mixed = source(prepared, mixture=[str(other)], weights=[3.0, 1.0])
    ours, theirs = (source(folder).num_windows for folder in (prepared, other))
    assert mixed.num_windows == ours + theirs
    numbers = [number for step in range(5 * ours // BATCH) for number in mixed.window_numbers(step)]
    second = [number - ours for number in numbers if number >= ours]
    # Nearly exact, in the whole and in every stretch of 40 rows.
    for start in range(0, len(numbers) - 40, 7):
        assert abs(sum(n >= ours for n in numbers[start : start + 40]) - 10) <= 1
    epochs = [second[i : i + theirs] for i in range(0, len(second) - theirs, theirs)]
    assert len(epochs) > 1
    assert all(sorted(epoch) == list(range(theirs)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    # The rows are those windows, and a batch is the same whoever asks and when.
    alone = source(other, batch_size=1, shuffle=False)
    for row, number in enumerate(mixed.window_numbers(5)):
        if number >= ours:
            assert_same(mixed.rows(5, [row]), alone.batch(number - ours))
    assert_same(source(prepared, mixture=[str(other)], weights=[3.0, 1.0]).batch(5), mixed.batch(5))


CHANGES = ((5, (1.0, 1.0)), (9, (0.0, 1.0)))


def test_a_mixture_changes_its_weights_by_step(prepared, other):
    """Six rows a step: 4 and 2, from step 5 on 3 and 3, from step 9 on none and all."""
    mixed = source(
        prepared, mixture=[str(other)], weights=[2.0, 1.0], weight_changes=CHANGES, batch_size=BATCH
    )
    ours, theirs = (source(folder).num_windows for folder in (prepared, other))
    steps = [mixed.window_numbers(step) for step in range(12)]
    of_first = [sum(number < ours for number in numbers) for numbers in steps]
    assert of_first == [4] * 5 + [3] * 4 + [0] * 3
    first = [number for numbers in steps for number in numbers if number < ours]
    assert first == [n for step in range(9) for n in source(prepared).window_numbers(step)][:32]
    second = [number for numbers in steps for number in numbers if number >= ours]
    epochs = [second[i : i + theirs] for i in range(0, len(second) - theirs + 1, theirs)]
    assert epochs and all(len(set(epoch)) == theirs for epoch in epochs)
    assert mixed.epochs(12) == [
        (str(prepared), (20 + 12) / ours), (str(other), (10 + 12 + 18) / theirs)
    ]  # fmt: skip
    assert mixed.epochs(5) == [(str(prepared), 20 / ours), (str(other), 10 / theirs)]


def test_a_schedule_of_weights_is_read_alike_by_whoever_reads(prepared, other):
    """By a reader that begins anywhere, by parts of the rows, and by two threads or five."""
    options = {
        "mixture": [str(other)], "weights": [0.7, 0.3], "weight_changes": CHANGES,
        "batch_size": 8, "batch_ramp": (3, 6), "skips": [(4, 3), (8, 1)],
    }  # fmt: skip
    whole = source(prepared, **options)
    expected = [whole.batch(step) for step in range(12)]
    for threads in (2, 5):
        again = source(prepared, **options)
        with again.prefetch(range(4, 12), lambda _: slice(None), threads=threads) as batches:
            for step, batch in batches:
                assert_same(batch, expected[step])
    for row in range(8):
        part = source(prepared, **options).rows(10, [row])
        assert_same(part, type(part)(*(array[[row]] for array in expected[10])))


def test_a_schedule_that_cannot_be_is_refused_by_its_value(prepared, other):
    mixture = {"mixture": [str(other)], "weights": [1.0, 1.0]}
    for options, message in (
        (
            {"weight_changes": CHANGES},
            r"weight_changes=\(\(5, .* config.data.mixture names no folder",
        ),
        (
            mixture | {"weight_changes": [(5, (1.0,))]},
            r"weight_changes of step 5=\(1.0,\) must have 2 numbers",
        ),
        (mixture | {"weight_changes": [(5, (0.0, 0.0))]}, "step 5=.* gives nothing to any folder"),
        (
            mixture | {"weights": [1.0, 0.0], "weight_changes": [(5, (2.0, 0.0))]},
            f"{other} nothing, and no weight_changes does",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            source(prepared, **options)


def test_a_schedule_is_part_of_what_identifies_the_data(prepared, other):
    """And a run without one is identified as it was before there were any."""
    arguments = (prepared, [str(other)], [0.7, 0.3])
    prints = [source(folder).manifest.fingerprint for folder in (prepared, other)]
    before = hashlib.sha256(json.dumps([prints, [0.7, 0.3]]).encode()).hexdigest()
    assert mixture_fingerprint(*arguments) == mixture_fingerprint(*arguments, ()) == before
    others = {mixture_fingerprint(*arguments, CHANGES[:count]) for count in (0, 1, 2)}
    assert len(others) == 3


def test_skipped_batches_are_passed_over_from_their_step_on(prepared):
    plain, skipping = source(prepared), source(prepared, skips=[(4, 2), (6, 1)])
    expected = [0, 1, 2, 3, 6, 7, 9, 10]
    assert [skipping.window_numbers(step) for step in range(8)] == [
        plain.window_numbers(step) for step in expected
    ]
    assert_same(skipping.batch(7), plain.batch(10))


def test_mixing_one_corpus_leaves_the_order_of_the_first(prepared, other):
    mixed = source(prepared, mixture=[str(other)], weights=[1.0, 1.0])
    count = source(prepared).num_windows
    numbers = [number for step in range(20) for number in mixed.window_numbers(step)]
    alone = [number for step in range(20) for number in source(prepared).window_numbers(step)]
    first = [number for number in numbers if number < count]
    assert first == alone[: len(first)]


def test_a_mixture_that_does_not_go_together_is_refused(prepared, other, tmp_path):
    with pytest.raises(ConfigError, match=r"weights=\(1.0,\) must have 2 numbers"):
        source(prepared, mixture=[str(other)], weights=[1.0])
    longer = tmp_path / "longer"
    prepare(small_request(other.parent, sequence_length=20), longer)
    with pytest.raises(UserError, match="its (tokenizer|windows) differ"):
        source(prepared, mixture=[str(longer)], weights=[1.0, 1.0])
    first = mixture_fingerprint(prepared, [str(other)], [1.0, 1.0])
    assert first != mixture_fingerprint(prepared, [str(other)], [2.0, 1.0])
    assert mixture_fingerprint(prepared, [], []) == source(prepared).manifest.fingerprint


def damage(folder, start, stop):
    file = folder / "train-00000.array_record"
    content = bytearray(file.read_bytes())
    content[start:stop] = bytes(stop - start)
    file.write_bytes(content)


def test_a_damaged_record_is_named(prepared, tmp_path):
    folder = shutil.copytree(prepared, tmp_path / "data")
    # Riegeli's file header takes the first 64 bytes or so; the first records follow.
    damage(folder, 200, 264)
    with (
        pytest.raises(UserError, match=r"train-00000.array_record: record \d+ is damaged"),
        source(folder).prefetch(range(200), lambda _: slice(None)) as batches,
    ):
        list(batches)


def test_damaged_records_are_left_out_where_that_is_asked_for(prepared, tmp_path, caplog):
    folder = shutil.copytree(prepared, tmp_path / "data")
    damage(folder, 200, 264)
    skipping, whole = source(folder, skip_damaged=True), source(prepared)
    left_out = 0
    for step in range(whole.steps_per_epoch):
        ours, theirs = skipping.batch(step), whole.batch(step)
        for row in range(BATCH):
            if ours.segment_ids[row].any():
                np.testing.assert_array_equal(ours.tokens[row], theirs.tokens[row])
                np.testing.assert_array_equal(ours.valid[row], theirs.valid[row])
            else:
                assert not ours.valid[row].any()
                left_out += 1
    assert 0 < left_out < whole.num_windows
    assert skipping.damaged == left_out
    assert caplog.text.count("; left out") == left_out


def test_a_damaged_index_is_named(prepared, tmp_path):
    folder = shutil.copytree(prepared, tmp_path / "data")
    size = (folder / "train-00000.array_record").stat().st_size
    damage(folder, size - 65536, size)
    with pytest.raises(UserError, match="train-00000.array_record: its index is damaged"):
        source(folder)

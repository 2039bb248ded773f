import datetime
import gzip
import json
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from layerskip_jax.data import reading
from layerskip_jax.data.manifest import PrepareOptions
from layerskip_jax.data.prepare import find_units
from layerskip_jax.data.reading import NAMED_SKIPS, DocumentReader, is_value
from layerskip_jax.schema import UserError


def read(*named, **options):
    """Returns the reader of all units, and the texts that it finds."""
    request = PrepareOptions(tuple(map(str, named)), **options)
    reader = DocumentReader(request)
    units = find_units(request)
    return reader, [d.text for unit in units for d in reader.read(list(unit.pieces))]


def test_lengths_are_counted_in_characters(tmp_path):
    texts = ["字", "字字", "abc", "ééééé"]
    for number, text in enumerate([*texts, " "]):
        (tmp_path / f"{number}.txt").write_text(text)
    for least, most, kept in ((0, 0, texts), (2, 0, texts[1:]), (2, 3, texts[1:3]), (0, 1, ["字"])):
        reader, found = read(tmp_path, min_characters=least, max_characters=most)
        # What is blank is no document that a filter could leave out.
        assert (found, reader.filtered) == (kept, len(texts) - len(kept))


ROWS = [
    {"text": "a", "lang": "en", "stars": 3, "score": 0.5, "ok": True, "tags": ["x"], "no": None},
    {"text": "b", "lang": "de", "stars": 4, "score": 3.0, "ok": False, "tags": [], "no": None},
    {"text": "c", "lang": "3", "stars": 12345678901234567, "score": -1.0, "ok": None, "tags": None},
]
RULES = [
    (("lang=en",), "a"),
    (("lang=EN",), ""),
    (("lang=3",), "c"),
    (("stars=3",), "a"),
    (("stars=3.0",), "a"),
    (("stars=12345678901234567",), "c"),
    (("stars=12345678901234568",), ""),
    (("stars=three",), ""),
    (("score=3",), "b"),
    (("score=-1",), "c"),
    (("ok=true",), "a"),
    (("ok=false",), "b"),
    (("ok=True",), ""),
    (("ok=1",), ""),
    (("stars=true",), ""),
    (("tags=[]",), "b"),
    (('tags=["x"]',), "a"),
    (("ok=null",), "c"),
    (("lang=de", "stars=4"), "b"),
    (("lang=de", "stars=3"), ""),
]


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_a_field_that_must_equal(tmp_path, ending):
    file = tmp_path / f"d{ending}"
    if ending == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    else:
        pq.write_table(pa.Table.from_pylist(ROWS), file)
    for rules, kept in RULES:
        reader, found = read(file, requires=rules)
        assert ("".join(found), reader.filtered) == (kept, 3 - len(kept)), rules


def test_a_field_that_is_missing(tmp_path):
    """A line may lack a field, and is left out; a table that does is not what was meant."""
    lines, table = tmp_path / "d.jsonl", tmp_path / "d.parquet"
    lines.write_text('{"text": "a", "lang": "en"}\n{"text": "b"}\n{"other": 1}\n')
    reader, found = read(lines, requires=("lang=en",))
    assert (found, reader.filtered) == (["a"], 2)
    pq.write_table(pa.table({"text": ["a"]}), table)
    with pytest.raises(UserError, match="no column 'lang'; its columns are text: .*--require"):
        read(table, requires=("lang=en",))
    (tmp_path / "e.txt").write_text("plain")
    with pytest.raises(UserError, match="e.txt is plain text and has no fields"):
        read(tmp_path / "e.txt", requires=("lang=en",))
    assert read(tmp_path, requires=("lang=en",), skip_bad_files=True)[1] == ["a"]


def test_what_is_filtered_need_not_be_text(tmp_path):
    file = tmp_path / "d.jsonl"
    file.write_text('{"text": 3, "lang": "de"}\n{"text": "b", "lang": "en"}\n')
    assert read(file, requires=("lang=en",))[1] == ["b"]


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (b"en", "en"),
        (np.int64(3), "3"),
        (np.float32(0.5), "0.5"),
        (np.bool_(True), "true"),
        (Decimal("1.10"), "1.10"),
        (Decimal("1.5"), "1.50"),
        ({"a": 1}, '{"a": 1}'),
    ],
)
def test_values_of_tables(value, wanted):
    assert is_value(value, wanted)
    assert not is_value(value, "other")


def test_dates_are_as_python_prints_them(tmp_path):
    file = tmp_path / "d.parquet"
    day = datetime.date(2024, 2, 29)
    late = pa.array([1 << 48, 0], pa.timestamp("s"))  # of which Python has no such year
    pq.write_table(pa.table({"text": ["a", "b"], "day": [day, None], "late": late}), file)
    assert read(file, requires=("day=2024-02-29",))[1] == ["a"]
    with pytest.raises(UserError, match="d.parquet: row 1 has .*--skip-bad-files"):
        read(file, requires=("late=1970-01-01 00:00:00",))
    reader, found = read(file, requires=("late=1970-01-01 00:00:00",), skip_bad_files=True)
    assert (found, reader.skipped) == (["b"], 1)


def test_many_bad_lines_are_counted_and_few_are_named(tmp_path, monkeypatch):
    """To name a line the file is read up to it, which for each of many would take for ever."""
    file = tmp_path / "d.jsonl"
    file.write_text("no\n" * 500 + '{"text": "good"}\n')
    counted, count = [], reading.line_number
    monkeypatch.setattr(
        reading, "line_number", lambda *given: counted.append(given) or count(*given)
    )
    reader, found = read(file, skip_bad_files=True)
    assert (found, reader.skipped, len(counted)) == (["good"], 500, NAMED_SKIPS)
    assert reader.skipped_names == [f"{file}:{n + 1}" for n in range(NAMED_SKIPS)]


def test_where_damage_begins_is_said(tmp_path):
    file = tmp_path / "d.jsonl.gz"
    lines = "".join(json.dumps({"text": f"{n} " * 50}) + "\n" for n in range(500))
    file.write_bytes(gzip.compress(lines.encode())[:-4])
    with pytest.raises(UserError, match=r"d.jsonl.gz is damaged after \S+jsonl.gz:500, or no f"):
        read(file)


MEASURED = """
import sys
from pathlib import Path
from layerskip_jax.data.prepare import prepare
from tests.data.conftest import small_request
changes = {"skip_bad_files": True, "sequence_length": 512, "validation_fraction": 0.01}
manifest = prepare(small_request(sys.argv[1], **changes), Path(sys.argv[2]))
documents = manifest.train.documents + manifest.validation.documents
# What `getrusage` says begins with the parent's.
[peak] = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(documents, manifest.skipped_files, int(peak.split()[1]) >> 10)
"""


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["", ".gz"])
def test_memory_does_not_grow_with_what_is_read(tmp_path, packing):
    """Neither with very many and very short documents, nor with one that is too long."""
    opened = gzip.open if packing else open
    with opened(tmp_path / f"d.jsonl{packing}", "wt") as file:
        for number in range(300_000):
            file.write(f'{{"text": "a tiny document {number}"}}\n')
        file.write(json.dumps({"text": "long " * 40_000_000}) + "\n")
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path / f"d.jsonl{packing}"), str(tmp_path / "o")],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    documents, skipped, megabytes = map(int, done.stdout.split())
    assert (documents, skipped) == (300_000, 1)
    assert megabytes < 450

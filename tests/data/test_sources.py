import bz2
import contextlib
import gzip
import io
import json
import logging
import lzma
import os
import shutil
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from pyarrow import feather

from layerskip_jax.data import sources
from layerskip_jax.data.manifest import PrepareOptions, Shard
from layerskip_jax.data.prepare import find_units
from layerskip_jax.data.reading import DocumentReader
from layerskip_jax.data.records import write_description
from layerskip_jax.data.sources import NOT_LIBRARY, Piece, UnreadableError, find_files
from layerskip_jax.data.units import is_validation
from layerskip_jax.schema import UserError
from tests.stores import s3_store


def read(*named, **options):
    """Returns the reader of all units, and their documents, each with its name."""
    request = PrepareOptions(tuple(map(str, named)), **options)
    reader, found = DocumentReader(request), []
    for unit in find_units(request):
        pieces = list(unit.pieces)
        for document in reader.read(pieces):
            piece = pieces[document.piece]
            found.append((reader.short_name(piece, document.place), document.text))
    return reader, found


def paths(*sources, **options):
    return [name for name, _ in read(*sources, **options)[1]]


@pytest.fixture
def texts(tmp_path):
    for name in ("b.txt", "a.md", "deep/c.py", "deep/d.bin", ".git/e.txt", "blank.txt"):
        file = tmp_path / "texts" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("" if name == "blank.txt" else f"text of {name}")
    return tmp_path / "texts"


def test_a_folder_gives_its_visible_texts_in_order(texts):
    assert paths(texts) == ["a.md", "b.txt", "deep/c.py"]


def test_files_of_other_kinds_are_counted(texts, caplog):
    (texts / "E.TXT").write_text("loud")
    (texts / "f.json").write_text("{}")
    assert paths(texts) == ["E.TXT", "a.md", "b.txt", "deep/c.py"]
    [said] = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "2 files are left out (.json 1, .bin 1)" in said or "(.bin 1, .json 1)" in said
    assert "searched for .txt, .md" in said


def test_a_glob_and_a_file(texts):
    assert paths(f"{texts}/**/*.py") == ["deep/c.py"]
    assert paths(texts / "b.txt") == ["b.txt"]


def test_a_link_to_a_file_of_the_same_folder_is_not_read_again(texts):
    (texts / "link.txt").symlink_to(texts / "b.txt")
    assert paths(texts) == ["a.md", "b.txt", "deep/c.py"]


def test_lines_end_at_newlines_only_and_name_their_field(tmp_path):
    lines = [{"body": "one\u2028still one"}, {"body": " "}, {"body": "two"}]
    file = tmp_path / "d.jsonl"
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    file.write_text("\ufeff" + text + "\n\n", encoding="utf-8")
    places = [0, text.encode().index(b'{"body": "two"') + 3]
    for unit_bytes in (1 << 20, 1, 7):  # whole, and cut at all bytes
        assert read(file, jsonl_field="body", unit_bytes=unit_bytes)[1] == [
            (f"d.jsonl:{places[0]}", "one\u2028still one"),
            (f"d.jsonl:{places[1]}", "two"),
        ]


def test_the_standard_library_comes_without_its_tests():
    files = [Path(found.path) for found in find_files("stdlib")[0]]
    folders = {part for file in files for part in file.parts[:-1]}
    assert Path("json/decoder.py") in files
    assert not folders & NOT_LIBRARY
    assert files == sorted(files)
    assert len(files) > 300


def test_the_split_depends_on_name_and_seed_alone():
    names = [f"file{number}" for number in range(2000)]
    held_out = {name for name in names if is_validation(name, 0, 0.05)}
    assert 60 < len(held_out) < 140
    assert held_out < {name for name in names if is_validation(name, 0, 0.1)}
    assert held_out != {name for name in names if is_validation(name, 1, 0.05)}


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (["{0}/none"], "there is no such file or folder"),
        (["{0}/*.doc"], r"matches no file; a folder is searched for .txt, .md"),
        (["{0}", "{0}"], "names a source twice"),
        (["{0}", "{0}/*.md"], r"a.md is matched by both --source="),
        (["tfds:{0}"], "is no folder or name of a TFDS data set"),
        (["tfds:no_such_name"], "is no folder or name of a TFDS data set"),
    ],
)
def test_sources_that_cannot_work(texts, sources, message):
    with pytest.raises(UserError, match=message):
        paths(*(source.format(texts) for source in sources))


def test_bytes_that_are_not_utf8_are_named_or_skipped(texts):
    (texts / "bad.txt").write_bytes(b"abc\xff")
    with pytest.raises(UserError, match="bad.txt is not UTF-8.* byte 3;.*--skip-bad-files"):
        paths(texts)
    reader, documents = read(texts, skip_bad_files=True)
    assert len(documents) == 3
    assert (reader.skipped, reader.skipped_names) == (1, [str(texts / "bad.txt")])


@pytest.mark.parametrize(
    "line", [b"{", b"[]", b"3", b'{"other": "x"}', b'{"text": 3}', b'{"text": "\\ud800"}']
)
def test_lines_without_text_are_named_or_skipped(tmp_path, line):
    file = tmp_path / "d.jsonl"
    file.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(UserError, match="d.jsonl:2 is no JSON object"):
        paths(file)
    reader, documents = read(file, skip_bad_files=True)
    assert [text for _, text in documents] == ["good"]
    assert reader.skipped_names == [f"{file}:2"]


def test_a_bad_byte_in_a_line_is_counted_from_the_start_of_the_file(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(UserError, match="byte 24"):
        paths(tmp_path / "d.jsonl")


def test_a_file_that_may_not_be_read_is_named(texts):
    (texts / "a.md").chmod(0)
    if os.access(texts / "a.md", os.R_OK):
        pytest.skip("root reads every file")
    with pytest.raises(UserError, match="a.md cannot be read"):
        paths(texts)


def test_a_name_that_is_not_utf_8_is_named(texts):
    """Keys of documents are text, and so is what is printed and written of them."""
    (texts / os.fsdecode(b"a\xff.txt")).write_text("text")
    with pytest.raises(UserError, match=r"a\\xff.txt' has a name that is not UTF-8; rename it, or"):
        read(texts)
    reader, documents = read(texts, skip_bad_files=True)
    assert [name for name, _ in documents] == ["a.md", "b.txt", "deep/c.py"]
    [skipped] = reader.skipped_names
    assert json.dumps(skipped).isascii() and "a\\xff.txt" in skipped


# Every format: how a file or folder is written of texts, or of other columns.

TEXTS = ["one", "zwei\nsecond line é", "", "字 three", "four"]
FOUND = [text for text in TEXTS if text]
PACKINGS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pa.compress(content, "zstd", asbytes=True),
}
LINES = [f"{ending}{packing}" for ending in (".jsonl", ".json") for packing in PACKINGS]


def write_lines(place, values, name="text"):
    written = "".join(json.dumps({"id": 1, name: value}) + "\n" for value in values)
    place.write_bytes(PACKINGS[sources.ending(place.name)[1]](written.encode()))


def table_of(values, name="text", type=None):
    columns = {"id": pa.array(range(len(values)), pa.int64()), name: pa.array(values, type)}
    return pa.table(columns)


def write_parquet(place, values, name="text", type=None):
    table = table_of(values, name, type)
    pq.write_table(table, place, row_group_size=2, write_page_checksum=True, write_statistics=False)


def write_feather(place, values, name="text", type=None):
    feather.write_feather(table_of(values, name, type), place, chunksize=2, compression="lz4")


def write_stream(place, values, name="text", type=None):
    table = table_of(values, name, type)
    with pa.ipc.new_stream(place, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


WRITERS = {
    **dict.fromkeys(LINES, write_lines),
    ".parquet": write_parquet,
    ".feather": write_feather,
    ".arrow": write_stream,
}
TABLES = [".parquet", ".feather", ".arrow"]


def texts_of(*named, **options):
    return [text for _, text in read(*named, **options)[1]]


@pytest.mark.parametrize("packing", PACKINGS)
def test_text_in_every_packing(tmp_path, packing):
    whole = PACKINGS[packing]("\ufeffsome text é\n".encode())
    (tmp_path / f"a.txt{packing}").write_bytes(whole)
    # Two that were put one after the other are one file.
    (tmp_path / f"b.md{packing}").write_bytes(
        PACKINGS[packing](b"first, ") + PACKINGS[packing](b"second")
    )
    assert read(tmp_path)[1] == [
        (f"a.txt{packing}", "some text é\n"),
        (f"b.md{packing}", "first, second"),
    ]


@pytest.mark.parametrize("ending", WRITERS)
def test_every_format_gives_its_texts(tmp_path, ending):
    file = tmp_path / f"d{ending}"
    # Rows without a text, or with a blank one, are no documents.
    WRITERS[ending](file, [TEXTS[0], None, *TEXTS[1:]])
    for unit_bytes in (1, 1 << 20):
        assert texts_of(file, unit_bytes=unit_bytes) == FOUND
    is_bare_json = ending == ".json"
    if not is_bare_json:
        assert texts_of(tmp_path) == texts_of(f"{tmp_path}/*{ending}") == FOUND
    WRITERS[ending](file, [], type=pa.string()) if ending in TABLES else WRITERS[ending](file, [])
    assert texts_of(file) == []


@pytest.mark.parametrize("ending", WRITERS)
def test_what_has_no_text_is_named_or_left_out(tmp_path, ending):
    file, is_table = tmp_path / f"d{ending}", ending in TABLES
    option = "--text-field" if is_table else "--jsonl-field"
    WRITERS[ending](file, TEXTS, name="body")
    field = "text_field" if is_table else "jsonl_field"
    assert texts_of(file, **{field: "body"}) == FOUND
    with pytest.raises(UserError, match=rf"d{ending}.* 'text'.*{option}.*--skip-bad-files"):
        texts_of(file)
    reader, found = read(file, skip_bad_files=True)
    # A table lacks a column as a whole, lines lack a field one by one.
    assert (reader.skipped, found) == (1 if is_table else len(TEXTS), [])
    WRITERS[ending](file, [3, 4])
    place = r": row 1" if is_table else r":1"
    with pytest.raises(UserError, match=rf"d{ending}{place} .*'text' \(int\).*{option}"):
        texts_of(file)
    reader, found = read(file, skip_bad_files=True)
    assert (reader.skipped, found) == (2, [])
    assert reader.skipped_names[1] == f"{file}{': row 2' if is_table else ':2'}"


@pytest.mark.parametrize(
    "ending", [*(f".txt{packing}" for packing in PACKINGS if packing), *WRITERS]
)
@pytest.mark.parametrize("harm", ["cut in half", "cut at the end", "a few bytes", "empty"])
def test_what_is_damaged_is_named_or_left_out(tmp_path, ending, harm):
    """What comes before the damage may be kept; nothing that was not written is ever read."""
    file, good = tmp_path / f"d{ending}", tmp_path / "good.txt"
    good.write_text("good")
    random = np.random.default_rng(0)
    texts = [random.bytes(1500).hex() for _ in range(41)]
    if ending.startswith(".txt"):
        texts = ["".join(texts)]
        file.write_bytes(PACKINGS[sources.ending(file.name)[1]](texts[0].encode()))
    else:
        WRITERS[ending](file, texts)
    content = bytearray(file.read_bytes())
    if harm == "a few bytes":
        for at in range(len(content) // 2, len(content) // 2 + 40):
            content[at] ^= 0xA5
    sizes = {"cut in half": len(content) // 2, "cut at the end": len(content) - 3, "empty": 0}
    file.write_bytes(content[: sizes.get(harm)])
    reader, found = read(file, good, skip_bad_files=True)
    left = [text for _, text in found]
    assert left.pop() == "good"
    packing = sources.ending(file.name)[1]
    if harm == "empty" and (packing in ("", ".gz", ".zst") and ending not in TABLES):
        assert (reader.skipped, left) == (0, [])  # which is a file of no text
        return
    if harm == "a few bytes" and (ending in (".arrow", ".feather") or packing == ".zst"):
        # Nothing here tells the bytes of a text from others: pyarrow's .zst have no checksum.
        assert len(left) + reader.skipped >= len(texts)
        assert sum(text in texts for text in left) >= len(texts) - 4
        return
    assert reader.skipped == 1
    assert left == [text for text in texts if text in left]
    # Of what is packed, nothing is kept that its checksum may deny.
    assert left == [] or not (packing or ending.startswith(".txt"))
    with pytest.raises(UserError, match=rf"d{ending}\S* .*, or pass --skip-bad-files"):
        read(file, good)


def test_lines_are_cut_anywhere(tmp_path):
    """Each line comes once, whichever piece it begins in."""
    random = np.random.default_rng(0)
    for number in range(12):
        lines = [
            json.dumps({"text": "é" * int(length)}, ensure_ascii=False)
            for length in random.choice([1, 2, 9, 40], size=12)
        ]
        written = "\n".join(lines) + "\n" * int(random.integers(0, 3))
        file = tmp_path / f"{number}.jsonl"
        file.write_text(written, "utf-8")
        whole = read(file)[1]
        assert len(whole) == 12
        for size in random.integers(1, len(written), 4):
            assert read(file, unit_bytes=int(size))[1] == whole


def test_a_long_line_is_passed_by_once(tmp_path, monkeypatch):
    """The pieces in the middle of a line do not each read to its end."""
    file = tmp_path / "d.jsonl"
    file.write_text(json.dumps({"text": "x" * 100_000}) + '\n{"text": "last"}\n')
    passed, pass_line = [], sources._pass_line
    monkeypatch.setattr(
        sources, "_pass_line", lambda *given: passed.append(pass_line(*given)) or passed[-1]
    )
    for most, found in ((200_000, 2), (50, 1)):
        passed.clear()
        reader, documents = read(
            file, unit_bytes=1000, max_document_bytes=most, skip_bad_files=True
        )
        assert (len(documents), reader.skipped) == (found, 2 - found)
        assert documents[-1][1] == "last"
        assert sum(passed) < 3 * file.stat().st_size


@pytest.mark.parametrize("ending", [".txt", ".txt.gz", *WRITERS])
def test_what_is_too_long_is_named_or_left_out(tmp_path, ending):
    file, texts = tmp_path / f"d{ending}", ["a" * 999, "b" * 2000, "ccc"]
    if ending.startswith(".txt"):
        texts = [texts[1]]
        file.write_bytes(PACKINGS[sources.ending(file.name)[1]](texts[0].encode()))
    else:
        WRITERS[ending](file, texts)
    where = "" if ending.startswith(".txt") else ": row 2" if ending in TABLES else ":2"
    with pytest.raises(UserError, match=rf"d{ending}{where} is a \w+ of .*--max-document-bytes=15"):
        texts_of(file, max_document_bytes=1500)
    reader, found = read(file, max_document_bytes=1500, skip_bad_files=True)
    assert reader.skipped_names == [f"{file}{where}"]
    assert [text for _, text in found] == [text for text in texts if len(text) < 1500]
    assert texts_of(file, max_document_bytes=3000) == texts


def test_bytes_that_are_no_text_are_found_by_row(tmp_path):
    bad = pa.array([b"good", b"ab\xff", None, b"more"], pa.binary())
    as_text = pa.Array.from_buffers(pa.string(), 4, bad.buffers())
    dictionary = pa.DictionaryArray.from_arrays(
        pa.array([0, 1, None, 2], pa.int32()),
        pa.Array.from_buffers(pa.string(), 3, pa.array([b"good", b"ab\xff", b"more"]).buffers()),
    )
    for number, column in enumerate((bad, as_text, dictionary)):
        for ending in TABLES:
            file = tmp_path / f"{number}{ending}"
            table = pa.table({"text": column})
            if ending == ".parquet":
                pq.write_table(table, file)
            else:
                with pa.ipc.new_file(file, table.schema) as writer:
                    writer.write_table(table)
            with pytest.raises(UserError, match=rf"{number}{ending}: row 2 is not UTF-8.*byte 2;"):
                texts_of(file)
            reader, found = read(file, skip_bad_files=True)
            assert (reader.skipped, [text for _, text in found]) == (1, ["good", "more"])


@pytest.mark.parametrize(
    "type",
    [
        pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view(),
        pa.dictionary(pa.int32(), pa.string()), pa.dictionary(pa.int8(), pa.large_string()),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("ending", TABLES)
def test_text_of_every_arrow_type(tmp_path, ending, type):
    file, texts = tmp_path / f"d{ending}", [*FOUND, None, "x" * 5000, *FOUND]
    if "binary" in str(type):
        values = [text if text is None else text.encode() for text in texts]
    else:
        values = texts
    WRITERS[ending](file, values, type=type)
    assert texts_of(file) == [text for text in texts if text]
    _, found = read(file, max_document_bytes=4000, skip_bad_files=True)
    assert [text for _, text in found] == [*FOUND, *FOUND]


def test_other_columns_of_a_parquet_file_are_not_read(tmp_path):
    file = tmp_path / "d.parquet"
    table = pa.table(
        {
            "noise": [os.urandom(4000) for _ in range(50)],
            "meta": [{"url": f"u{n}", "tags": ["a", "b"]} for n in range(50)],
            "a.b": [f"dotted {n}" for n in range(50)],
            "text": [f"text {n}" for n in range(50)],
        }
    )
    pq.write_table(table, file, row_group_size=7, compression="none")
    content = file.read_bytes()
    # Were the noise looked at, its checksum would not fit.
    file.write_bytes(content.replace(table["noise"][30].as_py(), bytes(4000)))
    assert texts_of(file) == [f"text {n}" for n in range(50)]
    assert texts_of(file, text_field="a.b") == [f"dotted {n}" for n in range(50)]
    names = [name for name, _ in read(file, unit_bytes=30_000)[1]]
    assert names == [f"d.parquet:{n}" for n in range(50)]
    with pytest.raises(UserError, match=r"row 1 has no text in its column 'meta' \(dict\)"):
        texts_of(file, text_field="meta")


def test_chats_are_nested_columns(tmp_path):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    write_parquet(tmp_path / "d.parquet", [chat, chat[:1]], name="messages")
    options = {"messages_field": "messages", "chat_template_sha256": "x", "skip_bad_files": True}
    request = PrepareOptions((str(tmp_path),), **options)

    def turns(messages):
        said = [message["content"] for message in messages]
        return [(said[0], said[1])] if len(said) > 1 else []

    reader = DocumentReader(request, turns)
    [unit] = find_units(request)
    [document] = reader.read(list(unit.pieces))
    assert (document.text, document.completions) == ("hiho", ((2, 4),))
    assert reader.skipped_names == [f"{tmp_path}/d.parquet: row 2"]


def test_row_groups_of_a_parquet_file_are_pieces_of_their_own(tmp_path):
    file = tmp_path / "d.parquet"
    texts = [os.urandom(500).hex() for _ in range(40)]
    table = pa.table({"text": texts})
    pq.write_table(table, file, row_group_size=4, write_statistics=False)
    whole = read(file)[1]
    for unit_bytes in (1, 6000, 20_000):
        units = find_units(PrepareOptions((str(file),), unit_bytes=unit_bytes))
        assert len(units) > 1
        # Together about the size of the file, which progress is told by.
        total = sum(piece.bytes for unit in units for piece in unit.pieces)
        assert 0.8 < total / file.stat().st_size <= 1
        assert read(file, unit_bytes=unit_bytes)[1] == whole


def test_a_row_takes_as_many_others_along_as_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "ROW_BYTES_AT_ONCE", 10_000)
    sizes, rows = [], sources._rows
    monkeypatch.setattr(
        sources, "_rows", lambda batch, *given: sizes.append(batch.num_rows) or rows(batch, *given)
    )
    texts = [os.urandom(2500).hex() for _ in range(9)]
    write_parquet(tmp_path / "d.parquet", texts)
    assert texts_of(tmp_path) == texts
    assert max(sizes) <= 2


def test_a_saved_data_set_without_its_caches(tmp_path):
    def saved(texts):
        data = datasets.Dataset.from_dict({"text": texts})
        data.save_to_disk(tmp_path / "set", num_shards=2)
        # What `map` and `filter` leave in the same folder, as `datasets` names it.
        cache = tmp_path / "set" / "cache-0123456789abcdef.arrow"
        data.map(lambda row: {"text": row["text"].upper()}, cache_file_name=str(cache))
        return cache

    datasets.disable_progress_bars()
    cache = saved(["one", "two", "three"])
    assert cache.is_file()
    assert texts_of(tmp_path / "set") == texts_of(tmp_path) == ["one", "two", "three"]
    assert texts_of(f"{tmp_path}/*/*.arrow") == ["one", "two", "three"]
    assert texts_of(f"file://{tmp_path}/set") == ["one", "two", "three"]
    assert texts_of(cache) == ["ONE", "TWO", "THREE"]  # asked for by name
    both = datasets.DatasetDict(
        {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test")}
    )
    both.save_to_disk(tmp_path / "both")
    assert texts_of(tmp_path / "both") == ["test", "train"]
    assert texts_of(tmp_path / "both" / "train") == ["train"]
    (tmp_path / "set" / "data-00001-of-00002.arrow").unlink()
    for source in (tmp_path / "set", f"file://{tmp_path}/set"):
        with pytest.raises(UserError, match="data-00001-of-00002.arrow is missing; save"):
            texts_of(source)
    (tmp_path / "set" / "state.json").write_text("{")
    with pytest.raises(UserError, match="state.json does not tell the files"):
        texts_of(tmp_path / "set")


def test_a_list_of_sources(texts, tmp_path):
    listed = tmp_path / "list"
    listed.write_text(f"\ufeff{texts}/b.txt\r\n\n{texts}/deep\n{texts}/*.md\n{texts}/b.txt\n")
    assert paths(f"@{listed}") == [f"{texts}/b.txt", f"{texts}/deep/c.py", f"{texts}/a.md"]
    with gzip.open(tmp_path / "list.gz", "wt") as file:
        file.write(f"{texts}/b.txt")
    assert paths(f"@{tmp_path}/list.gz") == [f"{texts}/b.txt"]
    for wrong, message in (
        (f"@{tmp_path}/none", "is no list of sources"),
        (f"@{texts}", "is no list of sources"),
        (f"@{listed}", "names @other; give that to --source itself"),
        (f"@{listed}", "names no file"),
        (f"@{listed}", "there is no such file"),
    ):
        named = {"names @other": "@other", "names no": "\n", "there is": "none.txt"}
        listed.write_text(next((v for k, v in named.items() if message.startswith(k)), ""))
        with pytest.raises(UserError, match=message):
            paths(wrong)


def write_tfds(folder, examples, features):
    """Writes a split of two files as TFDS lays it out."""
    folder.mkdir()
    shards = []
    for number, part in enumerate((examples[:2], examples[2:])):
        file = folder / f"train-{number:05d}.array_record"
        writer = ArrayRecordWriter(str(file), "group_size:1")
        for example in part:
            writer.write(features.serialize_example(example))
        writer.close()
        shards.append(Shard(file.name, len(part), file.stat().st_size, ""))
    write_description(folder, "named", features, {"train": tuple(shards)})


def test_tfds_by_slice_and_damage(tmp_path):
    features = tfds.features.FeaturesDict(
        {
            "text": tfds.features.Text(),
            "stars": np.int64,
            "score": np.float32,
            "good": np.bool_,
            "tags": tfds.features.Sequence(tfds.features.Text()),
        }
    )
    examples = [
        {"text": text, "stars": n % 2, "score": n / 10, "good": n < 2, "tags": ["a"]}
        for n, text in enumerate([*TEXTS, "five"])
    ]
    write_tfds(tmp_path / "set", examples, features)
    source = f"tfds:{tmp_path}/set"
    assert texts_of(source) == [*FOUND, "five"]
    assert texts_of(f"{source}:train[1:4]") == [TEXTS[1], TEXTS[3]]
    for rules, wanted in (
        (("stars=1",), [TEXTS[1], TEXTS[3], "five"]),
        (("good=true",), TEXTS[:2]),
        (("good=false", "stars=0"), [TEXTS[4]]),
        (("score=0.5",), ["five"]),
        (("text=four",), ["four"]),
    ):
        assert texts_of(source, requires=rules) == wanted
    for field, kind in (("stars", "int"), ("tags", "list")):
        with pytest.raises(UserError, match=rf": row 1 has no text in its column .* \({kind}\)"):
            texts_of(source, text_field=field)
    file = tmp_path / "set" / "train-00001.array_record"
    content = file.read_bytes()
    for harmed in (content[: len(content) // 2], b"", content[:80] + bytes(200) + content[280:]):
        file.write_bytes(harmed)
        with pytest.raises(UserError, match=r"train-00001.*damaged.*--skip-bad-files"):
            texts_of(source)
        reader, found = read(source, skip_bad_files=True)
        assert [text for _, text in found] == TEXTS[:2]
        assert reader.skipped_names == [str(file)]
    file.unlink()
    with pytest.raises(UserError, match=r"train-00001.array_record"):
        texts_of(source, skip_bad_files=True)


@contextlib.contextmanager
def memory_store():
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    yield "memory://runs"
    filesystem.store.clear()


@pytest.mark.parametrize("store", [memory_store, s3_store], ids=["memory", "s3"])
def test_buckets(tmp_path, store):
    """What lies on a bucket is read as from a disk, whole and in pieces."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for ending in (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".arrow", ".feather"):
        WRITERS[ending](folder / f"d{ending}", [*TEXTS, *(f"{ending} {n}" for n in range(20))])
    for packing in PACKINGS:
        (folder / f"e.txt{packing}").write_bytes(PACKINGS[packing](b"text"))
    (folder / "cut.jsonl.gz").write_bytes((folder / "d.jsonl.gz").read_bytes()[:-20])
    (folder / ".hidden.txt").write_text("hidden")
    (folder / "x.bin").write_text("no text")
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": ["saved"]}).save_to_disk(folder / "saved")
    shutil.copy(folder / "saved" / "data-00000-of-00001.arrow", folder / "saved" / "cache-1.arrow")
    with store() as bucket:
        filesystem, root = fsspec.core.url_to_fs(bucket)
        for file in sorted(folder.rglob("*.*")):
            if file.is_file():
                filesystem.pipe_file(f"{root}/in/{file.relative_to(folder)}", file.read_bytes())
        for source in ("", "/*.jsonl", "/d.parquet", "/**/*.arrow"):
            for unit_bytes in (300, 1 << 20):
                options = {"unit_bytes": unit_bytes, "skip_bad_files": True}
                _, there = read(f"{bucket}/in{source}", **options)
                _, here = read(f"{folder}{source}", **options)
                assert sorted(there) == sorted(here) and here
        with pytest.raises(UserError, match=r"runs/in/cut.jsonl.gz is damaged after \S+:\d+, or"):
            texts_of(f"{bucket}/in/cut.jsonl.gz")
        listed = tmp_path / "list"
        listed.write_text(f"{bucket}/in/e.txt\n")
        assert paths(f"@{listed}") == [filesystem.unstrip_protocol(f"{root}/in/e.txt")]
        for wrong, message in (("none", "no such file or folder"), ("in/*.c", "matches no file")):
            with pytest.raises(UserError, match=message):
                paths(f"{bucket}/{wrong}")
        # What fails on the way says nothing of the file, and is tried again by whoever asked.
        [unit] = find_units(PrepareOptions((f"{bucket}/in/e.txt",)))
        filesystem.rm(f"{root}/in/e.txt")
        with pytest.raises(UnreadableError, match="e.txt: FileNotFoundError"):
            list(DocumentReader(PrepareOptions(skip_bad_files=True)).read(list(unit.pieces)))


def test_a_bucket_that_fails_is_not_taken_for_a_damaged_file(monkeypatch):
    """Nor is what was not read left out in silence."""

    class Failing(io.BytesIO):
        def read(self, *_):
            raise TimeoutError("too slow")

    with memory_store() as bucket:
        filesystem = fsspec.filesystem("memory")
        for ending in (".txt", ".jsonl.gz", ".jsonl.zst", ".parquet", ".arrow"):
            filesystem.pipe_file(f"/runs/d{ending}", bytes(5000))
            monkeypatch.setattr(type(filesystem), "open", lambda *_: Failing(bytes(5000)))
            [found] = find_files(f"{bucket}/d{ending}")[0]
            piece = Piece(*found, found.kind)
            reader = DocumentReader(PrepareOptions(skip_bad_files=True))
            with pytest.raises(UnreadableError, match="TimeoutError: too slow"):
                list(reader.read([piece]))
            monkeypatch.undo()
        monkeypatch.setattr(type(filesystem), "open", lambda *_: Failing(bytes(5000)))
        with pytest.raises(UserError, match="d.parquet cannot be read .*too slow"):
            find_units(PrepareOptions((f"{bucket}/d.parquet",), unit_bytes=10))

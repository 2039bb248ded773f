import json
import os
from pathlib import Path

import pytest

from layerskip_jax.data.manifest import PrepareOptions
from layerskip_jax.data.prepare import find_units
from layerskip_jax.data.reading import DocumentReader
from layerskip_jax.data.sources import NOT_LIBRARY, find_files
from layerskip_jax.data.units import is_validation
from layerskip_jax.schema import UserError


def read(*sources, **options):
    """Returns the reader of all units, and their documents, each with its name."""
    request = PrepareOptions(tuple(map(str, sources)), **options)
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
    [said] = [record.getMessage() for record in caplog.records]
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

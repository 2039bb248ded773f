import json
import os

import pytest

from layerskip_jax.data.corpus import NOT_LIBRARY, CorpusReader, _files, is_validation
from layerskip_jax.data.manifest import PrepareOptions
from layerskip_jax.schema import UserError


def reader_of(*sources, **options):
    return CorpusReader(PrepareOptions(tuple(map(str, sources)), **options))


def paths(*sources, **options):
    return [document.path for document in reader_of(*sources, **options)]


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
    reader = reader_of(texts)
    for _ in range(2):
        assert [d.path for d in reader] == ["E.TXT", "a.md", "b.txt", "deep/c.py"]
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
    documents = reader_of(file, jsonl_field="body")
    assert [(d.path, d.text) for d in documents] == [
        ("d.jsonl:1", "one\u2028still one"),
        ("d.jsonl:3", "two"),
    ]


def test_the_standard_library_comes_without_its_tests():
    root, files, _ = _files("stdlib")
    folders = {part for file in files for part in file.relative_to(root).parts[:-1]}
    assert root / "json" / "decoder.py" in files
    assert not folders & NOT_LIBRARY
    assert files == sorted(files)
    assert len(files) > 300


def test_the_split_depends_on_path_and_seed_alone(texts, tmp_path):
    names = [f"file{number}" for number in range(2000)]
    held_out = {name for name in names if is_validation(name, 0, 0.05)}
    assert 60 < len(held_out) < 140
    assert held_out < {name for name in names if is_validation(name, 0, 0.1)}
    assert held_out != {name for name in names if is_validation(name, 1, 0.05)}
    # A corpus that is moved, or joined by another source, keeps its paths.
    before = paths(texts)
    (tmp_path / "other.txt").write_text("more")
    texts.rename(tmp_path / "moved")
    assert paths(tmp_path / "moved", tmp_path / "other.txt") == [*before, "other.txt"]


def test_max_bytes_draws_whole_documents(corpus_folder):
    documents = reader_of(corpus_folder, max_bytes=3000, seed=1)
    drawn = list(documents)
    total = sum(len(document.text.encode()) for document in drawn)
    assert 2000 < total <= 3000
    assert drawn == list(documents)
    assert drawn != list(reader_of(corpus_folder, max_bytes=3000, seed=2))
    fewer = reader_of(corpus_folder, max_bytes=1500, seed=1)
    assert {d.path for d in fewer} < {d.path for d in drawn}
    with pytest.raises(UserError, match="--max-bytes=3 has no room"):
        list(reader_of(corpus_folder, max_bytes=3))


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
    documents = reader_of(texts, skip_bad_files=True)
    assert len(list(documents)) == 3
    assert documents.skipped == [str(texts / "bad.txt")]


@pytest.mark.parametrize(
    "line", [b"{", b"[]", b"3", b'{"other": "x"}', b'{"text": 3}', b'{"text": "\\ud800"}']
)
def test_lines_without_text_are_named_or_skipped(tmp_path, line):
    file = tmp_path / "d.jsonl"
    file.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(UserError, match="d.jsonl:2 is no JSON object.*--jsonl-field"):
        paths(file)
    documents = reader_of(file, skip_bad_files=True)
    assert [document.text for document in documents] == ["good"]
    assert documents.skipped == [f"{file}:2"]


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
        list(reader_of(texts))
    documents = reader_of(texts, skip_bad_files=True)
    assert [document.path for document in documents] == ["a.md", "b.txt", "deep/c.py"]
    [skipped] = documents.skipped
    assert json.dumps(skipped).isascii() and "a\\xff.txt" in skipped

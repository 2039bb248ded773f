"""Where documents lie: files of text, of lines and of tables, on a disk or a bucket, and TFDS sets.

A source is a folder, a glob, a file, `@LIST` (a file that names a source a line), `stdlib`, or
`tfds:NAME_OR_FOLDER[:SPLIT]`; folders, globs and files may be addresses that fsspec knows (`gs://`,
`s3://`, `hf://`). A file is cut into pieces that can be read by themselves, each a few row groups
of a parquet file, a range of a file of lines, or the whole of any other.
"""

import bz2
import collections
import contextlib
import dataclasses
import glob
import gzip
import io
import itertools
import json
import lzma
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from layerskip_jax.data.manifest import STANDARD_LIBRARY
from layerskip_jax.run_folder.object_store import is_remote
from layerskip_jax.schema import UserError

TFDS_PREFIX, LIST_PREFIX = "tfds:", "@"
# Tests, generated caches and installed packages are no part of the library's own source.
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
# What `datasets` writes beside the arrow files of a data set that it saves to a disk.
SAVED_STATE = "state.json"
# Of a table that are taken apart at once, and so held in memory: fewer where they are long.
ROWS_AT_ONCE, ROW_BYTES_AT_ONCE = 4096, 16 << 20
# What file systems say of a file that another one in its place would say otherwise.
CHANGES = ("etag", "ETag", "md5Hash", "blob_id", "mtime", "LastModified", "created")
BUFFER_BYTES = 4 << 20  # of a column of a table, or of a bucket, that are read in one go
LISTED_AT_ONCE = 16  # files that are looked into at the same time, which takes long on a bucket


def _zstd(file: io.BufferedIOBase) -> io.BufferedIOBase:
    """Opens a Zstandard stream of any number of frames; Python's library has none before 3.14."""
    stream = pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd")
    return io.BufferedReader(_Raw(stream), 1 << 17)


class _Raw(io.RawIOBase):
    """A stream of pyarrow as Python's own readers want it."""

    def __init__(self, stream: pa.NativeFile):
        super().__init__()
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        return self._stream.readinto(buffer)


class UnreadableError(Exception):
    """A file of a bucket could not be read just now, which says nothing of what it holds."""


class _Remote(io.RawIOBase):
    """A file of fsspec as Python's own readers want it, whose errors are never taken for damage."""

    def __init__(self, url: str):
        super().__init__()
        self._url, self._file = url, None
        with self._explained():
            filesystem, path = fsspec.core.url_to_fs(url)
            self._file = filesystem.open(path, "rb")

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # each package raises kinds of its own
            raise UnreadableError(f"{self._url}: {type(error).__name__}: {error}") from error

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with self._explained():
            return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer) -> int:
        with self._explained():
            read = self._file.read(len(buffer))
        buffer[: len(read)] = read
        return len(read)

    def close(self) -> None:
        if self._file is not None and not self.closed:
            self._file.close()
        super().close()


COMPRESSIONS: dict[str, Callable[[io.BufferedIOBase], io.BufferedIOBase]] = {
    ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _zstd,
}  # fmt: skip
# What a damaged file raises where it is taken apart. The system's own errors have a number.
DAMAGE = (EOFError, OSError, lzma.LZMAError, zlib.error, pa.ArrowException)


@dataclasses.dataclass(frozen=True)
class Piece:
    """What is read of a file, or of a shard of a TFDS data set.

    Attributes:
      path: of the file, relative to its source.
      url: where it is.
      size: bytes of the whole file.
      version: what the file system says of its last change, by which a changed file is told.
      kind: how it is read, a key of `FORMATS`.
      begin: the first byte of a range of lines, row group of a parquet file or example of TFDS.
      end: what follows the last one; -1 is the end of the file.
      about: the folder of a TFDS data set.
      bytes: about how many of the file are read.
    """

    path: str
    url: str
    size: int
    version: str
    kind: str
    begin: int = 0
    end: int = -1
    about: str = ""
    bytes: int = 0


def is_plain(piece: Piece) -> bool:
    """Returns whether the bytes of a file are those of its text, or of its lines."""
    return piece.kind in ("text", "lines") and not ending(piece.url)[1]


class Row(NamedTuple):
    """One record of a file.

    Attributes:
      place: the byte where a line begins, once unpacked; the number of a table's row, from 0.
      value: bytes of a text or a line, or the fields of a row, or the error of what is none.
    """

    place: int
    value: Any


class Format(NamedTuple):
    """How one kind of file is read.

    Attributes:
      rows: yields the rows of a piece, given the fields that are wanted and the most bytes of one.
      cut: yields begin, end and bytes of each piece of a file.
      has_fields: whether a row has fields beside its text.
      packed: whether files may be compressed as a whole.
    """

    rows: Callable[[Piece, tuple[str, ...], int], Iterator[Row]]
    cut: Callable[["Found", int], Iterator[tuple[int, int, int]]]
    has_fields: bool = True
    packed: bool = True


class Found(NamedTuple):
    """A file of a source."""

    path: str
    url: str
    size: int
    version: str

    @property
    def kind(self) -> str:
        """The key of `FORMATS`; text, where the ending says nothing."""
        return ENDINGS.get(ending(self.url)[0], "text")


class TooLongError(Exception):
    """A text has more bytes than may be held at once."""


@contextlib.contextmanager
def opened(url: str, *, unpack: bool = True) -> Iterator[io.BufferedIOBase]:
    """Opens a file anywhere, and what it holds where it is compressed."""
    if is_remote(url):
        # fsspec's own files read lines by their own rules.
        file = io.BufferedReader(_Remote(url), 1 << 17)
    else:
        file = Path(url).open("rb")
    with file:
        packing = COMPRESSIONS.get(PurePosixPath(url).suffix.lower()) if unpack else None
        if packing is None:
            yield file
        else:
            with packing(file) as unpacked:
                yield unpacked


def _text(piece: Piece, fields: tuple[str, ...], most: int) -> Iterator[Row]:
    with opened(piece.url) as file:
        content = file.read(most + 1)
        if len(content) > most:
            raise TooLongError(piece.url)
        yield Row(0, content)


def _lines(piece: Piece, fields: tuple[str, ...], most: int) -> Iterator[Row]:
    """Yields the lines that begin in the piece, which end at newlines only, as JSON has it."""
    place = piece.begin
    with opened(piece.url) as file:
        if piece.begin:
            # The line that the byte before belongs to began in an earlier piece.
            file.seek(piece.begin - 1)
            place += _pass_line(file, piece.end - place + 1 if piece.end >= 0 else -1) - 1
        while piece.end < 0 or place < piece.end:
            line = file.readline(most + 1)
            if not line:
                return
            length = len(line)
            if length > most and not line.endswith(b"\n"):
                length += _pass_line(file, piece.end - place if piece.end >= 0 else -1)
                yield Row(place, TooLongError())
            else:
                yield Row(place, line)
            place += length


def _pass_line(file: io.BufferedIOBase, enough: int) -> int:
    """Reads to the end of a line, and returns how many bytes that was.

    Of a line that goes on beyond `enough` bytes, what follows belongs to other pieces; -1 is no
    such place.
    """
    passed = 0
    while part := file.readline(1 << 20 if enough < 0 else min(enough - passed, 1 << 20)):
        passed += len(part)
        if part.endswith(b"\n"):
            break
    return passed


def check_packed(piece: Piece) -> None:
    """Unpacks a packed file to its end, where most have the checksum of what they hold.

    Raises:
      one of `DAMAGE`: it is damaged.
    """
    if ending(piece.url)[1]:
        with opened(piece.url) as file:
            while file.read(1 << 20):
                pass


def _wanted(names: list[str], fields: tuple[str, ...]) -> list[str]:
    missing = [field for field in fields if field not in names]
    if missing:
        raise MissingFieldError(missing[0], names)
    return list(fields)


class MissingFieldError(Exception):
    """A table has no such column."""

    def __init__(self, field: str, names: list[str]):
        super().__init__(field, names)
        self.field, self.names = field, names


def _parquet(piece: Piece, fields: tuple[str, ...], most: int) -> Iterator[Row]:
    with opened(piece.url, unpack=False) as file:
        table = pq.ParquetFile(file, buffer_size=BUFFER_BYTES, page_checksum_verification=True)
        columns = _wanted(table.schema_arrow.names, fields)
        end = table.num_row_groups if piece.end < 0 else piece.end
        counts = [table.metadata.row_group(i).num_rows for i in range(end)]
        number = sum(counts[: piece.begin])
        # Group by group, so that what a file holds is never in memory at once.
        for group in range(piece.begin, end):
            batches = table.iter_batches(
                _rows_at_once(table.metadata.row_group(group), columns),
                row_groups=[group], columns=columns, use_threads=False,
            )  # fmt: skip
            for batch in batches:
                yield from _rows(batch, columns, number, most)
                number += batch.num_rows


def _rows_at_once(group: pq.RowGroupMetaData, columns: list[str]) -> int:
    chunks = map(group.column, range(group.num_columns))
    size = sum(
        chunk.total_uncompressed_size
        for chunk in chunks
        if chunk.path_in_schema.partition(".")[0] in columns or chunk.path_in_schema in columns
    )
    return min(max(ROW_BYTES_AT_ONCE * group.num_rows // max(size, 1), 1), ROWS_AT_ONCE)


# Text as bytes, so that what is no UTF-8 is found where it is.
_AS_BYTES = {
    pa.string(): pa.binary(), pa.large_string(): pa.large_binary(),
    pa.string_view(): pa.binary_view(),
}  # fmt: skip


def _as_bytes(column: pa.Array) -> pa.Array:
    as_bytes = _AS_BYTES.get(column.type)
    return column if as_bytes is None else column.view(as_bytes)


def _rows(batch: pa.RecordBatch, names: list[str], number: int, most: int) -> Iterator[Row]:
    """Yields the rows of a part of a table, made one by one, as they may be long.

    Args:
      batch: the part.
      names: of the columns that are wanted.
      number: of its first row in the table.
      most: bytes of a text.

    Raises:
      pa.ArrowException: it is damaged.
    """
    columns, too_long = [], set()
    for name in names:
        column = batch.column(batch.schema.names.index(name))
        if pa.types.is_dictionary(column.type):
            values = _as_bytes(column.dictionary)
            column = pa.DictionaryArray.from_arrays(column.indices, values, safe=False)
        column = _as_bytes(column)
        column.validate(full=True)
        if column.type in (pa.binary(), pa.large_binary()) and column.nbytes > most:
            lengths = pc.binary_length(column).fill_null(0).to_numpy(zero_copy_only=False)
            too_long |= set((lengths > most).nonzero()[0].tolist())
        columns.append(column)
    for at in range(batch.num_rows):
        try:
            if at in too_long:
                raise TooLongError()
            values: Any = {
                name: column[at].as_py() for name, column in zip(names, columns, strict=True)
            }
        except (TooLongError, ValueError, OverflowError) as error:
            values = error
        yield Row(number + at, values)


def _arrow(piece: Piece, fields: tuple[str, ...], most: int) -> Iterator[Row]:
    number = 0
    with opened(piece.url, unpack=False) as file:
        start = file.read(6)
        file.seek(0)
        if start == b"ARROW1":
            reader = pa.ipc.open_file(file)
            batches = map(reader.get_batch, range(reader.num_record_batches))
        else:
            reader = batches = pa.ipc.open_stream(file)
        columns = _wanted(reader.schema.names, fields)
        for batch in batches:
            yield from _rows(batch, columns, number, most)
            number += batch.num_rows


def _tfds(piece: Piece, fields: tuple[str, ...], most: int) -> Iterator[Row]:
    from layerskip_jax.data import tfds_sources

    names, rows = tfds_sources.examples(piece.url, piece.about, piece.begin, piece.end)
    _wanted(names, fields)
    for place, row in rows:
        yield Row(place, row)


def _whole(file: Found, most: int) -> Iterator[tuple[int, int, int]]:
    yield 0, -1, file.size


def _ranges(file: Found, most: int) -> Iterator[tuple[int, int, int]]:
    """Cuts a file of lines into ranges of bytes, which a compressed one has none of."""
    if ending(file.url)[1]:
        yield 0, -1, file.size
        return
    count = max(-(-file.size // most), 1)
    for number in range(count):
        begin = number * most
        yield begin, -1 if number == count - 1 else begin + most, min(most, file.size - begin)


def _row_groups(file: Found, most: int) -> Iterator[tuple[int, int, int]]:
    if file.size <= most:
        yield 0, -1, file.size
        return
    try:
        with opened(file.url, unpack=False) as stream:
            metadata = pq.ParquetFile(stream).metadata
            sizes = [
                sum(group.column(c).total_compressed_size for c in range(group.num_columns))
                for group in map(metadata.row_group, range(metadata.num_row_groups))
            ]
    except (*DAMAGE, UnreadableError) as error:
        if isinstance(error, UnreadableError) or (isinstance(error, OSError) and error.errno):
            raise UserError(f"{file.url} cannot be read ({error})") from error
        yield 0, -1, file.size  # whoever reads it says what is wrong
        return
    begin, total = 0, 0
    for number, size in enumerate(sizes):
        if total and total + size > most:
            yield begin, number, total
            begin, total = number, 0
        total += size
    yield begin, len(sizes), total


# How each kind of file is read, and what its names end with.
FORMATS = {
    "text": Format(_text, _whole, has_fields=False),
    "lines": Format(_lines, _ranges),
    "parquet": Format(_parquet, _row_groups, packed=False),
    "arrow": Format(_arrow, _whole, packed=False),
    "tfds": Format(_tfds, _whole, packed=False),
}
ENDINGS = {
    **dict.fromkeys((".txt", ".md", ".rst", ".py"), "text"),
    ".jsonl": "lines",
    ".json": "lines",
    ".parquet": "parquet",
    **dict.fromkeys((".arrow", ".feather"), "arrow"),
}
# A bare .json may be anything, such as some program's settings.
ONLY_BY_NAME = {".json"}


def ending(name: str) -> tuple[str, str]:
    """Returns the ending that tells the kind of a file, and that of its compression or ""."""
    path = PurePosixPath(name.lower())
    packing = path.suffix if path.suffix in COMPRESSIONS else ""
    return PurePosixPath(path.stem).suffix if packing else path.suffix, packing


def _is_searched(name: str, with_fields: bool) -> bool:
    kind, packing = ending(name)
    if kind not in ENDINGS or (kind in ONLY_BY_NAME and not packing):
        return False
    how = FORMATS[ENDINGS[kind]]
    return (how.packed or not packing) and (how.has_fields or not with_fields)


def searched_endings(with_fields: bool = False) -> str:
    """Returns what a folder is searched for, in words."""
    plain = [
        end
        for end, kind in ENDINGS.items()
        if end not in ONLY_BY_NAME and (FORMATS[kind].has_fields or not with_fields)
    ]
    return f"{', '.join(plain)}, those of text and lines also with {', '.join(COMPRESSIONS)}"


def pieces(found: list[Found], most: int) -> Iterator[Piece]:
    """Yields what is read by itself of each file.

    Args:
      found: files of one source.
      most: bytes of a piece that can be cut otherwise.
    """

    def cut(file: Found) -> list[Piece]:
        return [
            Piece(*file, file.kind, begin, end, bytes=size)
            for begin, end, size in FORMATS[file.kind].cut(file, most)
        ]

    with ThreadPoolExecutor(LISTED_AT_ONCE) as pool:
        yield from itertools.chain.from_iterable(pool.map(cut, found))


def find_files(
    source: str, *, with_fields: bool = False
) -> tuple[list[Found], collections.Counter[str]]:
    """Returns the files of a source, by path, and the endings of those that are left out.

    Args:
      source: anything but a TFDS data set.
      with_fields: whether a folder is searched only for what has fields beside its text.

    Raises:
      UserError: there is nothing, or it cannot be looked at.
    """
    if source == STANDARD_LIBRARY:
        root = Path(sysconfig.get_path("stdlib"))
        files = [
            file
            for file in root.rglob("*.py")
            if not NOT_LIBRARY.intersection(file.relative_to(root).parts[:-1])
        ]
        return _local(root, files), collections.Counter()
    if source.startswith(LIST_PREFIX):
        return _listed(source, with_fields)
    find = _remote_files if is_remote(source) else _local_files
    found, others = find(source, with_fields)
    if not found:
        raise UserError(
            f"--source={source} matches no file; a folder is searched for "
            f"{searched_endings(with_fields)}"
        )
    return found, others


def _listed(source: str, with_fields: bool) -> tuple[list[Found], collections.Counter[str]]:
    name = source.removeprefix(LIST_PREFIX)
    try:
        with opened(name) as file:
            names = [line.strip() for line in file.read().decode("utf-8-sig").split("\n")]
    except (*DAMAGE, UnreadableError, UnicodeDecodeError) as error:
        raise UserError(f"--source={source}: {name} is no list of sources ({error})") from error
    result: dict[str, Found] = {}
    others: collections.Counter[str] = collections.Counter()
    for name in filter(None, names):
        if name.startswith((LIST_PREFIX, TFDS_PREFIX)) or name == STANDARD_LIBRARY:
            raise UserError(f"--source={source} names {name}; give that to --source itself")
        found, rest = find_files(name, with_fields=with_fields)
        others += rest
        for one in found:
            result.setdefault(one.url, one._replace(path=one.url))
    if not result:
        raise UserError(f"--source={source} names no file")
    return list(result.values()), others


def _local_files(source: str, with_fields: bool) -> tuple[list[Found], collections.Counter[str]]:
    path = Path(source)
    others: collections.Counter[str] = collections.Counter()
    if path.is_dir():
        # Like a glob, this passes by what is hidden, such as .git or .venv.
        names = glob.glob("**", root_dir=path, recursive=True)
        root, files = path, [path / name for name in names if (path / name).is_file()]
        rest = [file for file in files if not _is_searched(file.name, with_fields)]
        others.update(file.suffix or "no suffix" for file in rest)
        files = [file for file in files if _is_searched(file.name, with_fields)]
    elif path.is_file():
        return _local(path.parent, [path]), others
    elif glob.has_magic(source):
        plain = itertools.takewhile(lambda part: not glob.has_magic(part), path.parts)
        root = Path(*plain)
        files = [Path(f) for f in glob.glob(source, recursive=True) if Path(f).is_file()]
    else:
        raise UserError(f"--source={source}: there is no such file or folder")
    return _without_caches(_local(root, files), path.is_dir()), others


def _without_caches(found: list[Found], all_wanted: bool) -> list[Found]:
    """Leaves out the caches that `datasets` writes beside the files of a data set that it saves.

    Raises:
      UserError: the list of these files is damaged, or one of them is missing where all are wanted.
    """
    files = [file for file in found if file.kind == "arrow"]
    folders = dict.fromkeys(_folder(file) for file in files)
    saved = {folder: _saved_files(f"{folder}/{SAVED_STATE}") for folder in folders}
    if all_wanted:
        there = {file.url for file in files}
        for folder, names in saved.items():
            for name in sorted(names or ()):
                if f"{folder}/{name}" not in there:
                    raise UserError(f"{folder}/{name} is missing; save the data set again")
    return [
        file
        for file in found
        if file.kind != "arrow"
        or (names := saved[_folder(file)]) is None
        or PurePosixPath(file.url).name in names
    ]


def _folder(file: Found) -> str:
    return file.url.rpartition("/")[0] or "."


def _saved_files(state: str) -> set[str] | None:
    """Returns the arrow files of a data set that `datasets` saved; None where it did not."""
    if is_remote(state):
        filesystem, path = fsspec.core.url_to_fs(state)
        there = filesystem.exists(path)
    else:
        there = Path(state).is_file()
    if not there:
        return None
    try:
        with opened(state) as file:
            listed = json.load(file)
        return {entry["filename"] for entry in listed["_data_files"]}
    except (UnreadableError, OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{state} does not tell the files of a saved data set ({error}); save it again, or "
            "name its files one by one"
        ) from error


def _local(root: Path, files: list[Path]) -> list[Found]:
    result, seen = [], set()
    for file in sorted(files):
        real = file.resolve()
        if real in seen:  # a link to another file of the same source
            continue
        seen.add(real)
        stat = file.stat()
        found = Found(str(file.relative_to(root)), str(file), stat.st_size, str(stat.st_mtime_ns))
        result.append(found)
    return result


def _remote_files(source: str, with_fields: bool) -> tuple[list[Found], collections.Counter[str]]:
    """Lists a folder, glob or file of any file system that fsspec knows."""
    others: collections.Counter[str] = collections.Counter()
    is_folder = is_file = False
    try:
        filesystem, path = fsspec.core.url_to_fs(source)
        if glob.has_magic(path):
            listed = filesystem.glob(path, detail=True)
            parts = PurePosixPath(path).parts
            root = str(PurePosixPath(*itertools.takewhile(lambda p: not glob.has_magic(p), parts)))
        elif filesystem.isdir(path):
            is_folder = True
            root, listed = path.rstrip("/"), filesystem.find(path, detail=True)
        elif filesystem.exists(path):
            is_file = True
            root, listed = str(PurePosixPath(path).parent), {path: filesystem.info(path)}
        else:
            raise UserError(f"--source={source}: there is no such file or folder")
    except (ImportError, ValueError) as error:
        raise UserError(f"--source={source} cannot be opened: {error}") from error
    except UserError:
        raise
    except Exception as error:  # each package raises kinds of its own
        raise UserError(
            f"--source={source} cannot be listed ({type(error).__name__}: {error}); check its "
            "name, the credentials of this machine, and the network"
        ) from error
    found = []
    for name, info in sorted(listed.items()):
        relative = str(PurePosixPath(name).relative_to(root))
        if info["type"] != "file" or any(p.startswith(".") for p in PurePosixPath(relative).parts):
            continue
        if is_folder and not _is_searched(name, with_fields):
            others[PurePosixPath(name).suffix or "no suffix"] += 1
            continue
        version = str(next((info[key] for key in CHANGES if info.get(key)), ""))
        url = filesystem.unstrip_protocol(name)
        found.append(Found(relative, url, int(info["size"] or 0), version))
    return found if is_file else _without_caches(found, is_folder), others

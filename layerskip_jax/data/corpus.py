"""Text on disk as a TFDS data set of documents, split by document.

A document is a file, a line of a `.jsonl` file, or an example of a TFDS data set. Reading
and writing need no TensorFlow: TFDS writes ArrayRecord and reads it back as a data source.
"""

import glob
import hashlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import tensorflow_datasets as tfds

from layerskip_jax.schema import UserError

EXTENSIONS = (".txt", ".md", ".rst", ".py", ".jsonl")
STANDARD_LIBRARY = "stdlib"
TFDS_PREFIX = "tfds:"
# Tests, generated caches and installed packages are no part of the library's own source.
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class Document(NamedTuple):
    """A text and the name it is known by: its path, with the line or example number."""

    name: str
    text: str


class CorpusReader:
    """Reads the documents of several sources, in a fixed order.

    Attributes:
      skipped: names of the files left out because they are not UTF-8 text.
    """

    def __init__(
        self,
        sources: tuple[str, ...],
        *,
        text_field: str = "text",
        skip_bad_files: bool = False,
    ):
        """Takes sources as `layerskip prepare --source` has them; nothing is read yet."""
        if len(set(sources)) < len(sources):
            raise UserError(f"--source: {', '.join(sources)} names a source twice")
        self._sources = sources
        self._text_field = text_field
        self._skip_bad_files = skip_bad_files
        self.skipped: list[str] = []

    def __iter__(self) -> Iterator[Document]:
        """Yields every document that is not empty.

        Raises:
          UserError: a source that does not exist or matches nothing, or a bad file.
        """
        self.skipped = []
        for source in self._sources:
            if source.startswith(TFDS_PREFIX):
                yield from self._dataset(source.removeprefix(TFDS_PREFIX))
            else:
                root, files = _files(source)
                # Names tell documents of several sources apart, and do not move with a
                # single one.
                prefix = f"{source}:" if len(self._sources) > 1 else ""
                for file in files:
                    yield from self._file(prefix + str(file.relative_to(root)), file)

    def _file(self, name: str, file: Path) -> Iterator[Document]:
        try:
            text = file.read_bytes().decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            if self._skip_bad_files:
                self.skipped.append(name)
                return
            where = f" at byte {error.start}" if isinstance(error, UnicodeDecodeError) else ""
            raise UserError(
                f"{file} cannot be read as UTF-8 text{where} ({error}); convert it, leave it "
                "out, or pass --skip-bad-files"
            ) from error
        if file.suffix != ".jsonl":
            if text.strip():
                yield Document(name, text)
            return
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                yield from self._json_line(f"{name}:{number}", line)

    def _json_line(self, name: str, line: str) -> Iterator[Document]:
        try:
            text = json.loads(line)[self._text_field]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            if self._skip_bad_files:
                self.skipped.append(name)
                return
            raise UserError(
                f"{name} is no JSON object with a field {self._text_field!r} ({error!r}); name "
                "the field with --text-field, or pass --skip-bad-files"
            ) from error
        if text.strip():
            yield Document(name, text)

    def _dataset(self, source: str) -> Iterator[Document]:
        folder, _, split = source.partition("@")
        split = split or "train"
        try:
            examples = tfds.builder_from_directory(folder).as_data_source(split=split)
        except Exception as error:  # TFDS raises many kinds, all about what was asked for
            raise UserError(
                f"--source={TFDS_PREFIX}{source}: no TFDS data set in array_record format with "
                f"split {split!r} in {folder} ({error})"
            ) from error
        for number, example in enumerate(examples):
            if self._text_field not in example:
                raise UserError(
                    f"--source={TFDS_PREFIX}{source} has no field {self._text_field!r}; it has "
                    f"{', '.join(sorted(example))}; name one with --text-field"
                )
            text = example[self._text_field].decode("utf-8")
            if text.strip():
                yield Document(f"{folder}@{split}:{number}", text)


def _files(source: str) -> tuple[Path, list[Path]]:
    """Returns the folder that names are relative to, and the files, sorted."""
    if source == STANDARD_LIBRARY:
        root = Path(sysconfig.get_path("stdlib"))
        files = [
            file
            for file in root.rglob("*.py")
            if not NOT_LIBRARY.intersection(file.relative_to(root).parts[:-1])
        ]
        return root, sorted(files)
    path = Path(source)
    if path.is_dir():
        root, files = path, [f for f in path.rglob("*") if f.suffix in EXTENSIONS and f.is_file()]
    elif path.is_file():
        root, files = path.parent, [path]
    else:
        root = Path(path.anchor)
        files = [Path(f) for f in glob.glob(source, recursive=True) if Path(f).is_file()]
        if not files and not glob.has_magic(source):
            raise UserError(f"--source={source}: there is no such file or folder")
    if not files:
        raise UserError(
            f"--source={source} matches no file; a folder is searched for {', '.join(EXTENSIONS)}"
        )
    return root, sorted(files)


def is_validation(name: str, seed: int, fraction: float) -> bool:
    """Returns whether a document goes to the validation split.

    A hash of its name decides, so that a document stays where it is when others come or go.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


class TextCorpus(tfds.core.GeneratorBasedBuilder):
    """The documents of a `CorpusReader` as a TFDS data set with `train` and `validation`."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, reader: CorpusReader, seed: int, validation_fraction: float, **kwargs):
        """Takes what to read and how to split it, and what TFDS builders take."""
        self._reader = reader
        self._seed = seed
        self._validation_fraction = validation_fraction
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {"name": tfds.features.Text(), "text": tfds.features.Text()}
        )
        return tfds.core.DatasetInfo(builder=self, description="Text documents.", features=features)

    def _split_generators(self, dl_manager):
        return {
            "train": self._generate_examples(validation=False),
            "validation": self._generate_examples(validation=True),
        }

    def _generate_examples(self, validation: bool):
        for document in self._reader:
            if is_validation(document.name, self._seed, self._validation_fraction) == validation:
                yield document.name, {"name": document.name, "text": document.text}

"""A small corpus, prepared once for all tests of this folder."""

from pathlib import Path

import pytest

from layerskip_jax.data.manifest import PrepareOptions
from layerskip_jax.data.prepare import prepare

DOCUMENTS = 40


def write_corpus(folder: Path) -> Path:
    """Writes `DOCUMENTS` text files of different lengths."""
    for number in range(DOCUMENTS):
        file = folder / f"part{number % 3}" / f"{number}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"Document {number}, é and 字.\n" + f"word{number} again " * number)
    return folder


def small_request(*sources: Path | str, **changes) -> PrepareOptions:
    """Asks for windows of 16 tokens with a fifth of the documents held out."""
    settings = {"sequence_length": 16, "vocab_size": 300, "validation_fraction": 0.2}
    return PrepareOptions(tuple(map(str, sources)), **{**settings, **changes})


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, corpus_folder) -> Path:
    """A prepared folder; tests that change it work on a copy."""
    output = tmp_path_factory.mktemp("prepared") / "data"
    prepare(small_request(corpus_folder, keep_documents=True), output)
    return output

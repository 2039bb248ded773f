"""layerskip data show: where the text of a window was found.

FOLDER is a run, of which --step and --row name a window that it trains on, or prepared data, of
which --window does, by its number. Each document in the window is shown with its file and line, or
the row of its table, and with the text that the window holds of it.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from layerskip_jax.commands.arguments import (
    figures_file,
    make_parser,
    prepared_data,
    write_figures,
)
from layerskip_jax.commands.tables import make_console, make_table
from layerskip_jax.data import origins
from layerskip_jax.data.batches import BatchSource
from layerskip_jax.data.manifest import MANIFEST_FILE, TOKENIZER_FILE, Manifest, read_manifest
from layerskip_jax.data.reading import line_number
from layerskip_jax.data.tokenizer import load_tokenizer
from layerskip_jax.run_folder.paths import is_run, open_run
from layerskip_jax.schema import UserError, require, require_choice, require_count

SHOWN = 60  # characters of a document's text


class _Window(NamedTuple):
    folder: Path
    manifest: Manifest
    split: str
    number: int


def main(argv: list[str]) -> int:
    """Runs the verb and returns its exit code."""
    parser = make_parser("data", __doc__)
    add = parser.add_argument
    add("what", choices=("show",), help="what to do")
    add("folder", metavar="FOLDER", help="a run, or prepared data")
    add("--step", type=int, help="of a run: the step, from 0 as the batches are counted")
    add("--row", type=int, default=0, help="of a run: the row of the step's batch, from 0")
    add("--window", type=int, help="of prepared data: the number of the window, from 0")
    add("--split", default="train", help="of prepared data: its split (default: train)")
    add("--data", help="of a run: where the data is now, where it was moved")
    add("--json", type=figures_file, help="also write all of it to this file")
    options = parser.parse_args(argv)
    if (Path(options.folder) / MANIFEST_FILE).is_file():
        if options.step is not None or options.window is None:
            raise UserError(f"{options.folder} is prepared data; name a window with --window=N")
        window = _of_data(Path(options.folder), options.split, options.window)
    else:
        if options.window is not None or options.step is None:
            raise UserError(
                f"{options.folder} is no prepared data; of a run, name a window with --step=N "
                "--row=R"
            )
        window = _of_run(options.folder, options.data, options.step, options.row)
    documents = _documents(window)
    place = f"window {window.number:,} of {window.split} in {window.folder}"
    make_console().print(
        make_table(
            place,
            ("file", "at", "tokens", "from token", "text"),
            [
                (
                    found["file"], found["at"], f"{found['tokens']:,}", f"{found['begin']:,}",
                    found["text"].replace("\n", "\\n")[:SHOWN],
                )
                for found in documents
            ],
            left=("file", "at", "text"),
        )
    )  # fmt: skip
    if options.json:
        write_figures(
            options.json,
            {
                "folder": str(window.folder), "split": window.split, "window": window.number,
                "documents": documents,
            },
        )  # fmt: skip
    return 0


def _of_data(folder: Path, split: str, number: int) -> _Window:
    manifest = read_manifest(folder)
    require_choice("--split", split, manifest.splits)
    count = manifest.split(split).windows
    require_count("--window", number, 0)
    require(number < count, f"--window={number}: {split} has {count:,} windows, counted from 0")
    return _Window(folder, manifest, split, number)


def _of_run(workdir: str, data: str | None, step: int, row: int) -> _Window:
    if not is_run(Path(workdir)) and "://" not in workdir:
        raise UserError(f"{workdir} is neither a run nor prepared data")
    folder, config = open_run(workdir)
    require_count("--step", step, 0)
    path = prepared_data(workdir, config.data.path, data)
    source = BatchSource.of_run(config, folder.skips(), path)
    rows = source.sizes.at(step)
    require(0 <= row < rows, f"--row={row}: the batch of step {step} has {rows} rows, from 0")
    place, number = source.locate(source.window_numbers(step)[row])
    return _Window(Path(place), read_manifest(place), "train", number)


def _documents(window: _Window) -> list[dict[str, Any]]:
    """Returns what is shown of each document."""
    tokenizer = load_tokenizer(window.folder / TOKENIZER_FILE)
    source = BatchSource(window.folder, window.split, batch_size=1, seed=0, shuffle=False)
    rows = source.batch(window.number)
    tokens = np.append(rows.tokens[0], rows.targets[0, -1])
    shown, start = [], 0
    for origin in origins.find(window.folder, window.manifest, window.split, window.number):
        part = tokens[start : start + origin.tokens]
        start += origin.tokens
        piece = origin.piece
        shown.append(
            {
                "file": piece.url,
                "at": _place(piece, origin.place),
                "kind": piece.kind,
                "place": origin.place,
                "begin": origin.begin,
                "tokens": origin.tokens,
                "text": _text(tokenizer, part, window.manifest.end_token_id),
            }
        )
    return shown


def _text(tokenizer: Tokenizer, tokens: np.ndarray, end: int) -> str:
    ids = tokens.tolist()
    ids = ids[:-1] if ids and ids[-1] == end else ids
    return tokenizer.decode(ids, skip_special_tokens=False)


def _place(piece: origins.Piece, place: int) -> str:
    """Returns where in its file a document is, by line where that is there to count them."""
    if piece.kind == "text":
        return "the whole"
    if piece.kind != "lines":
        return f"row {place + 1:,}"
    try:
        return f"line {line_number(piece, place):,}"
    except Exception:  # each file system raises kinds of its own; the byte tells as much
        return f"byte {place:,}"

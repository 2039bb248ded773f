"""layerskip inspect: what every exit predicts, and how many layers tokens need.

With a prompt, what each exit predicts after each of its tokens, in the terminal and with --output
as a page. Without one, figures over validation windows: where exits first agree with the last layer
and where they have settled, how often they change their mind, and what a perfect and free predictor
would save. Of a run's own data they are kept in its folder for `layerskip report`.
"""

import argparse
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from layerskip_jax.commands.arguments import (
    add_on_damaged,
    local_path,
    make_run_parser,
    prepared_data,
    write_figures,
)
from layerskip_jax.commands.tables import make_console, make_table
from layerskip_jax.data.batches import BatchSource
from layerskip_jax.data.manifest import TOKENIZER_FILE
from layerskip_jax.data.packing import Rows
from layerskip_jax.data.tokenizer import load_tokenizer
from layerskip_jax.evaluation.inspection import (
    classes_of_vocabulary,
    inspect_tokens,
    layers_needed,
)
from layerskip_jax.language_model import LanguageModel, load
from layerskip_jax.model.config import DTYPES
from layerskip_jax.report.inspect_page import Inspected, visible_texts, write_inspect_page
from layerskip_jax.run_folder.atomic import named_writes, write_json
from layerskip_jax.run_folder.object_store import as_path
from layerskip_jax.run_folder.paths import RunFolder, is_run, open_run, read_prompt
from layerskip_jax.schema import UserError, require, require_whole

# Windows of a batch; the figures do not depend on it.
ROWS = 8
MEASURES = {
    "first_agreement": "first agreement",
    "settled": "settled",
    "changes_of_mind": "changes of mind",
}


class _Model(NamedTuple):
    label: str
    model: LanguageModel


def main(argv: list[str]) -> int:
    """Runs the verb and returns its exit code."""
    parser = make_run_parser("inspect", __doc__)
    add = parser.add_argument
    add("--prompt", action="append", default=[], help="text to look at; may be repeated")
    add("--prompt-file", type=Path, action="append", default=[], help="a file is one prompt")
    add("--output", type=local_path, help="also write the prompts' page to this .html file")
    add("--data", help="prepared data for the figures (default: what the run trained on)")
    add("--batches", type=int, default=0, help=f"batches of {ROWS} windows (default: all)")
    add(
        "--beside",
        action="append",
        default=[],
        metavar="MODEL",
        help="another run, folder or GGUF file with the same tokenizer, measured on the same "
        "windows; may be repeated (default: the published weights that the run began from)",
    )
    add("--dtype", choices=DTYPES, help="to compute in (default: the run's)")
    add_on_damaged(parser)
    options = parser.parse_args(argv)
    prompts = options.prompt + [read_prompt(path) for path in options.prompt_file]
    require_whole("--batches", options.batches)
    require(options.batches >= 0, f"--batches={options.batches} must be at least 0, which is all")
    if prompts:
        for name in ("data", "beside"):
            if given := getattr(options, name):
                raise UserError(
                    f"--{name}={given} is for figures over prepared data; leave it out, or the "
                    "prompts"
                )
        return _inspect_prompts(options, prompts)
    if options.output is not None:
        raise UserError("--output is the page of a prompt; add --prompt or --prompt-file")
    return _inspect_data(options)


def _inspect_prompts(options: argparse.Namespace, prompts: list[str]) -> int:
    if options.output is not None:
        if options.output.suffix != ".html":
            raise UserError(f"--output={options.output} must end in .html")
        if not options.output.parent.is_dir():
            raise UserError(f"--output={options.output}: make {options.output.parent} first")
    model = load(options.workdir, step=options.step, dtype=options.dtype)
    generator = model.generator
    texts = []
    for prompt in prompts:
        ids = model.encode(prompt)
        seen = inspect_tokens(generator.weights, generator.config, ids)
        texts.append(Inspected(list(ids), seen))
    words = visible_texts(model.tokenizer, texts)
    console = make_console()
    for text in texts:
        print_exits(console, text, words)
    if options.output is not None:
        name = as_path(options.workdir).name or str(options.workdir)
        path = write_inspect_page(options.output, name, model.tokenizer, texts)
        print(f"{path}  {path.stat().st_size / 1e6:.2f} MB")
    if options.json:
        write_figures(options.json, [_as_figures(text) for text in texts])
    return 0


def _as_figures(text: Inspected) -> dict:
    """Returns what a text's cells hold, named for --json: `[L][S][k]`."""
    first, settled = text.means()
    return {
        "tokens": text.tokens,
        "first_agreement": first,
        "settled": settled,
        "predicted": text.predictions.tokens[:, 0].tolist(),
        "probabilities": text.predictions.probabilities[:, 0].round(6).tolist(),
    }


def print_exits(console: Console, text: Inspected, words: dict[int, str]) -> None:
    """Prints layers by tokens, in blocks of as many tokens as fit; no token is cut."""
    choices = text.choices
    same = choices == choices[-1]
    p = text.predictions.probabilities[:, 0, :, 0]
    layers, count = choices.shape
    margin = max(len(str(layers)), len("layer")) + 1
    read = [words[token] for token in text.tokens]
    cells = [[words[int(token)] for token in row] for row in choices]
    widths = [
        max(cell_len(read[i]), *(cell_len(row[i]) for row in cells)) + 3 for i in range(count)
    ]
    for start, end in _blocks(widths, console.width - margin):
        line = Text("layer".ljust(margin), "dim")
        for i in range(start, end):
            line.append("  " + _fill(read[i], widths[i] - 2), "bold")
        console.print(line, overflow="fold")
        for layer in range(layers):
            line = Text(str(layer + 1).rjust(margin - 1) + " ", "dim")
            for i in range(start, end):
                mark = "= " if same[layer, i] else "  "
                word = _fill(mark + cells[layer][i], widths[i] - 1)
                line.append(word, _shade(float(p[layer, i]), bool(same[layer, i])))
                line.append(" ")
            console.print(line, overflow="fold")
        console.print()
    first, settled = text.means()
    console.print(
        "Above: the tokens read; below, what each layer's exit predicts after them. =: as the last "
        "layer; the darker, the more probable.\n"
        f"{count:,} tokens; first agreement with the last layer at {first:.2f} of {layers} layers "
        f"on average, settled at {settled:.2f}.\n",
        soft_wrap=True,
    )


def _blocks(widths: Sequence[int], room: int) -> Iterator[tuple[int, int]]:
    """Yields first and last column, exclusive, of blocks that fit, at least a column in each."""
    start, used = 0, 0
    for index, width in enumerate(widths):
        if index > start and used + width > room:
            yield start, index
            start, used = index, 0
        used += width
    yield start, len(widths)


def _fill(text: str, width: int) -> str:
    return text + " " * (width - cell_len(text))


def _shade(probability: float, same: bool) -> str:
    """Returns a style: from white to blue by probability, the last layer's token bold."""
    red, green, blue = (round(255 + (full - 255) * probability) for full in (96, 170, 220))
    return f"{'bold ' if same else ''}black on rgb({red},{green},{blue})"


def _inspect_data(options: argparse.Namespace) -> int:
    folder, config, on_damaged = None, None, options.on_damaged or "stop"
    if is_run(as_path(options.workdir)) or options.step is not None:
        folder, config = open_run(options.workdir)
        on_damaged = options.on_damaged or config.data.on_damaged
        data = prepared_data(options.workdir, config.data.path, options.data)
    else:
        data = prepared_data(options.workdir, "", options.data)
    beside = options.beside
    if not beside and config is not None and config.init_from and Path(config.init_from).exists():
        beside = [config.init_from]
    opened = functools.partial(
        BatchSource, data, "validation", batch_size=ROWS, seed=0, skip_damaged=on_damaged == "skip"
    )
    source = opened(shuffle=False)
    batches = source.steps_per_epoch
    if 0 < options.batches < batches:
        # Of a part, windows drawn from all over, as `layerskip evaluate` takes them.
        source, batches = opened(), options.batches
    found = [
        _measured(place, step, options.dtype, data, source, batches)
        for place, step in ((options.workdir, options.step), *((place, None) for place in beside))
    ]
    result = {"data": str(data), **found[0], "beside": found[1:]}
    _print(result)
    # What the report shows is the run's newest checkpoint on its own text.
    if folder is not None and options.data is None and options.step is None:
        _keep(folder, result)
    if options.json:
        write_figures(options.json, result)
    return 0


def _measured(
    place: str, step: int | None, dtype: str | None, data: str, source: BatchSource, batches: int
) -> dict:
    """Returns the figures of one model over the first so many batches."""
    model = load(place, step=step, dtype=dtype)
    _check_tokenizer(model, place, data)
    config = model.generator.config
    source.manifest.check_tokens(config.vocab_size, data)
    classes = classes_of_vocabulary(model.tokenizer, config.vocab_size)

    def rows() -> Iterator[Rows]:
        for number in range(batches):
            yield source.rows(number, slice(None))

    figures = layers_needed(model.generator.weights, config, rows(), classes)
    return {"model": as_path(place).name or str(place), **figures}


def _check_tokenizer(model: LanguageModel, place: str, data: str) -> None:
    """Refuses data whose tokens mean something else to the model.

    Raises:
      UserError: it does.
    """
    theirs = load_tokenizer(as_path(data) / TOKENIZER_FILE).get_vocab(with_added_tokens=True)
    if model.tokenizer.get_vocab(with_added_tokens=True) != theirs:
        raise UserError(
            f"{data} was prepared with another tokenizer than that of {place}; prepare it with "
            "that one (--tokenizer), or name other data with --data"
        )


def _keep(folder: RunFolder, result: dict) -> None:
    file = folder.layers_needed_file
    with named_writes(file):
        write_json(file, result)
    folder.upload()


def _print(result: dict) -> None:
    console = make_console()
    models = [result, *result["beside"]]
    rows = [
        (
            f"{measured['model']}, {MEASURES[name]}",
            f"{measured[name]['mean']:.2f}",
            str(measured["layers"]),
            f"{measured[name]['saving']:.1%}" if "saving" in measured[name] else "",
        )
        for measured in models
        for name in MEASURES
    ]
    console.print(
        make_table(
            f"Layers needed, {result['tokens']:,} tokens of {result['data']}",
            ("", "mean", "of layers", "saving"),
            rows,
            sections=range(2, len(rows), 3),
            caption="first agreement: the first exit with the last layer's token; settled: from "
            "there on all exits have it; saving: what a perfect and free predictor would save",
        )
    )
    for measured in models:
        console.print()
        _print_histogram(console, measured)
        _print_classes(console, measured)


def _print_histogram(console: Console, measured: dict) -> None:
    tokens = measured["tokens"]
    parts = [measured[name]["histogram"] for name in ("first_agreement", "settled")]
    sums = [0, 0]
    rows = []
    for layer in range(measured["layers"]):
        sums = [total + part[layer] for total, part in zip(sums, parts, strict=True)]
        shares = [f"{value / tokens:.1%}" for part in parts for value in (part[layer],)]
        rows.append((str(layer + 1), *shares, *(f"{total / tokens:.1%}" for total in sums)))
    console.print(
        make_table(
            f"{measured['model']}: tokens by the layers they need",
            ("layers", "first agreement", "settled", "agreed so far", "settled so far"),
            rows,
        )
    )


def _print_classes(console: Console, measured: dict) -> None:
    rows = [
        (
            entry["class"],
            f"{entry['tokens'] / measured['tokens']:.1%}",
            *(f"{entry[name]:.2f}" for name in MEASURES),
        )
        for entry in measured["classes"]
    ]
    console.print(
        make_table(
            f"{measured['model']}: layers needed by class of the token to come",
            ("class", "tokens", *MEASURES.values()),
            rows,
            left=("class",),
        )
    )

"""What every benchmark shares: its options, its progress, and its figures as they come.

Import it before `layerskip_jax`: it puts the repository's root on the path, so that
`python benchmarks/NAME.py` works from any folder, whether the package is installed or not.
"""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# What is compared with, torch's, takes its memory on the same GPU; by itself jax would keep it all.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax  # noqa: E402
from rich.console import Console, RenderableType  # noqa: E402
from rich.progress import (  # noqa: E402
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from layerskip_jax.hardware.tpu_presence import leave_absent_tpu_alone  # noqa: E402
from layerskip_jax.run_folder.atomic import write_json  # noqa: E402
from layerskip_jax.schema import ConfigError, UserError  # noqa: E402

leave_absent_tpu_alone()  # or jax would look for one, and say at length that there is none
WIDTH = 110
QUICK_BYTES = 1_000_000


def parser(about: str, rounds: tuple[int, int] | None = None) -> argparse.ArgumentParser:
    """Returns a parser with the options that all benchmarks have.

    Args:
      about: one line.
      rounds: how often everything is timed, in full and with `--quick`.
    """
    made = argparse.ArgumentParser(description=about, allow_abbrev=False)
    made.add_argument(
        "--quick", action="store_true",
        help="smaller sizes and fewer rounds: at most three minutes on two cores",
    )  # fmt: skip
    made.add_argument("--json", type=Path, help="file to write the figures to, flat, as they come")
    if rounds:
        made.add_argument(
            "--rounds", type=int,
            help=f"how often each is timed (default: {rounds[0]}, with --quick {rounds[1]})",
        )  # fmt: skip
        made.set_defaults(rounds_by_default=rounds)
    return made


def parse(made: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """Returns the options, with the number of rounds filled in."""
    options = made.parse_args(argv)
    check(made, options)
    return options


def check(made: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Fills in the number of rounds, and refuses what would fail only at the end."""
    if "rounds" in options:
        if options.rounds is None:
            options.rounds = options.rounds_by_default[options.quick]
        if options.rounds < 1:
            made.error(f"--rounds={options.rounds}: give 1 or more")
    if options.json is not None and not options.json.parent.is_dir():
        made.error(f"--json={options.json}: make the folder {options.json.parent} first")


def parse_training(
    made: argparse.ArgumentParser,
    argv: list[str] | None,
    file: Callable[[argparse.Namespace], str],
) -> tuple[argparse.Namespace, list[str]]:
    """Returns the options of a benchmark that trains, and its `--config.` overrides.

    Args:
      made: what `parser` returned; gets `--workdir` and `--source`.
      argv: None takes the command line's.
      file: names the file of `--json` within the workdir where none is given.
    """
    made.add_argument("--workdir", type=Path, required=True, help="folder for all runs")
    made.add_argument("--source", default="stdlib", help="corpus, as `layerskip prepare` has it")
    options, overrides = made.parse_known_args(argv)
    for argument in overrides:
        if not argument.startswith("--config."):
            made.error(f"unrecognized argument {argument}")
    if options.json is None:
        options.workdir.mkdir(parents=True, exist_ok=True)
        options.json = options.workdir / file(options)
    check(made, options)
    return options, overrides


class Bench:
    """A benchmark under way: `with Bench(options) as bench`.

    Figures go to standard output as they are known, and into the file of `--json` at the same
    moment, so that a benchmark that is interrupted keeps what it had. Progress goes to standard
    error: a bar on a terminal, else a line for each thing begun.

    Attributes:
      figures: those known so far.
      quick: whether `--quick` was given.
    """

    def __init__(self, options: argparse.Namespace, bar: bool = True):
        """Takes what `parse` returned; `bar` is False where what is run has a bar of its own."""
        self.figures: dict = {}
        self.quick: bool = options.quick
        self._file: Path | None = options.json
        self._start = time.monotonic()
        self._done = self._total = 0
        self._progress = None
        if bar and sys.stderr.isatty():
            columns = (
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
            )
            # Standard output passes through the bar only where both are on the screen.
            self._progress = Progress(
                *columns,
                console=Console(stderr=True),
                redirect_stdout=sys.stdout.isatty(),
            )
            self._task = self._progress.add_task("", total=None)

    def __enter__(self) -> "Bench":
        if self._progress:
            self._progress.start()
        device = jax.devices()[0]
        self.print(f"jax {jax.__version__}, {device.device_kind}{', quick' * self.quick}")
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self._progress:
            if kind is None:
                self._progress.update(self._task, completed=self._done)
            self._progress.stop()
        if kind is not None and self._file is not None and self.figures:
            print(f"{self._file} has the {len(self.figures)} figures so far", file=sys.stderr)

    def expect(self, count: int) -> None:
        """Says that `count` more calls of `begin` will come."""
        self._total += count
        if self._progress:
            self._progress.update(self._task, total=self._total)

    def begin(self, what: str) -> None:
        """Says what is done next."""
        if self._progress:
            self._progress.update(self._task, completed=self._done, description=what)
        else:
            seconds = time.monotonic() - self._start
            print(
                f"{self._done + 1}/{self._total} after {seconds:.0f} s: {what}",
                file=sys.stderr,
                flush=True,
            )
        self._done += 1

    def add(self, figures: Mapping[str, object], show: bool = True) -> None:
        """Keeps figures, flat and named; prints them unless a table has them."""
        self.figures |= figures
        if self._file is not None:
            write_json(self._file, self.figures)
        if show:
            for key, value in figures.items():
                self.print(f"{key}: {shown(value)}")

    def print(self, what: RenderableType) -> None:
        """Prints a line or a table on standard output, above the bar where there is one."""
        on_screen = self._progress and sys.stdout.isatty()
        console = self._progress.console if on_screen else Console(width=WIDTH)
        console.print(what, highlight=False, soft_wrap=isinstance(what, str))
        if not on_screen:
            sys.stdout.flush()


def shown(value: object) -> str:
    """Returns a figure as text: four digits of what is small, thousands parted."""
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    return f"{value:,.3f}" if abs(value) >= 0.1 or value == 0 else f"{value:.3g}"


def run(main: Callable[[], int]) -> None:
    """Ends the process with what `main` returns; what the user did needs no traceback."""
    try:
        sys.exit(main())
    except (ConfigError, UserError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def run_verb(command: ModuleType, *arguments: str) -> int:
    """Prints a verb's command line as it would be typed, and runs it."""
    verb = command.__name__.rsplit(".", 1)[1]
    print(f"\n$ {shlex.join(['layerskip', verb, *arguments])}", flush=True)
    return command.main(list(arguments))


def prepare_data(
    options: argparse.Namespace, vocabulary: int, window: int, held_out: float
) -> tuple[Path, int]:
    """Prepares `--source` for a benchmark that trains, a megabyte of it with `--quick`.

    Args:
      options: what `parse_training` returned.
      vocabulary: tokens of the tokenizer.
      window: tokens of a window.
      held_out: share of the documents kept for validation.

    Returns:
      The folder of the data, and what the verb returned.
    """
    from layerskip_jax.commands import prepare  # tokenizers, which most benchmarks do without

    data = options.workdir / "data"
    code = run_verb(
        prepare,
        f"--source={options.source}",
        f"--output={data}",
        f"--vocab-size={vocabulary}",
        f"--sequence-length={window}",
        # Of a megabyte, a small share may be no document at all.
        f"--validation-fraction={max(held_out, 0.1) if options.quick else held_out}",
        *([f"--max-bytes={QUICK_BYTES}"] if options.quick else []),
    )
    return data, code

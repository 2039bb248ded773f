"""Figures on terminals of every width and encoding: none is cut, none ends the verb."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from layerskip_jax.cli import main
from layerskip_jax.commands import prepare, quickstart, sweep
from layerskip_jax.commands.tables import make_table
from layerskip_jax.data.manifest import read_manifest
from layerskip_jax.run_folder.paths import RunFolder
from layerskip_jax.training.metrics import progress_bar

WIDTHS = (20, 40, 80)
HEADINGS = ("recipe", "GiB a device", "largest difference", "step, MFU at best")
ROWS = [
    ("llama2_7b_continual", "1,234.56", "2.34e-05", "1,234.5 s, 99%"),
    ("a/path/that/is/longer/than/any/column/of/a/table.py", "0.10", "", "0.1 s, 1%"),
]


def printed(table, width, encoding="utf-8"):
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=file, width=width, markup=False, emoji=False, highlight=False)
    console.print(table)
    file.flush()
    return file.buffer.getvalue().decode(encoding)


@pytest.mark.parametrize("width", [8, *WIDTHS, 200])
def test_every_figure_is_whole_at_every_width(width):
    text = printed(
        make_table("[red] 2 recipes", HEADINGS, ROWS, left=("recipe",), styles=["bold"],
                   sections=(0,), caption="of 7 devices"),
        width,
    )  # fmt: skip
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    words = text.split() if width > 8 else "".join(text.split())
    for figure in ("1,234.56", "2.34e-05", "1,234.5", "99%", "0.10", "0.1", "1%", "7"):
        assert figure in words
    # A path may be broken, and nothing of it is lost.
    pieces = [line.split("│")[1] if line.startswith("│") else line for line in text.splitlines()]
    assert ROWS[1][0] in "".join(piece.strip() for piece in pieces)
    assert "[red]" in text


def test_a_terminal_without_boxes_gets_dashes():
    text = printed(make_table("Loss", HEADINGS, ROWS), 120, "ascii")
    assert "| 1,234.56 |" in " ".join(text.split()) and text.isascii()
    assert printed(make_table("Loss", HEADINGS, ROWS), 20, "ascii").isascii()


@pytest.fixture
def narrow(monkeypatch, capsys):
    """Returns what a call prints at 40 columns."""
    monkeypatch.setenv("COLUMNS", "40")

    def of(function, *arguments):
        function(*arguments)
        return capsys.readouterr().out

    return of


def test_the_tables_of_the_verbs_fit_forty_columns(narrow, prepared):
    pair = {
        "exit_layer": 12, "draft_length": 16, "acceptance": 0.87, "tokens_per_cycle": 12.34,
        "tokens_per_second": 12345.0, "speedup": 1.23, "identical": True,
    }  # fmt: skip
    result = {
        "plain_tokens_per_second": 10000.0, "pairs": [pair], "static": pair, "thresholds": [],
        "best": {**pair, "draft_length": 19, "stop_below": 0.45, "speedup": 1.31},
        "tasks": [
            {
                "task": "prose", "prompts": 7,
                "exits": [{"exit_layer": 12, "first_accepted": 0.93}],
                "plain_tokens_per_second": 10100.0, **pair, "speedup": 1.37,
            }
        ],
        "prompts": 32, "prompt_tokens": 64, "new_tokens": 64,
    }  # fmt: skip
    text = narrow(sweep._print, result)
    assert {"10,000", "12,345", "12.34", "87%", "1.23", "16"} <= set(text.split())
    assert {"19", "0.45", "1.31", "prose", "93%", "10,100", "1.37"} <= set(text.split())
    manifest = read_manifest(prepared)
    text = narrow(prepare._print, manifest, prepared)
    for split in (manifest.train, manifest.validation):
        for count in (split.documents, split.bytes, split.tokens, split.windows):
            assert f"{count:,}" in text.split()


def test_a_plan_loses_no_figure(monkeypatch, capsys):
    """However wide, the same figures; the words between them may be wrapped."""
    found = []
    for columns in ("40", "200"):
        monkeypatch.setenv("COLUMNS", columns)
        main(["plan", "--config=llama2_7b_scratch", "--topology=h100:64"])
        found.append(re.findall(r"[\d.,:%]*\d[\d.,:%]*", capsys.readouterr().out))
    assert found[0] == found[1] and len(found[0]) > 20


def test_the_summary_of_the_quickstart_loses_no_figure(tmp_path, narrow):
    folder = RunFolder(tmp_path)
    exits = [{"layers": n, "loss": 7.0, "perplexity": 12345.6 * n} for n in range(1, 9)]
    best = {
        "exit_layer": 2, "draft_length": 3, "tokens_per_second": 1234.0, "speedup": 1.21,
        "acceptance": 0.76, "tokens_per_cycle": 3.21, "identical": True,
    }  # fmt: skip
    for name, value in {
        "evaluation": {"exits": exits},
        "plain": {"label": "100 steps, no dropout, no exits", "exits": exits},
        "data": {"unigram_entropy_nats": 6.543},
        "speculation": {"best": best, "plain_tokens_per_second": 1019.0},
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    words = narrow(quickstart._print_summary, folder, tmp_path / "export", 61.0).split()
    for figure in ("12,345.6", "98,764.8", "1,019", "1,234", "1.21", "76%", "3.21", "6.543"):
        assert figure in words


@pytest.mark.parametrize("width", [40, 80, 160])
def test_the_progress_of_a_training_loses_no_figure(width):
    bar = progress_bar(Console(file=io.StringIO(), width=width, force_terminal=True))
    text = "loss 10.812  exit 2 10.903  exit 16 10.721  1,234,567 tokens/s  mfu 54.3%"
    bar.add_task(text, total=123456, completed=98765)
    bar.console.print(bar.get_renderable())
    shown = re.sub(r"\x1b\[[0-9;]*m", "", bar.console.file.getvalue())
    assert {"98765/123456", *text.split()} <= set(shown.split())


def test_a_character_that_the_terminal_lacks_is_its_number():
    """In what is printed by print, by rich, and in the lines of tables."""
    program = """
import sys
import types

from layerskip_jax import cli
from layerskip_jax.commands.tables import make_console, make_table

def verb(arguments):
    print("caf\u00e9")
    make_console().print(make_table("\u2013 7", ("", "n"), [("\u4e2d", "1")]))
    return 0

cli.leave_absent_tpu_alone = cli.spare_threads_for_waiting = lambda: None
sys.modules["layerskip_jax.commands.settings"] = types.SimpleNamespace(main=verb)
sys.argv = ["layerskip", "settings"]
sys.exit(cli.main())
"""
    environment = {
        **os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "PYTHONIOENCODING": "ascii",
        "LC_ALL": "C",
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True)
    text = done.stdout.decode("ascii")
    assert (done.returncode, done.stderr) == (0, b"")
    assert text.startswith("caf\\xe9\n\\u2013 7") and "| \\u4e2d | 1 |" in text

import csv
import json
import shutil

import pytest

import layerskip_jax
from layerskip_jax.cli import main
from layerskip_jax.report.page import build_page
from layerskip_jax.report.run_record import read_run
from layerskip_jax.run_folder.paths import RunFolder


@pytest.fixture(scope="module")
def run(finished, tmp_path_factory):
    """A copy of a run, for its own sweeps."""
    return shutil.copytree(finished, tmp_path_factory.mktemp("sweep") / "run")


@pytest.fixture(scope="module")
def swept(run):
    """A sweep by task of that run; the folder, what it wrote, and its other figures."""
    lines = [
        {"prompt": "Document 1. word2 word3", "task": "text"},
        {"prompt": "word4 word4 word4 word4 word4 word4", "task": "repeats"},
        {"prompt": "Document 7."},
    ]
    file, figures = run.parent / "prompts.jsonl", run.parent / "figures.json"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["sweep", f"--workdir={run}", f"--prompts={file}", "--new-tokens=8"]
    short = ["--exits=2", "--drafts=3", "--stop-below=0.5", "--prompt-tokens=8"]
    assert main([*command, *short, f"--json={figures}"]) == 0
    return run, json.loads(RunFolder(run).speculation_file.read_text()), figures


def test_a_file_of_prompts_gives_figures_by_task(swept):
    run, found, figures = swept
    assert json.loads(figures.read_text()) == found
    assert found["prompts"] == 3 and found["prompt_tokens"] == 8
    assert [task["task"] for task in found["tasks"]] == ["text", "repeats", "other"]
    assert all(task["identical"] and task["prompts"] == 1 for task in found["tasks"])
    assert {way["draft_length"] for way in found["thresholds"]} == {3, 6}
    written = RunFolder(run).speculation_file.with_suffix(".csv").read_text()
    rows = list(csv.DictReader(written.splitlines()))
    assert len(rows) == 2 + (found["best"]["stop_below"] is not None)
    assert rows[1]["verified"] == "True" and rows[1]["stop_below"] == ""


@pytest.mark.parametrize("length, below", [(3, 0.9), (6, 0.9), (3, None)])
def test_best_drafts_as_the_sweep_found(swept, length, below):
    run, found, _ = swept
    best = {**found["best"], "draft_length": length, "stop_below": below, "speedup": 1.5}
    if below is None:
        del best["stop_below"]  # as an older sweep wrote it
    file = RunFolder(run).speculation_file
    file.write_text(json.dumps({**found, "best": best}))
    model = layerskip_jax.load(run)
    assert (model.best_pair, model.best_stop_below) == ((2, length), below)
    prompt, count = "Document 3. word", 24

    def drafted(draft, **options):
        return model.generate(prompt, count, draft=draft, **options).generation

    taken = drafted("best", stop_below=None)  # as the command line has it
    assert taken.tokens == drafted(None).tokens
    assert taken.drafting == drafted((2, length), stop_below=below).drafting
    always = drafted((2, length)).drafting
    assert (taken.drafting == always) == (below is None)
    if length == 3:
        assert drafted("auto", stop_below=None).tokens == taken.tokens
        (_, stopped), *_ = (key for key in model.generator._evidence if len(key[0]) > 2)
        assert stopped == (below and (pytest.approx(below), "probability"))
    # What the user gives counts; no exit of this model is less sure than that.
    assert drafted("best", stop_below=1e-6).drafting == always
    if length == 6:  # longer than any pair's
        page = build_page(read_run(run))
        assert "up to 6, until below 0.9" in page and "E=2, G=6, stop below 0.9" in page
        assert "Drafting up to 6 tokens with 2 layers, until one is below 0.9" in page


@pytest.mark.parametrize(
    "lines, message",
    [
        ('{"prompt": "a"}\n{"prompt": }', "line 2 is no JSON"),
        (json.dumps({"prompt": "word1 " * 80}), "line 1: the prompt of"),
        (json.dumps({"prompt": "word1 " * 80}), "more than the context of 64"),
    ],
)
def test_a_line_that_cannot_be_measured_is_named(run, tmp_path, capsys, lines, message):
    (tmp_path / "prompts.jsonl").write_text(lines)
    assert main(["sweep", f"--workdir={run}", f"--prompts={tmp_path / 'prompts.jsonl'}"]) == 2
    assert message in " ".join(capsys.readouterr().err.split())

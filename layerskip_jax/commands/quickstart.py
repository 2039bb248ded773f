"""layerskip quickstart: the whole way, small, on Python's own standard library.

Prepares the corpus, pretrains a LayerSkip model and, for comparison, a shorter plain one,
evaluates every exit, measures self-speculative decoding, exports, reports. Each stage is one
`layerskip` command, printed as you would type it; a stage that is done is not run again.
"""

import argparse
import json
import os
import shlex
import shutil
import sys
import time
from pathlib import Path

from layerskip_jax.commands import (
    evaluate,
    export,
    generate,
    inspect,
    prepare,
    report,
    sweep,
    train,
)
from layerskip_jax.commands.arguments import local_path
from layerskip_jax.commands.tables import make_console, make_table
from layerskip_jax.run_folder.atomic import write_json
from layerskip_jax.run_folder.paths import RunFolder, read_json_lines
from layerskip_jax.schema import UserError

SAMPLE_PROMPT = 'class Error(Exception):\n    """'
PLAIN_STEPS = 100
# Of 8 windows: figures of 30 thousand tokens, in a few seconds.
INSPECT_BATCHES = 32
# LayerSkip, section 6.1, Wikipedia perplexity of the middle layer.
PAPER = (
    "(at full scale, from the paper: the middle layer of Llama 2 7B has perplexity 1900, and "
    "8.12 after continual LayerSkip pretraining; the last layer 4.32 and 4.30)"
)


def main(argv: list[str]) -> int:
    """Runs the verb and returns its exit code."""
    parser = argparse.ArgumentParser(prog="layerskip quickstart", description=__doc__)
    parser.add_argument("--workdir", type=local_path, required=True, help="folder for everything")
    parser.add_argument("--config", default="quickstart", help="recipe to train")
    parser.add_argument("--plain-steps", type=int, default=PLAIN_STEPS)
    parser.add_argument("--source", default="stdlib", help="corpus, as `layerskip prepare` has it")
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--validation-fraction", type=float, default=0.02)
    parser.add_argument("--steps", type=int, help="optimizer steps (default: the recipe's)")
    options = parser.parse_args(argv)
    top = options.workdir
    data, model, plain, exported = (top / name for name in ("data", "model", "plain", "export"))
    folder = RunFolder(model)
    start = time.monotonic()

    _run(
        prepare,
        f"--source={options.source}",
        f"--output={data}",
        f"--vocab-size={options.vocab_size}",
        f"--sequence-length={options.sequence_length}",
        f"--validation-fraction={options.validation_fraction}",
    )
    steps = [] if options.steps is None else [f"--config.training.steps={options.steps}"]
    data_path = f"--config.data.path={data}"
    _run(train, f"--config={options.config}", f"--workdir={model}", data_path, *steps)
    _run(
        train,
        f"--config={options.config}:plain",
        f"--workdir={plain}",
        data_path,
        f"--config.training.steps={options.plain_steps}",
    )
    evaluation = model / "evaluation.json"
    _run(evaluate, f"--workdir={model}", f"--json={evaluation}", done=evaluation.exists())
    _run(
        inspect,
        f"--workdir={model}",
        f"--beside={plain}",
        f"--batches={INSPECT_BATCHES}",
        done=folder.layers_needed_file.exists(),
    )
    _write_plain_twin(folder, RunFolder(plain), options.plain_steps)
    # Thresholds to end drafts at would take another minute.
    _run(sweep, f"--workdir={model}", "--stop-below=none", done=folder.speculation_file.exists())
    _run(export, f"--workdir={model}", f"--output={exported}", done=exported.exists())
    _run(report, f"--workdir={model}", done=folder.report_file.exists())
    _run(
        generate,
        f"--workdir={model}",
        f"--prompt={SAMPLE_PROMPT}",
        "--max-new-tokens=64",
        "--draft=best",
    )
    _print_summary(folder, exported, time.monotonic() - start)
    _print_next_steps(options)
    return 0


def _run(command, *arguments: str, done: bool = False) -> None:
    """Prints a command as it would be typed, and runs it unless its result is there."""
    verb = command.__name__.rsplit(".", 1)[1]
    line = shlex.join(["layerskip", verb, *arguments])
    print(f"\n$ {line}{'   # done before' if done else ''}", flush=True)
    if not done and (code := command.main(list(arguments))):
        raise UserError(f"`{line}` ended with exit code {code}; run the quickstart again to go on")


def _write_plain_twin(folder: RunFolder, plain: RunFolder, steps: int) -> None:
    """Leaves the plain twin's exits where the report looks for them."""
    exits = read_json_lines(plain.evaluations_file)[-1]["exits"]
    label = f"{steps} steps, no dropout, no exits"
    write_json(folder.path / "plain.json", {"label": label, "exits": exits})


def _middle_over_last(evaluation: dict) -> float:
    perplexities = [entry["perplexity"] for entry in evaluation["exits"]]
    return perplexities[len(perplexities) // 2 - 1] / perplexities[-1]


def _print_summary(folder: RunFolder, exported: Path, seconds: float) -> None:
    console = make_console()
    ours = json.loads((folder.path / "evaluation.json").read_text())
    twin = json.loads((folder.path / "plain.json").read_text())
    entropy = json.loads(folder.data_file.read_text())["unigram_entropy_nats"]
    table = make_table(
        "Perplexity by exit (validation)",
        ("layers run", "LayerSkip", f"plain ({twin['label']})"),
        [
            (str(a["layers"]), f"{a['perplexity']:,.1f}", f"{b['perplexity']:,.1f}")
            for a, b in zip(ours["exits"], twin["exits"], strict=True)
        ],
    )
    console.print()
    console.print(table)
    last = ours["exits"][-1]["loss"]
    console.print(
        f"last exit: {last:.3f} nats/token; unigram entropy of the corpus: {entropy:.3f}\n"
        f"middle exit over last exit: LayerSkip {_middle_over_last(ours):.2f}, plain "
        f"{_middle_over_last(twin):.2f} so far, and rising as it trains\n{PAPER}\n",
        soft_wrap=True,
    )

    speculation = json.loads(folder.speculation_file.read_text())
    best = speculation["best"]
    drafted = (
        f"drafted, E={best['exit_layer']}, G={best['draft_length']}",
        f"{best['tokens_per_second']:,.0f}",
        f"{best['speedup']:.2f}",
        f"{best['acceptance']:.0%}",
        f"{best['tokens_per_cycle']:.2f}",
        "yes" if best["identical"] else "NO",
    )
    plain = ("plain", f"{speculation['plain_tokens_per_second']:,.0f}", "1.00", "", "", "")
    table = make_table(
        "Greedy decoding, batch 1",
        ("", "tokens/s", "speed-up", "accepted", "tokens/cycle", "same"),
        (plain, drafted),
    )
    console.print(table)
    slower = (
        "No pair decodes faster than plain decoding here, so --draft=best does not draft: at this "
        "size a pass over a few tokens costs this CPU as much as several of one (docs/decoding.md)"
        "\n"
    )
    console.print(
        "E: layers that draft; G: drafts a cycle; same: token for token plain decoding's\n"
        f"{slower if best['speedup'] < 1 else ''}\n"
        f"report:   {folder.report_file}\nexported: {exported} (a Hugging Face folder)\n"
        f"{seconds:.0f} s in all",
        soft_wrap=True,
    )


def _print_next_steps(options: argparse.Namespace) -> None:
    """Prints three commands to go on with, as they can be pasted where the user stands."""
    layerskip, top = _layerskip(), options.workdir
    model, data, run = (_shortest(top / name) for name in ("model", "my-data", "my-model"))
    generate = ["generate", f"--workdir={model}", "--prompt=def main(", "--draft=best", "--stream"]
    prepare = [
        "prepare",
        f"--source={options.source}",
        f"--output={data}",
        f"--vocab-size={options.vocab_size}",
        f"--sequence-length={options.sequence_length}",
        f"--validation-fraction={options.validation_fraction}",
    ]
    train = ["train", f"--config={options.config}", f"--workdir={run}"]
    steps = {
        "write some code with it": [generate],
        "see the report in a browser": [["report", f"--workdir={model}", "--open"]],
        f"train on your own text (put a folder of it for {options.source})": [
            prepare,
            [*train, f"--config.data.path={data}"],
        ],
    }
    print("\nGo on with:")
    for purpose, commands in steps.items():
        lines = [shlex.join([*layerskip, *command]) for command in commands]
        print(f"\n# {purpose}\n" + " && \\\n  ".join(lines))


def _layerskip() -> list[str]:
    """Returns how the user can call this very installation, from where they stand."""
    script = Path(sys.executable).with_name("layerskip")
    if not script.is_file():
        return [_shortest(sys.executable), "-m", "layerskip_jax"]
    on_path = shutil.which("layerskip")
    return ["layerskip"] if on_path and script.samefile(on_path) else [_shortest(script)]


def _shortest(path: str | Path) -> str:
    """Returns the path from here or from the root, whichever is shorter."""
    return min(os.path.relpath(path), os.path.abspath(path), key=len)

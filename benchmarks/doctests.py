"""Writes the doctests of Python's standard library as prompts with completions.

    python benchmarks/doctests.py --output=FOLDER

makes `train.jsonl`, `same-files.jsonl` and `other-files.jsonl`: each line has the source of an
example as it stands after `>>> ` for a prompt, and what the interpreter answers for its completion.
Other files are a share of the files that a hash of their paths chooses, and the second are so many
examples of the rest. No prompt of these two is in the first. The same library and seed give the
same files.
"""

import argparse
import ast
import doctest
import json
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

import harness  # noqa: F401  puts the package on the path

from layerskip_jax.data.units import is_validation
from layerskip_jax.run_folder.atomic import write_json

FILES = ("train", "same-files", "other-files")
INSTALLED = {"site-packages", "dist-packages"}


def main(argv: list[str] | None = None) -> int:
    """Writes the files."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--output", type=Path, required=True, help="the folder to write to")
    parser.add_argument("--characters", type=int, default=300, help="of an example, at most")
    parser.add_argument("--held-out", type=float, default=0.2, help="share that is held out")
    parser.add_argument("--seed", type=int, default=2, help="of what is held out")
    parser.add_argument("--json", type=Path, help="file to write the counts to, flat")
    options = parser.parse_args(argv)
    if not 0 < options.held_out < 1:
        parser.error(f"--held-out={options.held_out}: give a share between 0 and 1")
    if options.characters < 20:
        parser.error(f"--characters={options.characters}: give 20 or more")
    found: dict[str, dict[tuple[str, str], str]] = {name: {} for name in FILES}

    def held_out(name: str) -> bool:
        return is_validation(name, options.seed, options.held_out)

    library = Path(sysconfig.get_path("stdlib"))
    for file in sorted(library.rglob("*.py")):
        path = file.relative_to(library)
        if INSTALLED.intersection(path.parts):
            continue
        for pair in examples(file):
            if sum(map(len, pair)) <= options.characters:
                same = "same-files" if held_out(pair[0]) else "train"
                name = "other-files" if held_out(str(path)) else same
                found[name].setdefault(pair, str(path))
    learned = {prompt for prompt, _ in found["train"]}
    options.output.mkdir(parents=True, exist_ok=True)
    figures = {}
    for name, pairs in found.items():
        lines = [
            json.dumps({"prompt": prompt, "completion": completion, "file": path}) + "\n"
            for (prompt, completion), path in pairs.items()
            if name == "train" or prompt not in learned
        ]
        (options.output / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{len(lines):,} examples in {options.output}/{name}.jsonl")
        figures[f"{name}_examples"] = len(lines)
    if options.json is not None:
        write_json(options.json, figures)
    return 0


def examples(file: Path) -> Iterator[tuple[str, str]]:
    """Yields the examples in the strings of a file that answer something, as prompt and answer."""
    try:
        source = file.read_text(encoding="utf-8")
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(source)
    except (OSError, ValueError, SyntaxError, RecursionError):  # some tests are not to be parsed
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
            continue
        try:
            found = doctest.DocTestParser().get_examples(node.value)
        except ValueError:  # of a string that is about doctests
            continue
        for example in found:
            first, *rest = example.source.rstrip("\n").split("\n")
            prompt = "".join(f"{mark}{line}\n" for mark, line in zip(
                [">>> ", *["... "] * len(rest)], [first, *rest], strict=True
            ))  # fmt: skip
            if (answer := example.want.rstrip("\n")).strip():
                yield prompt, answer


if __name__ == "__main__":
    sys.exit(main())

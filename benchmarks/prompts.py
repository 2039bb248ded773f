"""Writes prompts of four tasks, from what is installed, for `layerskip sweep --prompts=FILE`.

    python benchmarks/prompts.py --output=prompts.jsonl

`code` goes on in the middle of a file of Python's standard library; `docstring-to-code` is a
function's head and docstring, from installed packages; `prose` is from their licences and READMEs;
`repetitive` is records after a rule: logs, tables, lists and calls. The same installation and seed
give the same file. A quickstart's model has read the standard library, most of `code` included.

    python benchmarks/prompts.py --output=prompts.jsonl --workdir=RUN

writes two other tasks, `easy` and `hard`: of 160 beginnings of documents of the run's validation
set, 48 tokens each, those of the lowest and of the highest perplexity under the run's model.
"""

import argparse
import ast
import itertools
import json
import random
import sys
import sysconfig
import textwrap
from collections.abc import Callable, Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path

FILES_OF_A_PACKAGE = 4
PROSE = ("LICENSE", "LICENCE", "COPYING", "NOTICE", "README")
LEAST_LINES = 3  # of a body, for a docstring to say something of it
# Of the beginnings of documents that a run's easy and hard ones are chosen from.
BEGINNINGS, TOKENS, GIVEN = 160, 48, 8


def main(argv: list[str] | None = None) -> int:
    """Writes the file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--output", type=Path, required=True, help="the file to write")
    parser.add_argument("--each", type=int, default=8, help="prompts of each task (default: 8)")
    parser.add_argument("--characters", type=int, default=300, help="of a prompt, at most")
    parser.add_argument("--seed", type=int, default=0, help="of what is chosen")
    parser.add_argument("--workdir", type=Path, help="a run, for easy and hard ones of its own")
    parser.add_argument("--data", help="prepared data to cut those from (default: the run's)")
    options = parser.parse_args(argv)
    if options.each < 1:
        parser.error(f"--each={options.each}: give 1 or more")
    if options.characters < 100:
        parser.error(f"--characters={options.characters}: give 100 or more")
    lines = easy_and_hard(options.workdir, options.data, options.each) if options.workdir else []
    for task, texts in () if options.workdir else TASKS.items():
        found = texts(random.Random(options.seed), options.characters)
        prompts = list(itertools.islice(unique(found), options.each))
        if len(prompts) < options.each:
            print(
                f"only {len(prompts)} prompts of {task} are installed; ask for fewer with --each, "
                "or install more packages",
                file=sys.stderr,
            )
            return 1
        lines += [json.dumps({"prompt": prompt, "task": task}) + "\n" for prompt in prompts]
    options.output.write_text("".join(lines), encoding="utf-8")
    print(f"{len(lines)} prompts in {options.output}")
    return 0


def easy_and_hard(workdir: Path, data: str | None, each: int) -> list[str]:
    """Returns the lines of so many prompts of each kind, in turns."""
    # Imported here: the other tasks need no model.
    import numpy as np
    from policies import nats_of_rows

    from layerskip_jax.commands.sweep import validation_prompts
    from layerskip_jax.language_model import load
    from layerskip_jax.training.restore import load_run

    model = load(workdir)
    data = data or load_run(workdir).config.data.path
    prompts = validation_prompts(data, max(BEGINNINGS, 2 * each), TOKENS)
    generator = model.generator
    nats = nats_of_rows(generator.weights, generator.config, np.array(prompts), GIVEN)
    order = np.argsort(nats, kind="stable").tolist()
    lines = []
    for easy, hard in zip(order[:each], reversed(order[-each:]), strict=True):
        for task, row in (("easy", easy), ("hard", hard)):
            prompt = model.tokenizer.decode(prompts[row])
            lines.append(json.dumps({"prompt": prompt, "task": task}) + "\n")
    return lines


def unique(texts: Iterator[str]) -> Iterator[str]:
    """Leaves out what came before, as licences do."""
    seen = set()
    for text in texts:
        if text not in seen:
            seen.add(text)
            yield text


def code(chance: random.Random, characters: int) -> Iterator[str]:
    """Yields passages of the standard library that begin and end with a line."""
    library = Path(sysconfig.get_path("stdlib"))
    files = sorted([*library.glob("*.py"), *library.glob("[a-z]*/*.py")])
    files = [file for file in files if "test" not in str(file.relative_to(library))]
    for file in chance.sample(files, len(files)):
        lines = read(file).splitlines(keepends=True)
        start = chance.randrange(len(lines)) // 2 if lines else 0
        text, size = "", 0
        for line in lines[start:]:
            size += len(line)
            if size > characters:
                break
            text += line
        if len(text) >= characters / 2:
            yield text


def docstring_to_code(chance: random.Random, characters: int) -> Iterator[str]:
    """Yields heads and docstrings of functions, without their bodies."""
    for package in shuffled_packages(chance):
        files = [f for f in package.files or () if f.suffix == ".py" and ".." not in f.parts]
        for file in chance.sample(files, min(len(files), FILES_OF_A_PACKAGE)):
            heads = list(function_heads(read(Path(package.locate_file(file)))))
            heads = [head for head in heads if 80 <= len(head) <= characters]
            if heads:
                yield chance.choice(heads)


def function_heads(source: str) -> Iterator[str]:
    """Yields the lines of each documented function up to its docstring's end."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):  # files for other versions of Python
        return
    lines = source.splitlines(keepends=True)
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or not ast.get_docstring(node):
            continue
        said = node.body[0]
        if node.end_lineno - said.end_lineno >= LEAST_LINES and said.lineno > node.lineno:
            yield textwrap.dedent("".join(lines[node.lineno - 1 : said.end_lineno]))


def prose(chance: random.Random, characters: int) -> Iterator[str]:
    """Yields passages of licences and READMEs that begin with a paragraph and end with a word."""
    for package in shuffled_packages(chance):
        texts = [package.metadata.get_payload() or package.metadata.get("Description") or ""]
        texts += [
            read(Path(package.locate_file(file)))
            for file in package.files or ()
            if file.name.upper().startswith(PROSE) and file.suffix in ("", ".txt", ".md", ".rst")
        ]
        for text in chance.sample(texts, min(len(texts), FILES_OF_A_PACKAGE)):
            paragraphs = [p for p in text.split("\n\n") if is_prose(p)]
            if paragraphs:
                passage = chance.choice(paragraphs)[:characters].rsplit(maxsplit=1)[0]
                yield textwrap.dedent(passage)


def is_prose(paragraph: str) -> bool:
    """Returns whether it is mostly words, and long enough to go on with."""
    text = " ".join(paragraph.split())  # without the padding of tables
    letters = sum(c.isalpha() or c == " " for c in text)
    return len(text) >= 150 and letters > 0.9 * len(text)


def repetitive(chance: random.Random, characters: int) -> Iterator[str]:
    """Yields records after a rule, the last of them begun."""
    while True:
        start, step = chance.randrange(1, 90), chance.randrange(1, 9)
        name = chance.choice(("alpha", "worker", "sample", "item", "node", "batch"))
        number = itertools.count(start, step)
        record = chance.choice(
            (
                lambda n, name=name: f"2024-05-01 12:00:{n % 60:02d} INFO {name} {n} done\n",
                lambda n, name=name: f"| {name} {n} | {n * 10} | yes |\n",
                lambda n, name=name: f"- {name} {n}: see {name}_{n}.txt\n",
                lambda n, name=name: f'    register("{name}_{n}", {name}_{n})\n',
            )
        )
        text = ""
        while len(more := record(next(number))) + len(text) <= characters:
            text += more
        yield text


def shuffled_packages(chance: random.Random) -> list[Distribution]:
    """Returns the installed packages, in an order that only depends on chance and their names."""
    by_name = {package.metadata["Name"].lower(): package for package in distributions()}
    names = sorted(by_name)
    return [by_name[name] for name in chance.sample(names, len(names))]


def read(file: Path) -> str:
    """Returns a file's text, nothing where it is gone or no UTF-8."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


TASKS: dict[str, Callable[[random.Random, int], Iterator[str]]] = {
    "code": code,
    "docstring-to-code": docstring_to_code,
    "prose": prose,
    "repetitive": repetitive,
}


if __name__ == "__main__":
    sys.exit(main())

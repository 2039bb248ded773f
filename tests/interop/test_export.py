"""`layerskip export`, and transformers reading what it wrote."""

import argparse
import dataclasses
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from layerskip_jax.commands.export import export, main, parse_size
from layerskip_jax.config import RunConfig
from layerskip_jax.interop.model_card import write_model_card
from layerskip_jax.model.config import ModelConfig
from layerskip_jax.schema import UserError
from tests.interop.helpers import CONFIG, END, EXITS, STEP

TEXT = "The cat sat on the mat.\n\n  Äh, 'really'?  def f(x):\n\treturn x + 1 "


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    output = tmp_path_factory.mktemp("exported") / "model"
    figures = output.parent / "figures.json"
    assert main([f"--workdir={run[0].path}", f"--output={output}", f"--json={figures}"]) == 0
    return output


def logits(definition, parameters, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    model = definition.model(parameters)
    return np.asarray(model.logits(jnp.asarray(tokens), positions, jnp.ones_like(positions)))


def transformers_logits(folder, tokens):
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    with torch.no_grad():
        return model, model(torch.tensor(tokens)).logits.numpy()


@pytest.mark.parametrize(
    "changes, shard_size",
    [
        ({}, "4GiB"),
        ({"tie_embeddings": True}, "10KB"),
        ({"num_kv_heads": 4, "head_dim": 12, "vocab_size": 290, "norm_eps": 1e-3}, "20kb"),
    ],
)
def test_transformers_computes_the_same_logits(make_run, tmp_path, changes, shard_size):
    folder, definition, parameters = make_run(dataclasses.replace(CONFIG, **changes))
    arguments = [f"--workdir={folder.path}", f"--output={tmp_path / 'out'}"]
    assert main([*arguments, f"--max-shard-size={shard_size}"]) == 0
    tokens = np.random.default_rng(0).integers(0, 290, (2, 48))
    model, theirs = transformers_logits(tmp_path / "out", tokens)
    assert model.dtype == torch.float32
    assert np.abs(theirs - logits(definition, parameters, tokens)).max() < 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_transformers_loads_the_stored_dtype(run, tmp_path, dtype):
    folder, _, parameters = run
    export(folder.path, tmp_path / "out", dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == getattr(torch, dtype)
    embedding = model.get_input_embeddings().weight.detach().float().numpy()
    expected = np.asarray(parameters["embedding"].astype(dtype).astype(jnp.float32))
    np.testing.assert_array_equal(embedding, expected)


def test_the_tokenizer_is_the_runs(run, exported):
    ours = Tokenizer.from_file(str(run[0].tokenizer_file))
    theirs = AutoTokenizer.from_pretrained(exported)
    assert theirs(TEXT)["input_ids"] == ours.encode(TEXT).ids
    assert theirs.decode(theirs(TEXT)["input_ids"]) == TEXT
    assert (theirs.eos_token, theirs.eos_token_id, theirs(END)["input_ids"]) == (END, 0, [0])
    assert theirs.model_max_length == 64


def test_greedy_generation_follows_the_logits(run, exported):
    _, definition, parameters = run
    model = AutoModelForCausalLM.from_pretrained(exported)
    tokens = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=6, do_sample=False).numpy()
    greedy = logits(definition, parameters, tokens)[0].argmax(axis=-1)
    assert tokens.shape == (1, 9)
    np.testing.assert_array_equal(tokens[0, 3:], greedy[2:-1])
    assert model.generation_config.eos_token_id == 0
    assert model.generation_config.bos_token_id is None


def test_the_model_card_drafts_as_it_says(exported, monkeypatch, capsys):
    card = (exported / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert "assistant_early_exit=1" in code
    monkeypatch.chdir(exported)
    names = {}
    exec(code, names)
    plain = names["model"].generate(**names["prompt"], do_sample=False, max_new_tokens=32)
    assert torch.equal(names["tokens"], plain)
    assert capsys.readouterr().out


def test_the_model_card_gives_the_perplexity_of_the_exported_step(exported):
    card = (exported / "README.md").read_text()
    assert f"at step {STEP}." in card
    for entry in EXITS:
        assert f"| {entry['layers']} | {entry['loss']:.4f} | {entry['perplexity']:.2f} |" in card


def test_the_hub_reads_the_perplexity_of_each_exit_from_the_card(exported):
    data = ModelCard.load(exported / "README.md").data
    assert data.library_name == "transformers" and "layerskip" in data.tags
    figures = {result.metric_name: result.metric_value for result in data.eval_results}
    assert figures == {
        f"Perplexity of the first {entry['layers']} layers": round(entry["perplexity"], 2)
        for entry in EXITS
    }


def test_the_card_leaves_out_exits_whose_figures_are_not_finite():
    """They are null in the evaluations of a run."""
    null = {"layers": 1, "loss": None, "perplexity": None}
    card = write_model_card(
        RunConfig(),
        model=ModelConfig(num_layers=2),
        step=3,
        dtype="float32",
        evaluation={"step": 3, "exits": [null, {"layers": 2, "loss": 1.0, "perplexity": 2.72}]},
        before={"step": 0, "exits": [null, {**null, "layers": 2}]},
    )
    assert "| 2 | 1.0000 | 2.72 |" in card and "| 1 | " not in card


def test_the_config_says_where_the_model_comes_from(exported):
    settings = json.loads((exported / "config.json").read_text())["layerskip"]
    assert settings["step"] == STEP
    assert settings["early_exit"]["curriculum"] == "last"
    assert settings["layer_dropout"]["p_max"] == 0
    figures = json.loads((exported.parent / "figures.json").read_text())
    assert (figures["step"], figures["dtype"], figures["shards"]) == (STEP, "float32", 1)


def test_a_run_without_evaluations_is_exported(make_run, tmp_path):
    folder, *_ = make_run()
    folder.evaluations_file.unlink()
    export(folder.path, tmp_path / "out", step=STEP)
    assert "Perplexity" not in (tmp_path / "out" / "README.md").read_text()


def test_a_single_layer_has_no_draft(make_run, tmp_path):
    folder, *_ = make_run(dataclasses.replace(CONFIG, num_layers=1))
    export(folder.path, tmp_path / "out")
    assert "assistant_early_exit" not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda folder: folder.data_file.unlink(), r"data\.json is missing"),
        (lambda folder: folder.tokenizer_file.unlink(), r"cannot read the tokenizer"),
    ],
)
def test_an_incomplete_run_is_an_error(make_run, tmp_path, spoil, message):
    folder, *_ = make_run()
    spoil(folder)
    with pytest.raises(UserError, match=message):
        export(folder.path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_larger_than_the_model_is_an_error(make_run, tmp_path):
    folder, *_ = make_run(dataclasses.replace(CONFIG, vocab_size=200))
    with pytest.raises(UserError, match="larger than the model"):
        export(folder.path, tmp_path / "out")


def test_an_unknown_step_is_an_error(run, tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint of step 3; it has \[7\]"):
        export(run[0].path, tmp_path / "out", step=3)


@pytest.mark.parametrize(
    "text, size",
    [("4GB", 4 * 10**9), ("4GiB", 2**32), ("1.5 kb", 1500), ("10mib", 10 * 2**20), ("7", 7)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "4TB", "4 giga"])
def test_what_is_no_size_is_an_error(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is no size"):
        parse_size(text)

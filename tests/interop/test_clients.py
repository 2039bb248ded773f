"""The snippets of docs/clients.md do what the page says."""

import re
from pathlib import Path

import numpy as np
import torch

import layerskip_jax
from layerskip_jax.commands.export import export

PAGE = Path(__file__).parents[2] / "docs" / "clients.md"


def test_the_page_of_clients(run, tmp_path, monkeypatch):
    export(run[0].path, tmp_path / "export" / "mine")
    export(run[0].path, tmp_path / "export" / "early", exit_layer=2)
    monkeypatch.chdir(tmp_path)
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(block, names)
    assert torch.equal(names["drafted"], names["plain"])
    assert torch.equal(names["same"], names["early"])
    assert not torch.equal(names["early"], names["plain"])
    ours = layerskip_jax.load(run[0].path, dtype="float32")
    prompt = names["prompt"]["input_ids"][0].tolist()
    for name, exit_layer in (("plain", None), ("early", 2)):
        tokens = ours.complete([prompt], 32, exit_layer=exit_layer).generation.tokens[0]
        np.testing.assert_array_equal(names[name][0, len(prompt) :], tokens)

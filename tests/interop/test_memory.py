"""An export holds one tensor at a time, however large the model."""

import json
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from layerskip_jax.config import RunConfig
from layerskip_jax.model.config import ModelConfig
from layerskip_jax.model.definition import ModelDefinition
from layerskip_jax.run_folder.paths import RunFolder
from layerskip_jax.training.checkpoint import Checkpoints
from tests.interop.helpers import END

# 0.3 billion parameters: 1.2 GB of float32, in tensors of 17 MB at most.
LARGE = ModelConfig(
    vocab_size=2048, num_layers=24, model_dim=1024, ffn_dim=4096, num_heads=8, num_kv_heads=8,
    head_dim=128, max_sequence_length=64,
)  # fmt: skip

EXPORT = """
import resource, sys
from layerskip_jax.cli import main
import layerskip_jax.commands.export, jax
jax.devices()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
code = main(["export", *sys.argv[1:]])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
sys.exit(code)
"""


@pytest.fixture(scope="module")
def large_run(tmp_path_factory, tokenizer_file):
    """The folder of a run whose checkpoint, saved from a mesh of eight, is over a gigabyte."""
    folder = RunFolder(tmp_path_factory.mktemp("large"))
    definition = ModelDefinition(LARGE)
    mesh = jax.make_mesh((8,), ("fsdp",))

    def make(path, leaf):
        axis = 1 if path[0].key == "layers" else 0
        spec = jax.sharding.PartitionSpec(*[None] * axis, "fsdp")
        zeros = np.zeros(leaf.shape, leaf.dtype)
        return jax.device_put(zeros, jax.sharding.NamedSharding(mesh, spec))

    parameters = jax.tree_util.tree_map_with_path(make, definition.shapes)
    checkpoints = Checkpoints(folder.checkpoints, keep=1)
    checkpoints.save(1, parameters, None)
    checkpoints.close()
    config = RunConfig(model=LARGE)
    folder.config_file.write_text(json.dumps(config.to_dict()))
    manifest = {"end_token": END, "end_token_id": 0, "vocab_size": 290}
    folder.data_file.write_text(json.dumps(manifest))
    folder.tokenizer_file.write_bytes(tokenizer_file.read_bytes())
    return folder, 4 * definition.num_parameters


def _export(run, output, **options):
    arguments = [f"--workdir={run.path}", f"--output={output}", "--dtype=bfloat16"]
    return subprocess.Popen(
        [sys.executable, "-c", EXPORT, *arguments], stdout=subprocess.PIPE, text=True, **options
    )


@pytest.mark.slow
def test_the_peak_is_a_fraction_of_the_checkpoint(large_run, tmp_path):
    run, size = large_run
    assert size > 1.2e9
    process = _export(run, tmp_path / "out")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    peak = int(output.split()[-1]) * 1024
    assert peak < size / 4, f"{peak / 1e6:.0f} MB for a checkpoint of {size / 1e6:.0f} MB"
    written = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert written > size / 2


@pytest.mark.slow
def test_killed_in_the_middle_it_leaves_nothing_that_loads(large_run, tmp_path):
    run, size = large_run
    process = _export(run, tmp_path / "out")
    deadline = time.monotonic() + 120
    while not (parts := list(tmp_path.glob(".out.*/model.safetensors"))) or (
        parts[0].stat().st_size < size / 20
    ):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("config.json"))
    # The next one clears up.
    process = _export(run, tmp_path / "out")
    process.communicate(timeout=300)
    assert process.returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

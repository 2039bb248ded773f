"""layerskip import: make a run of a published model, for every other verb to read.

The source is a Hugging Face folder (safetensors) or a GGUF file, quantized or not. The folder of
the run then holds the model's config, its tokenizer, and a checkpoint of step 0.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path, PurePath

from layerskip_jax.commands.arguments import make_parser
from layerskip_jax.config import RunConfig
from layerskip_jax.data.tokenizer import file_sha256
from layerskip_jax.distributed.mesh import MeshShape, make_mesh
from layerskip_jax.distributed.sharding import ShardingRules, parameter_shardings
from layerskip_jax.interop.pretrained import open_pretrained
from layerskip_jax.interrupts import raise_if_interrupted
from layerskip_jax.model.config import DTYPES
from layerskip_jax.model.definition import ModelDefinition
from layerskip_jax.run_folder.atomic import staged_folder, write_json, write_text
from layerskip_jax.run_folder.claim import write_published
from layerskip_jax.run_folder.object_store import AnyPath, is_remote
from layerskip_jax.run_folder.paths import RunFolder, run_folder
from layerskip_jax.schema import UserError
from layerskip_jax.training.checkpoint import Checkpoints

logger = logging.getLogger(__name__)


def import_model(
    source: str | Path, workdir: str | PurePath, *, dtype: str = "bfloat16"
) -> RunConfig:
    """Makes the folder of a run from published weights, sharded over all devices.

    Args:
      source: a Hugging Face folder or a .gguf file.
      workdir: the folder to make; absent or empty.
      dtype: what the model computes in; the parameters are kept in float32.

    Raises:
      UserError: see `open_pretrained`, or `workdir` is taken or cannot be written.
    """
    pretrained = open_pretrained(source)
    model = dataclasses.replace(pretrained.config, dtype=dtype)
    training = RunConfig().training
    if model.exits:  # which are what such a run trains
        training = dataclasses.replace(training, trainable="exits")
    config = dataclasses.replace(RunConfig(), model=model, init_from=str(source), training=training)

    with _new_run(workdir) as folder:
        write_text(folder.tokenizer_file, pretrained.tokenizer_json)
        write_published(folder, pretrained.files)
        data = {
            "end_token": pretrained.end_token,
            "end_token_id": pretrained.end_token_id,
            "vocab_size": model.vocab_size,
            "tokenizer_sha256": file_sha256(folder.tokenizer_file),
            "fingerprint": "",
        }
        write_json(folder.data_file, data)
        definition = ModelDefinition(model)
        mesh = make_mesh(MeshShape(data=1, fsdp=-1))
        shardings = parameter_shardings(
            definition.shapes, definition.logical_axes, mesh, ShardingRules()
        )
        checkpoints = Checkpoints(folder.checkpoints, keep=1)
        checkpoints.save(0, pretrained.parameters(shardings), None, force=True)
        checkpoints.close()
        # Last, since it makes the folder a run.
        write_json(folder.config_file, config.to_dict())
    logger.info("%s holds %s parameters", workdir, f"{definition.num_parameters:,}")
    return config


@contextlib.contextmanager
def _new_run(workdir: str | PurePath) -> Iterator[RunFolder]:
    """Yields the folder of a run that is one, with its config.json, when all of it is written."""

    def check(folder: AnyPath) -> None:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"--workdir={folder} is not empty; take a new folder")

    if is_remote(workdir):
        folder = run_folder(workdir)
        check(folder.home)
        yield folder
        raise_if_interrupted()
        folder.upload()
        return
    with staged_folder(Path(workdir), check) as stage:
        yield RunFolder(stage)


def main(argv: list[str]) -> int:
    """Runs the verb and returns its exit code."""
    parser = make_parser("import", __doc__)
    parser.add_argument("--source", required=True, help="Hugging Face folder, or .gguf file")
    parser.add_argument("--workdir", required=True, help="folder of the run to make")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="to compute in")
    options = parser.parse_args(argv)
    config = import_model(options.source, options.workdir, dtype=options.dtype).model
    print(
        f"{options.workdir}: {config.num_layers} layers of width {config.model_dim}, vocabulary "
        f"{config.vocab_size:,}, context {config.max_sequence_length:,}"
    )
    return 0

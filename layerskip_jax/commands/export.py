"""layerskip export: write a run's model as a folder that Hugging Face transformers loads."""

import argparse
import dataclasses
import json
import re
from pathlib import Path, PurePath
from typing import Any

from layerskip_jax import __version__
from layerskip_jax.commands.arguments import make_run_parser, write_figures
from layerskip_jax.config import RunConfig
from layerskip_jax.interop.exits_file import exits_bytes
from layerskip_jax.interop.folder import (
    DEFAULT_SHARD_BYTES,
    check_output,
    check_tokenizer,
    write_folder,
)
from layerskip_jax.interop.huggingface import STORED_DTYPES, to_hugging_face
from layerskip_jax.interop.model_card import write_model_card
from layerskip_jax.model.config import ModelConfig
from layerskip_jax.model.definition import ModelDefinition
from layerskip_jax.model.exits import ExitsConfig
from layerskip_jax.run_folder.object_store import require_local
from layerskip_jax.run_folder.paths import RunFolder, open_run, read_json_lines
from layerskip_jax.schema import UserError, require_whole
from layerskip_jax.training.checkpoint import Checkpoints

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def export(
    workdir: str | PurePath,
    output: str | Path,
    *,
    step: int | None = None,
    exit_layer: int | None = None,
    dtype: str = "float32",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes a checkpoint of a run as a Hugging Face folder, tensor by tensor.

    Args:
      workdir: the run's folder.
      output: the folder to write.
      step: the checkpoint; None takes the newest.
      exit_layer: E, to export the first E layers with the shared head, a model of its own; None
        exports all. Its own exits, which were trained for the last layer, are then left out.
      dtype: the stored tensors' dtype, one of `huggingface.STORED_DTYPES`.
      max_shard_bytes: tensor bytes in a file.
      overwrite: whether an earlier export in `output` may be replaced.

    Returns:
      What was written: output, step, layers, dtype, and the counts of `write_folder`.

    Raises:
      UserError: no such run or checkpoint, or see `write_folder`.
    """
    require_local(output, "--output")
    output = Path(output)
    folder, config = open_run(workdir)
    manifest = folder.data()
    layers = config.model.num_layers
    require_whole("max_shard_bytes", max_shard_bytes)
    if exit_layer is not None:
        require_whole("exit_layer", exit_layer)
    if exit_layer is not None and not 1 <= exit_layer <= layers:
        raise UserError(f"--exit={exit_layer} must be in 1..{layers}, the model's layers")
    model = dataclasses.replace(config.model, num_layers=exit_layer or layers)
    if model.num_layers < layers:
        model = dataclasses.replace(model, exits=ExitsConfig())
    end_token, end_token_id = manifest["end_token"], manifest["end_token_id"]
    # Before the parameters are read, which takes minutes for a large model.
    check_output(output, overwrite=overwrite)
    check_tokenizer(folder.tokenizer_file, model, end_token, end_token_id)
    checkpoints = Checkpoints(folder.checkpoints)
    step = checkpoints.require_step(step)
    parameters = checkpoints.open_parameters(step, ModelDefinition(config.model).shapes)
    checkpoints.close()

    counts = write_folder(
        output,
        to_hugging_face(parameters, model),
        config=model,
        tokenizer_file=folder.tokenizer_file,
        end_token=end_token,
        end_token_id=end_token_id,
        model_card=_model_card(folder, config, model, step, dtype, manifest),
        provenance=_provenance(config, model, step),
        published=folder.published_files(),
        exits=exits_bytes(parameters["exits"], model.exits) if model.exits else b"",
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
    )
    exported = {"output": str(output), "step": step, "layers": model.num_layers, "dtype": dtype}
    if model.exits:
        exported["exits"] = dataclasses.asdict(model.exits)
    return {**exported, **counts}


def _model_card(
    folder: RunFolder,
    config: RunConfig,
    model: ModelConfig,
    step: int,
    dtype: str,
    manifest: dict[str, Any],
) -> str:
    """Returns the card, with what the run's folder says of the step that is exported."""
    records = read_json_lines(folder.evaluations_file)
    evaluations = [record for record in records if record["step"] <= step]
    speculation = None
    if folder.speculation_file.is_file():
        speculation = json.loads(folder.speculation_file.read_text())
    return write_model_card(
        config,
        model=model,
        step=step,
        dtype=dtype,
        evaluation=evaluations[-1] if evaluations else None,
        before=next((record for record in records if record["step"] == 0), None),
        data=manifest,
        speculation=speculation,
    )


def _provenance(config: RunConfig, model: ModelConfig, step: int) -> dict[str, Any]:
    """Returns what the export's config.json says of where it comes from."""
    provenance = {
        "version": __version__,
        "step": step,
        "layers_trained": config.model.num_layers,
    }
    if step:
        provenance |= {
            "seed": config.seed,
            "layer_dropout": dataclasses.asdict(config.layer_dropout),
            "early_exit": dataclasses.asdict(config.early_exit),
        }
    if model.exits:
        provenance["exits"] = dataclasses.asdict(model.exits)
    return provenance


def parse_size(text: str) -> int:
    """Returns the bytes of a size such as `4GB` (4 * 10^9) or `4GiB` (4 * 2^30).

    Raises:
      argparse.ArgumentTypeError: it is none, or less than a byte.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?|)B?", text.strip().upper())
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 500MB or 4GiB")
    return size


def main(argv: list[str]) -> int:
    """Runs the verb and returns its exit code."""
    parser = make_run_parser("export", __doc__)
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument(
        "--exit", type=int, metavar="E", help="export the first E layers, as a model of its own"
    )
    parser.add_argument("--dtype", choices=STORED_DTYPES, default="float32", help="of the tensors")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    parser.add_argument(
        "--max-shard-size",
        type=parse_size,
        default=DEFAULT_SHARD_BYTES,
        metavar="SIZE",
        help="largest file of tensors, such as 500MB (default: 4GiB)",
    )
    options = parser.parse_args(argv)
    result = export(
        options.workdir,
        options.output,
        step=options.step,
        exit_layer=options.exit,
        dtype=options.dtype,
        max_shard_bytes=options.max_shard_size,
        overwrite=options.overwrite,
    )
    files = "1 file" if result["shards"] == 1 else f"{result['shards']} files"
    print(
        f"{result['output']}: step {result['step']}, {result['layers']} layers, "
        f"{result['parameters']:,} parameters, "
        f"{result['dtype']}, {files} of tensors"
    )
    if options.json:
        write_figures(options.json, result)
    return 0

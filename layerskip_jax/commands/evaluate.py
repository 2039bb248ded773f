"""layerskip evaluate: loss and perplexity at every exit, on the validation set."""

import dataclasses
import json
from pathlib import PurePath

import jax
from rich.console import Console

from layerskip_jax.commands.arguments import make_run_parser
from layerskip_jax.commands.tables import make_table
from layerskip_jax.config import MeshConfig
from layerskip_jax.data.manifest import read_manifest
from layerskip_jax.distributed.mesh import MeshShape
from layerskip_jax.layer_dropout import LayerDropoutConfig
from layerskip_jax.run_folder.atomic import write_json
from layerskip_jax.run_folder.paths import open_run
from layerskip_jax.schema import UserError
from layerskip_jax.training.checkpoint import Checkpoints
from layerskip_jax.training.evaluation import evaluate_exits, make_exit_scorer, validation_batches
from layerskip_jax.training.setup import make_setup


def evaluate(
    workdir: str | PurePath, *, step: int | None = None, data: str | None = None, limit: int = 0
) -> dict:
    """Scores every exit of a run, on all devices, sharded as one `fsdp` axis.

    Args:
      workdir: the run's folder.
      step: the checkpoint; None takes the newest.
      data: prepared data with the run's tokenizer; None takes the run's own.
      limit: batches to score; 0 takes the whole validation set.

    Returns:
      `{"step": ..., "exits": [{"layers": E, "loss": ..., "perplexity": ...}, ...]}`.

    Raises:
      UserError: no such run or checkpoint, or data of another tokenizer.
    """
    folder, config = open_run(workdir)
    trained_on = json.loads(folder.data_file.read_text())
    path = data or config.data.path
    if not path:
        raise UserError(f"{workdir} was trained on no data here; name prepared data with --data")
    manifest = read_manifest(path)
    if manifest.tokenizer_sha256 != trained_on["tokenizer_sha256"]:
        raise UserError(
            f"{path} was prepared with another tokenizer ({manifest.tokenizer_sha256[:12]}) than "
            f"the run's ({trained_on['tokenizer_sha256'][:12]}); prepare it with "
            f"--tokenizer={folder.shown(folder.tokenizer_file)}"
        )
    devices, training = jax.device_count(), config.training
    if training.gradient_accumulation:
        rows = -(-training.batch_size // training.gradient_accumulation // devices) * devices
    else:
        rows = training.rows_per_device * devices
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, path=path),
        mesh=MeshConfig(MeshShape(data=1, fsdp=-1), config.mesh.rules),
        training=dataclasses.replace(
            training, batch_size=rows, gradient_accumulation=1, rows_per_device=0
        ),
        layer_dropout=LayerDropoutConfig(),
    )
    setup = make_setup(config)
    with jax.set_mesh(setup.mesh):
        checkpoints = Checkpoints(folder.checkpoints)
        step = checkpoints.require_step(step)
        parameters = checkpoints.restore_parameters(step, setup.abstract_state().parameters)
        checkpoints.close()
        scorer = make_exit_scorer(
            setup.definition, chunk=config.training.loss_chunk, layout=setup.layout
        )
        exits = evaluate_exits(scorer, parameters, validation_batches(config, setup, limit))
    return {"step": step, "exits": exits}


def main(argv: list[str]) -> int:
    """Runs the verb and returns its exit code."""
    parser = make_run_parser("evaluate", __doc__)
    parser.add_argument("--data", help="prepared data (default: what the run trained on)")
    parser.add_argument("--batches", type=int, default=0, help="batches to score (default: all)")
    options = parser.parse_args(argv)
    result = evaluate(options.workdir, step=options.step, data=options.data, limit=options.batches)
    table = make_table(
        f"Validation loss by exit, step {result['step']}",
        ("layers", "loss (nats/token)", "perplexity"),
        [
            (str(e["layers"]), f"{e['loss']:.4f}", f"{e['perplexity']:,.2f}")
            for e in result["exits"]
        ],
    )
    Console().print(table)
    if options.json:
        write_json(options.json, result)
    return 0

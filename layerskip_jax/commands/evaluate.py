"""layerskip evaluate: loss and perplexity at every exit, on the validation set.

With `--choices=FILE.jsonl` it is accuracy instead, at every exit and under each exit policy over
a grid of thresholds. Each line is `{"prompt": TEXT, "choices": [TEXT, ...], "answer": INDEX or
TEXT}`; a choice's score is the log-likelihood of its tokens after the prompt.

With `--completions=FILE.jsonl` it is exact match, of the greedy completions of a quarter, a half
and all of the layers. Each line has a prompt and the completion that is wanted, as `prepare
--prompt-field --completion-field` reads them.
"""

import dataclasses
from pathlib import Path, PurePath

import jax

from layerskip_jax.commands.arguments import (
    add_on_damaged,
    make_run_parser,
    numbers,
    prepared_data,
    write_figures,
)
from layerskip_jax.commands.tables import make_console, make_table
from layerskip_jax.config import MeshConfig
from layerskip_jax.data.manifest import read_manifest
from layerskip_jax.data.tokenizer import load_tokenizer
from layerskip_jax.decoding.exit_policy import POLICIES, candidate_exits
from layerskip_jax.distributed.mesh import MeshShape
from layerskip_jax.evaluation.choices import CHOICE_SCORES, read_questions, score_choices
from layerskip_jax.evaluation.completions import chosen_exits, exact_match, read_completions
from layerskip_jax.language_model import load
from layerskip_jax.layer_dropout import LayerDropoutConfig
from layerskip_jax.report.choice_figure import choice_figure
from layerskip_jax.report.drawing import svg_text
from layerskip_jax.run_folder.atomic import named_writes, write_text
from layerskip_jax.run_folder.paths import open_run
from layerskip_jax.schema import UserError, require, require_whole
from layerskip_jax.training.checkpoint import Checkpoints
from layerskip_jax.training.evaluation import (
    ValidationSet,
    evaluate_exits,
    make_exit_scorer,
    not_finite,
)
from layerskip_jax.training.setup import make_setup


def evaluate(
    workdir: str | PurePath,
    *,
    step: int | None = None,
    data: str | None = None,
    limit: int = 0,
    on_damaged: str | None = None,
) -> dict:
    """Scores every exit of a run, on all devices, sharded as one `fsdp` axis.

    Args:
      workdir: the run's folder.
      step: the checkpoint; None takes the newest.
      data: prepared data with the run's tokenizer; None takes the run's own.
      limit: batches to score; 0 takes the whole validation set.
      on_damaged: as `config.data.on_damaged`; None takes the run's own.

    Returns:
      `{"step": ..., "left_out": ..., "exits": [{"layers": E, "loss": ..., "perplexity": ...},
      ...]}`, where `left_out` counts the damaged records.

    Raises:
      ConfigError: `limit` is below 0 or no whole number.
      UserError: no such run or checkpoint, data of another tokenizer, or a loss that is not
        finite.
    """
    require_whole("limit", limit)
    require(limit >= 0, f"--batches={limit} must be at least 0, which takes all")
    folder, config = open_run(workdir)
    trained_on = folder.data()
    path = prepared_data(workdir, config.data.path, data)
    manifest = read_manifest(path)
    if manifest.tokenizer_sha256 != trained_on["tokenizer_sha256"]:
        raise UserError(
            f"{path} was prepared with another tokenizer ({manifest.tokenizer_sha256[:12]}) than "
            f"the run's ({trained_on['tokenizer_sha256'][:12]}); prepare it with "
            f"--tokenizer={folder.shown(folder.tokenizer_file)}"
        )
    manifest.check_tokens(config.model.vocab_size, path)
    devices, training = jax.device_count(), config.training
    if training.gradient_accumulation:
        rows = -(-training.batch_size // training.gradient_accumulation // devices) * devices
    else:
        rows = training.rows_per_device * devices
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(
            config.data, path=path, on_damaged=on_damaged or config.data.on_damaged
        ),
        mesh=MeshConfig(MeshShape(data=1, fsdp=-1), config.mesh.rules),
        training=dataclasses.replace(
            training, batch_size=rows, batch_ramp=(), gradient_accumulation=1, rows_per_device=0
        ),
        layer_dropout=LayerDropoutConfig(),
    )
    validation = ValidationSet(config)
    setup = make_setup(config)
    with jax.set_mesh(setup.mesh):
        checkpoints = Checkpoints(folder.checkpoints)
        step = checkpoints.require_step(step)
        parameters = checkpoints.restore_parameters(step, setup.abstract_state().parameters)
        checkpoints.close()
        scorer = make_exit_scorer(
            setup.definition, chunk=config.training.loss_chunk, layout=setup.layout
        )
        exits = evaluate_exits(scorer, parameters, validation.batches(setup.placement, limit))
    if wrong := not_finite(exits):
        raise UserError(
            f"step {step}: the loss of the exits {', '.join(map(str, wrong))} (in layers) is not "
            f"finite in {config.model.dtype}: their weights or what is computed of them are not; "
            "take another checkpoint with --step"
        )
    return {"step": step, "left_out": validation.left_out, "exits": exits}


def main(argv: list[str]) -> int:
    """Runs the verb and returns its exit code."""
    parser = make_run_parser("evaluate", __doc__)
    parser.add_argument("--data", help="prepared data (default: what the run trained on)")
    parser.add_argument("--batches", type=int, default=0, help="batches to score (default: all)")
    parser.add_argument("--choices", type=Path, help="questions, as JSON lines")
    parser.add_argument(
        "--choice-score", choices=CHOICE_SCORES,
        help="of the log-probabilities of a choice's tokens (default: sum)",
    )  # fmt: skip
    parser.add_argument(
        "--completions", type=Path, help="prompts with their completions, as JSON lines"
    )
    parser.add_argument("--prompt-field", help="of --completions (default: prompt)")
    parser.add_argument("--completion-field", help="of --completions (default: completion)")
    parser.add_argument(
        "--exits", type=numbers, metavar="E,...", help="of --completions (default: L/4, L/2, L)"
    )
    add_on_damaged(parser)
    options = parser.parse_args(argv)
    if options.completions is not None:
        return _completions(options)
    for name in ("prompt_field", "completion_field", "exits"):
        option = f"--{name.replace('_', '-')}"
        given = getattr(options, name) is not None
        require(not given, f"{option} says nothing without --completions")
    if options.choices is not None:
        return _choices(options)
    require(options.choice_score is None, "--choice-score says nothing without --choices")
    result = evaluate(
        options.workdir,
        step=options.step,
        data=options.data,
        limit=options.batches,
        on_damaged=options.on_damaged,
    )
    table = make_table(
        f"Validation loss by exit, step {result['step']}",
        ("layers", "loss (nats/token)", "perplexity"),
        [
            (str(e["layers"]), f"{e['loss']:.4f}", f"{e['perplexity']:,.2f}")
            for e in result["exits"]
        ],
    )
    make_console().print(table)
    if result["left_out"]:
        print(f"{result['left_out']} damaged records were left out.")
    if options.json:
        write_figures(options.json, result)
    return 0


def evaluate_choices(
    workdir: str | PurePath, file: Path, *, step: int | None = None, score: str = "sum"
) -> dict:
    """Returns what `score_choices` does of a run, with its `step`, `questions` and `score`.

    Policies leave at the default candidate exits, every eighth of the layers. The policy `learned`
    is among them where the model has a classifier.

    Args:
      workdir: the run's folder.
      file: see `read_questions`.
      step: the checkpoint; None takes the newest.
      score: `sum` or `mean`.

    Raises:
      ConfigError: `score` is neither, or the model has one layer.
      UserError: no such run or checkpoint, or the file is not as it must be.
    """
    folder, config = open_run(workdir)
    exits = candidate_exits(config.model.num_layers)
    questions = read_questions(
        file,
        load_tokenizer(folder.tokenizer_file),
        end_token=folder.data()["end_token_id"],
        context=config.model.max_sequence_length,
    )
    checkpoints = Checkpoints(folder.checkpoints)
    step = checkpoints.require_step(step)
    checkpoints.close()
    generator = load(workdir, step=step).generator
    policies = [
        name for name in POLICIES if name != "learned" or generator.weights.classifier is not None
    ]
    result = score_choices(
        generator.weights, generator.config, questions, exits=exits, policies=policies, score=score
    )
    about = {"step": step, "questions": len(questions), "score": score, "candidates": list(exits)}
    return {**about, **result}


def _choices(options) -> int:
    """Runs `--choices`, prints it, and writes the figure into the run's folder."""
    for name, value in (("--data", options.data), ("--batches", options.batches or None)):
        require(value is None, f"{name} says nothing with --choices, which takes no validation set")
    result = evaluate_choices(
        options.workdir, options.choices, step=options.step, score=options.choice_score or "sum"
    )
    rows = [("one exit", "", f"{e['layers']}", f"{e['accuracy']:.1%}") for e in result["exits"]]
    sections = [len(rows) - 1]
    for name, curve in result["policies"].items():
        # Of thresholds that run the same layers to the same accuracy, the most careful.
        seen: set[tuple[float, float]] = set()
        for point in curve:
            key = (round(point["layers"], 2), point["accuracy"])
            if key not in seen:
                seen.add(key)
                rows.append(
                    (name, f"{point['threshold']:g}", f"{key[0]:.2f}", f"{point['accuracy']:.1%}")
                )
        sections.append(len(rows) - 1)
    table = make_table(
        f"{result['questions']} questions by the {result['score']} of log-probabilities, step "
        f"{result['step']}",
        ("exit", "threshold", "layers run", "right"),
        rows,
        left=("exit",),
        sections=sections,
        caption="Layers run: the mean over the tokens of the choices, whose keys and values are "
        "the whole model's. A policy's candidate exits: "
        f"{', '.join(map(str, result['candidates']))}.",
    )
    make_console().print(table)
    folder, _ = open_run(options.workdir)
    with named_writes(folder.choices_figure):
        write_text(folder.choices_figure, svg_text(choice_figure(result)))
    folder.upload()
    if options.json:
        write_figures(options.json, result)
    return 0


def evaluate_completions(
    workdir: str | PurePath,
    file: Path,
    *,
    step: int | None = None,
    exits: tuple[int, ...] | None = None,
    prompt_field: str = "prompt",
    completion_field: str = "completion",
) -> dict:
    """Returns what `exact_match` does of a run, with its `step` and the number of `completions`.

    Args:
      workdir: the run's folder.
      file: see `read_completions`, like the fields.
      step: the checkpoint; None takes the newest.
      exits: in layers; see `chosen_exits`.
      prompt_field: the field with the prompt.
      completion_field: the field with the completion.

    Raises:
      ConfigError: an exit is none of the model's.
      UserError: no such run or checkpoint, or the file is not as it must be.
    """
    folder, config = open_run(workdir)
    exits = chosen_exits(config.model.num_layers, exits)
    wanted = read_completions(
        file,
        load_tokenizer(folder.tokenizer_file),
        context=config.model.max_sequence_length,
        prompt_field=prompt_field,
        completion_field=completion_field,
    )
    checkpoints = Checkpoints(folder.checkpoints)
    step = checkpoints.require_step(step)
    checkpoints.close()
    found = exact_match(load(workdir, step=step), wanted, exits)
    return {"step": step, "completions": len(wanted), "exits": found}


def _completions(options) -> int:
    """Runs `--completions`, and prints it."""
    for name, value in (
        ("--data", options.data), ("--batches", options.batches or None),
        ("--choices", options.choices), ("--choice-score", options.choice_score),
        ("--on-damaged", options.on_damaged),
    ):  # fmt: skip
        require(value is None, f"{name} says nothing with --completions; leave it out")
    result = evaluate_completions(
        options.workdir,
        options.completions,
        step=options.step,
        exits=options.exits,
        prompt_field=options.prompt_field or "prompt",
        completion_field=options.completion_field or "completion",
    )
    table = make_table(
        f"Greedy completions of {result['completions']:,} prompts, step {result['step']}",
        ("layers", "right", "exact match"),
        [(str(e["layers"]), f"{e['right']:,}", f"{e['exact_match']:.1%}") for e in result["exits"]],
    )
    make_console().print(table)
    if options.json:
        write_figures(options.json, result)
    return 0

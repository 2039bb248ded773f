"""The training run, from top to bottom."""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.errors import JaxRuntimeError

from layerskip_jax import __version__
from layerskip_jax.config import RunConfig
from layerskip_jax.data.batches import BatchSource, mixture_fingerprint
from layerskip_jax.data.manifest import Manifest, read_manifest
from layerskip_jax.distributed.processes import (
    RESTART_EXIT_CODE,
    Stopped,
    first_decides,
    require_agreement,
    stop_requests,
    wait_for_all,
)
from layerskip_jax.distributed.roll_call import end_if_others_are_lost
from layerskip_jax.early_exit_loss import max_active_exits
from layerskip_jax.hardware.chips import chip_of, peak_flops
from layerskip_jax.hardware.compiler_options import compiler_table, keep_compiled
from layerskip_jax.model.definition import Parameters
from layerskip_jax.run_folder.atomic import to_json, unwritable, write_json
from layerskip_jax.run_folder.claim import check_workdir, claim_workdir, claiming, opened_workdir
from layerskip_jax.run_folder.lock import locked
from layerskip_jax.run_folder.paths import RunFolder, read_json_lines
from layerskip_jax.schema import UserError
from layerskip_jax.training.checkpoint import Checkpoints
from layerskip_jax.training.evaluation import (
    ValidationSet,
    evaluate_exits,
    make_exit_scorer,
    not_finite,
    open_further,
)
from layerskip_jax.training.flops import MFU_DEFINITION, CostModel
from layerskip_jax.training.guards import Guards, RollBack, Watchdog
from layerskip_jax.training.initialize import Initial, initial_parameters, resolve, shaped_like
from layerskip_jax.training.lengthen import REMEDY, why_not
from layerskip_jax.training.metrics import MetricsLog
from layerskip_jax.training.observe import (
    Clock,
    Profiler,
    errors_file,
    heartbeat,
    process_log,
)
from layerskip_jax.training.setup import TrainSetup, make_setup
from layerskip_jax.training.step import Batch, StepMetrics, TrainState
from layerskip_jax.training.tasks import OpenTasks, TaskScorer, Watch, opened_tasks
from layerskip_jax.training.trackers import check_wandb

logger = logging.getLogger(__name__)

# Up to so many epochs repeated text is worth nearly as much as new text (Muennighoff et al. 2023,
# "Scaling Data-Constrained Language Models").
MANY_EPOCHS = 4


def train(
    config: RunConfig,
    workdir: str | PurePath,
    initial: Initial | None = None,
    open_tasks: OpenTasks | None = None,
) -> int:
    """Trains a model, or goes on training it from its newest checkpoint.

    Args:
      config: the run; `config.data.path` names prepared data.
      workdir: its folder, on a disk, gs:// or s3://. What lies there already must come from the
        same config and data.
      initial: what `config.init_from` names.
      open_tasks: opens the tasks of `config.evaluation`, if there are any.

    Returns:
      0 when all steps are done, `RESTART_EXIT_CODE` when a signal ended it early.

    Raises:
      ConfigError, UserError: before anything is written; or later, when a save fails, when
        every checkpoint is damaged, or when steps are no longer finite.
    """
    with opened_workdir(workdir) as folder:
        return _train(config, folder, initial, open_tasks)


class _Evaluation(NamedTuple):
    """What a run is evaluated on from time to time, and at its end.

    Attributes:
      every: steps between two; 0 for the end only.
      done: the steps of which there is a record.
      run: evaluates after that step, and writes the record.
    """

    every: int
    done: set[int]
    run: Callable[[int], None]

    def is_due(self, step: int) -> bool:
        """Whether to evaluate after `step`, which is not the last."""
        return self.every > 0 and step % self.every == 0

    def is_missing(self, step: int, starts_from_model: bool) -> bool:
        """Whether a run that begins at `step` was to be evaluated there, and was not."""
        due = self.every > 0 and starts_from_model if step == 0 else self.is_due(step)
        return due and step not in self.done


def _train(
    config: RunConfig, folder: RunFolder, initial: Initial | None, open_tasks: OpenTasks | None
) -> int:
    config, manifest, source = _open_data(config, folder, initial)
    validation, further = ValidationSet(config), open_further(config, manifest)
    check_wandb(config.training.wandb)
    _require_same_run(config, manifest, folder)

    # Mesh, model, shardings
    setup = make_setup(config)
    setup.check_sequence(source.sequence_length)
    for dataset in further.values():
        setup.check_sequence(dataset.sequence_length, evaluated=True)
    published = folder.published_files() or (initial.files if initial is not None else {})
    tasks = opened_tasks(setup, manifest, published, open_tasks)
    total_steps = config.training.steps
    cost = CostModel(setup.config, source.sequence_length)
    peak = peak_flops(list(setup.mesh.devices.flat), config.training.peak_tflops)
    clock = Clock()
    claimed = _claimed(config, manifest, folder, initial)
    with claimed, jax.set_mesh(setup.mesh), process_log(folder):
        platform = setup.mesh.devices.flat[0].platform
        kept = keep_compiled(config.compiler.cache, str(folder.compiled), platform)
        _log_decisions(setup, source, cost, peak)
        logger.info("compiled programs are kept in %s", kept or "no folder")

        # Restore
        checkpoints = _open_checkpoints(config, manifest, folder)
        state, first_step, left_out = _restore_or_init(setup, checkpoints, initial)

        # Compile a step for each size of a batch that is to come
        sizes = source.sizes
        setups = {size: setup.of_batch(size) for size in sizes.within(first_step, total_steps)}
        step_functions = {
            size: of_size.compile_step(source.sequence_length) for size, of_size in setups.items()
        }
        scorer = make_exit_scorer(
            setup.definition, chunk=config.training.loss_chunk, layout=setup.layout
        )

        # What watches the loop
        metrics_log = MetricsLog(
            folder, total_steps=total_steps, first_step=first_step, cost=cost, peak_flops=peak,
            clock=clock, left_out=left_out,
        )  # fmt: skip
        profiler = Profiler(folder, config.training.profile_step, config.training.profile_steps)
        guards = Guards(
            config.guards, source.window_numbers, lambda: checkpoints.latest_step,
            roll_backs_done=len(folder.skips()),
        )  # fmt: skip
        watchdog = Watchdog(config.guards.step_timeout)

        def writing() -> AbstractContextManager:
            return _named_writes(folder, config.checkpoint.on_failure)

        def observe(step: int, metrics: StepMetrics) -> None:
            due = step % config.training.log_every == 0 or step in (1, total_steps)
            metrics = metrics_log.add(step, metrics)
            if due:
                with writing():
                    metrics_log.record(step)
                    heartbeat(folder, step)
            guards.check(step, metrics)
            if due:
                folder.upload_soon()

        def evaluate(step: int) -> None:
            # The first and the last evaluation take all of the validation set.
            limit = config.training.evaluate_batches if 0 < step < total_steps else 0
            found = {}
            with clock.cause("evaluation"):
                for name, dataset in {"": validation, **further}.items():
                    batches = watch(dataset.batches(setup.placement, limit))
                    found[name] = evaluate_exits(scorer, state.parameters, batches)
            with writing():
                _record_evaluation(folder, metrics_log, step, total_steps, found)
            metrics_log.restart_clock()

        def evaluate_tasks(step: int) -> None:
            with clock.cause("evaluation"):
                scores = _task_scores(tasks, state.parameters, watch, step)
            if scores is not None:
                with writing():
                    _record_tasks(folder, metrics_log, step, total_steps, scores)
            metrics_log.restart_clock()

        def watch(items: Iterable) -> Iterator:
            return watchdog.each(stop.each(items))

        evaluations = [
            _Evaluation(
                config.training.evaluate_every, _recorded(folder.evaluations_file), evaluate
            )
        ]
        if tasks is not None:
            done = _recorded(folder.tasks_file)
            evaluations.append(_Evaluation(config.evaluation.every, done, evaluate_tasks))

        def save(step: int, force: bool = False) -> None:
            counts = {"left_out": metrics_log.left_out}
            with clock.cause("checkpoint"):
                saved = checkpoints.save(
                    step, state.parameters, state.optimizer, force=force, counts=counts
                )
            if saved:
                folder.upload_soon(urgent=True)
                metrics_log.say(f"step {step}/{total_steps}  saving a checkpoint")

        # Loop
        previous = None  # metrics of the step before, read while the next one runs
        steps = range(first_step, total_steps)

        def rows(index: int) -> Sequence[int]:
            return setups[sizes.at(index)].placement.rows

        try:
            with (
                stop_requests() as stop,
                watchdog.watching(),
                profiler.listening(),
                source.prefetch(
                    steps,
                    rows,
                    buffer_size=config.data.prefetch,
                    threads=config.data.read_threads,
                ) as batches,
            ):
                with suppress(Stopped):  # within an evaluation, which is made up later
                    for evaluation in evaluations if first_step < total_steps else ():
                        # What a run starts from, or where it was killed.
                        if evaluation.is_missing(first_step, initial is not None):
                            evaluation.run(first_step)
                    clock.steps_begin()
                    for index, host_batch in watchdog.each(clock.each(batches, "data")):
                        profiler.before(index + 1)
                        size = sizes.at(index)
                        batch = setups[size].placement.place(Batch(*host_batch))
                        state, metrics = step_functions[size](state, batch)
                        step = index + 1
                        if previous is not None:
                            observe(*previous)
                        previous = (step, metrics)
                        if checkpoints.is_due(step):
                            observe(*previous)
                            previous = None
                            save(step)
                        for evaluation in evaluations if step < total_steps else ():
                            if evaluation.is_due(step):
                                if previous is not None:
                                    observe(*previous)
                                    previous = None
                                evaluation.run(step)
                        if stop.due():
                            break
                if previous is not None:
                    observe(*previous)
                last_step = int(state.step)
                with writing():
                    metrics_log.record(last_step)

                # The last checkpoint and evaluations
                if last_step > first_step:
                    save(last_step, force=True)
                is_stopped = last_step < total_steps
                try:
                    for evaluation in evaluations if not is_stopped else ():
                        if total_steps not in evaluation.done:
                            evaluation.run(last_step)
                except Stopped:
                    is_stopped = True
                watchdog.beat()
                checkpoints.close()
        except RollBack as bad:
            checkpoints.close()
            return _roll_back(folder, checkpoints, bad)
        except JaxRuntimeError as error:
            end_if_others_are_lost(error, str(folder.shown(errors_file(folder))))
            raise
        finally:
            try:
                metrics_log.close()
            except OSError as error:
                logger.error("the last metrics could not be written (%s)", error.strerror)
            checkpoints.close()
    if not is_stopped:
        return 0
    logger.warning(
        "stopped by %s after step %d of %d; the same command goes on from there",
        stop.reason, last_step, total_steps,
    )  # fmt: skip
    return RESTART_EXIT_CODE


def _open_data(
    config: RunConfig, folder: RunFolder, initial: Initial | None
) -> tuple[RunConfig, Manifest, BatchSource]:
    """Opens the data, and fills in what it and the model to start from decide of the config."""
    data = config.data
    manifest = dataclasses.replace(
        read_manifest(data.path),
        fingerprint=mixture_fingerprint(data.path, data.mixture, data.weights, data.weight_changes),
    )
    if initial is not None:
        initial.check_tokenizer(_tokenizer_file(config))
        config = dataclasses.replace(config, model=shaped_like(config.model, initial.config))
    config = resolve(config, manifest)
    source = BatchSource.of_run(config, folder.skips())
    if epochs := config.training.epochs:
        steps = source.sizes.steps_for(epochs * source.num_windows)
        config = dataclasses.replace(
            config, training=dataclasses.replace(config.training, steps=steps)
        )
    return config, manifest, source


def _tokenizer_file(config: RunConfig) -> Path:
    return Path(config.data.path) / "tokenizer.json"


def _require_same_run(config: RunConfig, manifest: Manifest, folder: RunFolder) -> None:
    """Stops unless all processes mean the same run."""
    require_agreement(
        {
            "config": config.to_dict(),
            "data": manifest.fingerprint,
            "workdir": str(folder.home),
            "version": __version__,
            "jax": jax.__version__,
            "devices of each process": jax.local_device_count(),
        }
    )


@contextmanager
def _claimed(
    config: RunConfig, manifest: Manifest, folder: RunFolder, initial: Initial | None
) -> Iterator[None]:
    """Makes the folder this run's, or checks that it is, and keeps other trainings out of it."""
    about = dataclasses.asdict(manifest)
    check_workdir(folder, config, about, _refuse_length)
    wait_for_all("the folder is checked")
    with ExitStack() as held:

        def claim() -> str:
            """Returns what is in the way."""
            try:
                with claiming(folder):
                    held.enter_context(locked(folder))
                    # Again: another run may have been first.
                    check_workdir(folder, config, about, _lengthen)
                    published = initial.files if initial is not None else {}
                    claim_workdir(folder, config, about, _tokenizer_file(config), published)
            except UserError as error:
                return str(error)
            return ""

        if refusal := first_decides("the claim", claim):
            raise UserError(refusal)
        yield


def _refuse_length(old: RunConfig, new: RunConfig, done: int) -> None:
    """Stops unless a run may go on to another number of steps."""
    before, after = old.training.steps, new.training.steps
    if reasons := why_not(old, new, done):
        raise UserError(
            f"a run of {before} steps, of which {done} are done, cannot become one of {after}: "
            f"{'; '.join(reasons)}. {REMEDY}"
        )


def _lengthen(old: RunConfig, new: RunConfig, done: int) -> None:
    """The same, and says that it does."""
    _refuse_length(old, new, done)
    before, after = old.training.steps, new.training.steps
    logger.info("a run of %d steps, of which %d are done, becomes one of %d", before, done, after)


def _open_checkpoints(config: RunConfig, manifest: Manifest, folder: RunFolder) -> Checkpoints:
    kept = config.checkpoint
    return Checkpoints(
        folder.checkpoints,
        every_steps=kept.every_steps,
        keep=kept.keep,
        keep_every_steps=kept.keep_every_steps,
        keep_every_hours=kept.keep_every_hours,
        on_failure=kept.on_failure,
        about={"config": config.to_dict(), "data": manifest.fingerprint},
    )


@contextmanager
def _named_writes(folder: RunFolder, on_failure: str) -> Iterator[None]:
    """Treats a disk that takes no metrics as one that takes no checkpoint.

    Raises:
      UserError: it is full, for instance, and that is to stop the run.
    """
    try:
        yield
    except OSError as error:
        what = unwritable(folder.home, error)
        if on_failure == "stop":
            raise UserError(
                f"{what}. Its checkpoints are intact, and the same command goes on from them"
            ) from error
        logger.error("%s; going on, as config.checkpoint.on_failure has it", what)


def _roll_back(folder: RunFolder, checkpoints: Checkpoints, bad: RollBack) -> int:
    """Prepares the folder so that the same command goes on before the bad steps, without them."""
    if jax.process_index() == 0:
        count = bad.last - bad.first + 1
        # Step n, from 1, is batch n - 1.
        write_json(folder.skips_file, [*folder.skips(), (bad.first - 1, count)])
        folder.upload()
        step = checkpoints.set_aside_from(bad.first)
        logger.warning(
            "%s; rolled back to %s, and %d batches are left out from step %d on; the same "
            "command goes on from there",
            bad, "the start" if step is None else f"step {step}", count, bad.first,
        )  # fmt: skip
    wait_for_all("rolled back")
    return RESTART_EXIT_CODE


def _restore_or_init(
    setup: TrainSetup, checkpoints: Checkpoints, initial: Initial | None
) -> tuple[TrainState, int, int]:
    """Returns the state, the steps done, and the damaged records that were left out in them."""
    template = setup.abstract_state()
    restored = checkpoints.restore_newest(template.parameters, template.optimizer)
    if restored is None:
        # Known without the state, which is still being made while the step is compiled.
        branched, begun = setup.config.init_state == "all", setup.config.init_step
        state = setup.init() if initial is None else _start_from(setup, initial)
        return state, begun if branched else 0, 0
    step, parameters, optimizer = restored
    logger.info("going on from the checkpoint of step %d", step)
    counter = jax.device_put(jnp.int32(step), setup.shardings.step)
    left_out = checkpoints.record(step).get("left_out", 0)
    return TrainState(counter, parameters, optimizer), step, left_out


def _start_from(setup: TrainSetup, initial: Initial) -> TrainState:
    branch = initial.branch(setup)
    return branch or setup.start_from(initial_parameters(setup, initial))


def _record_evaluation(
    folder: RunFolder,
    metrics_log: MetricsLog,
    step: int,
    total_steps: int,
    found: dict[str, list[dict]],
) -> None:
    """Says and writes down the loss and perplexity of each exit, on each set by its name."""
    for name, exits in found.items():
        metrics_log.evaluation(step, exits, name)
        place = f" on {name}" if name else ""
        if wrong := not_finite(exits):
            logger.warning(
                "step %d: the validation loss%s of exits %s is not finite", step, place, wrong
            )
        chosen = {len(exits) // 2, len(exits)}
        text = "  ".join(
            f"exit {e['layers']} {e['perplexity']:.2f}" for e in exits if e["layers"] in chosen
        )
        metrics_log.say(f"step {step}/{total_steps}  validation perplexity{place}: {text}")
    record: dict[str, Any] = {"step": step, "exits": found[""]}
    if sets := {name: exits for name, exits in found.items() if name}:
        record["sets"] = sets
    _append(folder.evaluations_file, record)


def _task_scores(
    tasks: TaskScorer, parameters: Parameters, watch: Watch, step: int
) -> dict[str, Any] | None:
    """Returns what the tasks come to; None, and an error in the log, where one of them fails."""
    try:
        return tasks(parameters, watch)
    except Stopped:
        raise
    except Exception as error:  # a task's own code may raise anything, and the run is whole
        logger.error(
            "step %d: the tasks of config.evaluation failed, and the run goes on (%s: %s)",
            step, type(error).__name__, error, exc_info=error,
        )  # fmt: skip
        return None


def _record_tasks(
    folder: RunFolder, metrics_log: MetricsLog, step: int, total_steps: int, scores: dict[str, Any]
) -> None:
    """Says and writes down the metrics of each task at each exit."""
    metrics_log.task_scores(step, scores["exits"])
    for entry in scores["exits"]:
        text = "  ".join(
            f"{task} {', '.join(f'{metric} {value:.4g}' for metric, value in metrics.items())}"
            for task, metrics in entry["tasks"].items()
        )
        metrics_log.say(f"step {step}/{total_steps}  tasks at exit {entry['layers']}: {text}")
    _append(folder.tasks_file, {"step": step, **scores})


def _append(path: Path, record: dict[str, Any]) -> None:
    """Adds a line to a file of the run, in the first process."""
    if jax.process_index() == 0:
        with path.open("a") as file:
            file.write(to_json(record) + "\n")


def _recorded(path: Path) -> set[int]:
    """Returns the steps of the records of a file."""
    return {record["step"] for record in read_json_lines(path)}


def _say_epochs(config: RunConfig, source: BatchSource) -> None:
    """Says how often the run sees each window, and warns where that is often."""
    epochs = source.epochs(config.training.steps)
    text = ", ".join(f"{folder} {count:.3g}" for folder, count in epochs)
    logger.info("epochs planned in %d steps: %s", config.training.steps, text)
    for folder, count in epochs:
        if count <= MANY_EPOCHS:
            continue
        logger.warning(
            "the %d steps read each window of %s %.1f times; beyond %d times a model gains little "
            "from text it has seen and begins to learn it by heart: prepare more text, or set "
            "config.training.epochs or fewer config.training.steps",
            config.training.steps, folder, count, MANY_EPOCHS,
        )  # fmt: skip


def _log_decisions(
    setup: TrainSetup, source: BatchSource, cost: CostModel, peak: float | None
) -> None:
    """Says what was chosen, so that nothing is chosen silently."""
    config = setup.config
    logger.info(
        "%d device(s) %s as mesh %s; %.1fM parameters; %d windows of %d tokens, %d a step in %d "
        "microbatch(es)",
        setup.mesh.size, setup.mesh.devices.flat[0].platform, dict(setup.mesh.shape),
        setup.definition.num_parameters / 1e6, source.num_windows, source.sequence_length,
        config.training.batch_size, config.training.gradient_accumulation,
    )  # fmt: skip
    for (first, size), until in zip(source.sizes.stages, config.training.batch_ramp, strict=False):
        logger.info("batch ramp: %d windows a step from step %d to %d", size, first + 1, until)
    if config.training.batch_ramp[-1:] >= (config.training.steps,):
        logger.warning(
            "config.training.batch_ramp=%s: the %d steps end before a batch has the %d windows of "
            "config.training.batch_size",
            config.training.batch_ramp, config.training.steps, config.training.batch_size,
        )  # fmt: skip
    if changes := config.data.weight_changes:
        steps = config.training.steps
        stages = "; ".join(f"{weights} from step {step + 1} on" for step, weights in changes)
        logger.info("weights of the mixture: %s at first; %s", config.data.weights, stages)
        last, weights = changes[-1]
        if last >= steps:
            logger.warning(
                "config.data.weight_changes: the %d steps end before step %d, from which on the "
                "weights would be %s", steps, last + 1, weights,
            )  # fmt: skip
    _say_epochs(config, source)
    dropout, exits = config.layer_dropout, config.early_exit
    logger.info(
        "attention %s, remat %s, %s; layer dropout %s; early exits %s",
        config.model.attention, config.model.remat, config.model.dtype,
        f"p_max {dropout.p_max} {dropout.depth_schedule}/{dropout.time_schedule}, residual scale "
        f"{dropout.residual_scale}, by {dropout.execution}" if dropout.p_max else "off",
        exits.curriculum,
    )  # fmt: skip
    if exits.curriculum != "last" and max_active_exits(exits, config.model.num_layers) == 1:
        logger.warning(
            "no early exit learns: none that curriculum=%r and layers=%s have on gets a weight by "
            "depth_weight=%r and e_scale=%s (eq. 6 gives the first layer's exit none)",
            exits.curriculum, exits.layers, exits.depth_weight, exits.e_scale,
        )  # fmt: skip
    steps = config.training.steps
    planned, plain = cost.planned(0, steps), cost.plain(source.sizes.before(steps) / steps)
    logger.info(
        "planned: %.3g FLOPs a step on average, %.3f of a plain step's (layers %.3g, attention "
        "%.3g, exits %.3g); computed again or masked beside: %.3g; by the optimizer: %.3g",
        planned.needed, planned.needed / plain.needed, planned.layers, planned.attention,
        planned.exits, planned.recomputed + planned.masked, planned.optimizer,
    )  # fmt: skip
    chip, slices = chip_of(setup.mesh.devices.flat[0]), setup.mesh.shape["slice"]
    reasons = {option.name: option.reason for option in compiler_table(chip, slices)}
    for name, value in setup.compiler_options.items():
        reason = reasons.get(name, "config.compiler.options")
        logger.info("compiler: %s=%s: %s", name, value, reason)
    if peak:
        logger.info("peak %.4g TFLOP/s; %s", peak / 1e12, MFU_DEFINITION)

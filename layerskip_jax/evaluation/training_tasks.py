"""lm-eval's tasks within a run: the model that is being trained, from its parameters as they lie.

Log-likelihoods are scored by the training's own forward pass, on its mesh, at all exits asked for
at once; every process asks the same questions, and each has the answers. Texts are generated on the
first device, from a copy of the parameters that is laid out for decoding and given up afterwards,
so only where there is one process.
"""

import contextlib
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxtyping import Array, Float, Int
from lm_eval.evaluator import evaluate
from lm_eval.evaluator_utils import get_sample_size
from lm_eval.tasks import TaskManager

from layerskip_jax.config import EvaluationConfig
from layerskip_jax.data.manifest import TOKENIZER_FILE, Manifest
from layerskip_jax.data.tokenizer import load_tokenizer
from layerskip_jax.distributed.mesh import parts
from layerskip_jax.evaluation.lm_eval import CHUNK, ExitLM
from layerskip_jax.generation.generator import Generator
from layerskip_jax.interop.pretrained import end_token_ids
from layerskip_jax.language_model import LanguageModel
from layerskip_jax.model.adapters import adapted
from layerskip_jax.model.definition import ModelDefinition, Parameters
from layerskip_jax.schema import ConfigError, UserError, nearest
from layerskip_jax.training.evaluation import exit_adapters
from layerskip_jax.training.setup import TrainSetup
from layerskip_jax.training.tasks import Watch, task_exits

SCORED = ("loglikelihood", "loglikelihood_rolling", "multiple_choice")
GENERATED = "generate_until"


def make_token_scorer(setup: TrainSetup, exits: tuple[int, ...]) -> Callable:
    """Returns a jitted `score(parameters, tokens [B, S + 1])`, both results `[A, B, S]`.

    They are the log-probability of each token after the first, and that of the likeliest one, of
    each of A exits; the same on every device. S is a multiple of `CHUNK`. Call it with the mesh
    set.

    Args:
      setup: the run's model and mesh.
      exits: in layers run, ascending.
    """
    definition, num_layers = setup.definition, setup.config.model.num_layers
    early = [exit_layer for exit_layer in exits if exit_layer < num_layers]
    # Where `exit_states` keeps each layer's output; beyond the last slot, nowhere.
    slots = np.full(num_layers, len(early), np.int32)
    slots[np.array(early, int) - 1] = np.arange(len(early))

    def score(
        parameters: Parameters, tokens: Int[Array, "B S1"]
    ) -> tuple[Float[Array, "A B S"], Float[Array, "A B S"]]:
        model = definition.model(parameters)
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        batch, length = inputs.shape
        positions = jnp.broadcast_to(jnp.arange(length), inputs.shape)
        # Padding is at the end, where no token sees it.
        rows = model.row_inputs(positions, jnp.ones_like(inputs))
        states, last = model.exit_states(model.embed(inputs), rows, jnp.asarray(slots), len(early))
        if exits[-1] == num_layers:
            states = jnp.concatenate([states, last[None]])
        head = model.head_weight.astype(states.dtype)
        padding = jnp.arange(head.shape[1]) >= model.config.vocab_size
        adapters = exit_adapters(model)

        def before_head(x, exit_layer):
            if adapters is None:
                return model.final_norm(x)
            return adapted(x, *(part[exit_layer - 1] for part in adapters), model.config.norm_eps)

        read = jnp.stack([before_head(x, e) for x, e in zip(states, exits, strict=True)])
        read = read.reshape(len(exits), batch, -1, CHUNK, read.shape[-1]).transpose(2, 0, 1, 3, 4)

        def of_chunk(chunk):
            z, targets = chunk
            logits = jnp.einsum("absd,dv->absv", z, head, preferred_element_type=jnp.float32)
            log_p = jax.nn.log_softmax(jnp.where(padding, -jnp.inf, logits), axis=-1)
            at = jnp.broadcast_to(targets[None, ..., None], (*log_p.shape[:-1], 1))
            return jnp.take_along_axis(log_p, at, axis=-1)[..., 0], log_p.max(axis=-1)

        parts_of_targets = targets.reshape(batch, -1, CHUNK).swapaxes(0, 1)
        found = jax.lax.map(of_chunk, (read, parts_of_targets))
        return tuple(
            part.transpose(1, 2, 0, 3).reshape(len(exits), batch, length) for part in found
        )

    return jax.jit(score, out_shardings=NamedSharding(setup.mesh, PartitionSpec()))


class TrainingLM(ExitLM):
    """The model in training, at one exit at a time.

    Attributes:
      exit: the exit that is asked, in layers run.
    """

    def __init__(
        self,
        setup: TrainSetup,
        tokenizer_file: Path,
        end_token: int,
        more_end_tokens: Sequence[int] = (),
    ):
        """Takes the run's model and tokenizer, and the tokens that end a document or a text."""
        config, rules = setup.config, setup.config.mesh.rules
        tokenizer = load_tokenizer(tokenizer_file)
        tokenizer.encode_special_tokens = False
        shards = parts(setup.mesh, rules.batch)
        super().__init__(
            tokenizer,
            end_token,
            dtype=config.model.dtype,
            max_length=config.model.max_sequence_length,
            batch_size=-(-config.evaluation.batch_size // shards) * shards,
            multiple=math.lcm(CHUNK, parts(setup.mesh, rules.residual)),
        )
        self._setup, self._exits = setup, task_exits(config)
        self.exit = self._exits[0]
        self._scorer = make_token_scorer(setup, self._exits)
        self._rows = NamedSharding(setup.mesh, PartitionSpec(rules.batch or None))
        self._parameters: Parameters | None = None
        self._watch: Watch = iter
        self._known: dict[tuple, list[tuple[float, bool]]] = {}
        self._model: LanguageModel | None = None
        self._more_end_tokens = more_end_tokens
        self._is_laid_out = False

    @contextlib.contextmanager
    def of(self, parameters: Parameters, watch: Watch) -> Iterator[None]:
        """Answers for these parameters in the body."""
        self._parameters, self._watch = parameters, watch
        try:
            yield
        finally:
            self._parameters, self._is_laid_out = None, False
            self._known.clear()
            if self._model is not None:
                self._model.generator.unload()

    def _each(self, items, quiet, what):
        return self._watch(items)

    def _score(self, tokens):
        placed = jax.make_array_from_callback(tokens.shape, self._rows, lambda at: tokens[at])
        return tuple(np.asarray(part) for part in self._scorer(self._parameters, placed))

    def _loglikelihood_tokens(
        self, requests: list, disable_tqdm: bool = False, **_
    ) -> list[tuple[float, bool]]:
        """Returns the answers of `exit`; those of the others are kept until they are asked for."""
        keys = [(tuple(context), tuple(answer)) for _, context, answer in requests]
        new = {key: request for key, request in zip(keys, requests, strict=True)}
        new = {key: request for key, request in new.items() if key not in self._known}
        answers = self._answers(list(new.values()), disable_tqdm) if new else []
        self._known.update(zip(new, answers, strict=True))
        return [self._known[key][self._exits.index(self.exit)] for key in keys]

    def _complete(self, ids, count, until, sampling):
        device = self._setup.mesh.devices.flat[0]
        whole = self.exit == self._setup.config.model.num_layers
        with jax.set_mesh(Mesh(np.array([device]), "device")):
            model = self._laid_out(device)
            [text] = model.complete(
                [ids], count, exit_layer=None if whole else self.exit, stop=until, **sampling
            ).texts
        return text

    def _laid_out(self, device: jax.Device) -> LanguageModel:
        """Returns the model with the present parameters, on one device."""
        if self._is_laid_out and self._model is not None:
            return self._model
        parameters = jax.device_put(self._parameters, SingleDeviceSharding(device))
        model = ModelDefinition(self._setup.config.model).model(parameters)
        if self._model is None:
            generator = Generator(model)
            self._model = LanguageModel(
                generator, self.tokenizer, self._end_token, None, self._more_end_tokens
            )
        else:
            self._model.generator.reload(model)
        self._is_laid_out = True
        return self._model


class TrainingTasks:
    """The tasks of a run, opened before it computes anything; a `training.tasks.TaskScorer`."""

    def __init__(self, setup: TrainSetup, manifest: Manifest, published: Mapping[str, bytes]):
        """Reads the tasks and their documents, and writes every question once.

        Args:
          setup: the run's.
          manifest: of its data.
          published: files of the model that it began from, which say what ends a text.

        Raises:
          UserError: there is no such task, it cannot be read, its questions cannot be written, or
            it asks what cannot be answered in training.
        """
        config = setup.config
        self._asked, self._exits = config.evaluation, task_exits(config)
        tokenizer_file = Path(config.data.path) / TOKENIZER_FILE
        ends = end_token_ids(published, Path(config.init_from))
        self._lm = TrainingLM(setup, tokenizer_file, manifest.end_token_id, ends)
        self._tasks = _load(self._asked)
        self._limit = self._asked.limit or None
        for name, task in self._tasks["tasks"].items():
            _check(name, task, self._limit, self._lm)

    def __call__(self, parameters: Parameters, watch: Watch) -> dict[str, Any]:
        """Evaluates all tasks at all exits."""
        exits, documents = [], {}
        with self._lm.of(parameters, watch), _without_bars():
            for exit_layer in watch(self._exits):  # what the harness does itself takes time too
                self._lm.exit = exit_layer
                # Standard errors are left out: some are drawn by processes that are forked.
                found = evaluate(
                    self._lm, self._tasks, limit=self._limit, bootstrap_iters=0, log_samples=False
                )
                exits.append({"layers": exit_layer, "tasks": _metrics(found["results"])})
                documents = {
                    name: counts["effective"] for name, counts in found["n-samples"].items()
                }
        return {"documents": documents, "exits": exits}


def _metrics(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Returns numbers by metric, by task; a filter's name is left out where there is but one."""
    return {
        task: {
            name.removesuffix(",none"): float(value)
            for name, value in values.items()
            if "," in name and isinstance(value, Real) and "_stderr," not in name
        }
        for task, values in results.items()
    }


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Keeps the progress bars of the harness, one a task and exit, from standard error."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def _load(asked: EvaluationConfig) -> dict[str, Any]:
    """Returns the tasks as the harness takes them, those of the folder first.

    Raises:
      UserError: there is no such folder or task, or it cannot be read.
    """
    path = asked.include_path
    if path and not Path(path).is_dir():
        raise UserError(f"config.evaluation.include_path={path} is no folder")
    manager = None
    if path:
        manager = TaskManager(include_path=path, include_defaults=False)
    if manager is None or not set(asked.tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=path or None)  # all of the harness's own: seconds
    for name in asked.tasks:
        if name not in manager.all_tasks:
            place = (
                f"{path} or in lm-eval" if path else "lm-eval; set config.evaluation.include_path"
            )
            raise UserError(
                f"config.evaluation.tasks: there is no task {name!r} in {place}."
                f"{nearest(name, manager.all_tasks)}"
            )
    try:
        with _without_bars():
            loaded = manager.load(list(asked.tasks))
    except Exception as error:  # of a file, a data set, a package or the network
        raise UserError(
            f"config.evaluation.tasks={asked.tasks}: they cannot be read "
            f"({type(error).__name__}: {error})"
        ) from error
    for task in loaded["tasks"].values():
        # As the harness's own command has it.
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=1234)
    return loaded


def _check(name: str, task: Any, limit: int | None, lm: TrainingLM) -> None:
    """Raises UserError unless the questions of a task can be written, and answered in training."""
    kind, where = task.OUTPUT_TYPE, f"config.evaluation.tasks: task {name}"
    if kind not in (*SCORED, GENERATED):
        raise UserError(f"{where} asks for {kind}, which this model does not answer; leave it out")
    if kind == GENERATED and jax.process_count() > 1:
        raise UserError(
            f"{where} generates, which a run does only in one process, and this one has "
            f"{jax.process_count()}; leave it out, and give checkpoints to `layerskip lm-eval`"
        )
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(f"{where} runs code that the model writes; leave it out")
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"{where} shows images, which this model does not read; leave it out")
    try:
        with _without_bars():
            task.build_all_requests(limit=get_sample_size(task, limit), rank=0, world_size=1)
            for instance in task.instances if kind == GENERATED else ():
                lm.check_generation(instance.args[1])
    except ConfigError as error:
        raise UserError(f"{where}: {error}") from error
    except Exception as error:
        raise UserError(
            f"{where}: its questions cannot be written ({type(error).__name__}: {error})"
        ) from error
    if not task.instances:
        raise UserError(f"{where} has no document; leave it out")

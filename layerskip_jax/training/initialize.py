"""What a run starts from, and what its config leaves to that and to its data."""

import dataclasses
import json
import logging
from pathlib import Path, PurePath
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from layerskip_jax.config import OptimizerConfig, RunConfig
from layerskip_jax.data.batch_sizes import BatchSizes
from layerskip_jax.data.manifest import Manifest, read_manifest
from layerskip_jax.data.tokenizer import load_tokenizer
from layerskip_jax.interop.pretrained import Pretrained, open_pretrained
from layerskip_jax.model.config import ModelConfig
from layerskip_jax.model.definition import ModelDefinition, Parameters
from layerskip_jax.model.exits import ExitsConfig
from layerskip_jax.run_folder.object_store import AnyPath, as_path
from layerskip_jax.run_folder.paths import RunFolder, is_run, open_run, run_folder
from layerskip_jax.schema import ConfigError, UserError
from layerskip_jax.training.checkpoint import Checkpoints
from layerskip_jax.training.setup import TrainSetup
from layerskip_jax.training.step import TrainState

logger = logging.getLogger(__name__)


@runtime_checkable
class Initial(Protocol):
    """A model to start from, its parameters not yet read.

    Attributes:
      config: its shape.
      files: small files by name, as in `RunFolder.published`.
    """

    config: ModelConfig
    files: dict[str, bytes]

    def check_tokenizer(self, file: Path) -> None:
        """Raises `UserError` unless the tokenizer in `file` is the model's."""

    def parameters(self, config: ModelConfig, shardings: Parameters) -> Parameters:
        """Reads the parameters, each device its own part.

        Args:
          config: the shape to read them in: that of the model, the vocabulary padded otherwise.
          shardings: nested like the parameters.

        Raises:
          UserError: they cannot be had in that shape.
        """

    def branch(self, setup: TrainSetup) -> TrainState | None:
        """Returns the whole state to go on from; None where a run begins with parameters alone.

        Raises:
          UserError: it is not that of such a run.
        """


@dataclasses.dataclass(frozen=True)
class _Published:
    """A Hugging Face folder or GGUF file."""

    model: Pretrained

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def files(self) -> dict[str, bytes]:
        return self.model.files

    def check_tokenizer(self, file: Path) -> None:
        _require_same_tokens(self.model.tokenizer, file, self.model.source)

    def parameters(self, config: ModelConfig, shardings: Parameters) -> Parameters:
        return self.model.parameters(shardings, config)

    def branch(self, setup: TrainSetup) -> None:
        return None


@dataclasses.dataclass(frozen=True)
class _OfRun:
    """A checkpoint of a run, the newest one for step 0."""

    folder: RunFolder
    run: RunConfig
    step: int
    whole: bool

    @property
    def config(self) -> ModelConfig:
        return self.run.model

    @property
    def files(self) -> dict[str, bytes]:
        return self.folder.published_files()

    def check_tokenizer(self, file: Path) -> None:
        _require_same_tokens(load_tokenizer(self.folder.tokenizer_file), file, self.folder.home)

    def parameters(self, config: ModelConfig, shardings: Parameters) -> Parameters:
        if config.vocab_rows != self.config.vocab_rows:
            raise UserError(
                f"config.model.pad_vocab_to_multiple_of={config.pad_vocab_to_multiple_of} differs "
                f"from that of the run in {self.folder.home}, "
                f"{self.config.pad_vocab_to_multiple_of}; leave it out, or start from an export of "
                "that run"
            )
        shapes = ModelDefinition(self.config).shapes
        exits = shapes.keys() & {"exits"}  # restored with the rest, and not taken over
        whole = shardings["final_norm"]["scale"]
        shardings = shardings | {
            name: jax.tree.map(lambda _: whole, shapes[name]) for name in exits
        }
        template = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            shardings,
        )
        checkpoints = Checkpoints(self.folder.checkpoints)
        parameters = checkpoints.restore_parameters(self.step or None, template)
        checkpoints.close()
        return {name: part for name, part in parameters.items() if name != "exits"}

    def branch(self, setup: TrainSetup) -> TrainState | None:
        if not self.whole:
            return None
        ours, theirs = setup.config, self.run
        for name, of in {
            "optimizer.name": lambda run: run.optimizer.name,
            "optimizer.width_transfer": lambda run: run.optimizer.width_transfer,
            "training.trainable": lambda run: run.training.trainable,
            "model.exits": lambda run: run.model.exits,
            "model.pad_vocab_to_multiple_of": lambda run: run.model.pad_vocab_to_multiple_of,
        }.items():
            _require_same_state(name, of(ours), of(theirs), self.folder.home)
        clips = [run.optimizer.clip_norm > 0 for run in (ours, theirs)]
        _require_same_state("optimizer.clip_norm > 0", *clips, self.folder.home)
        seen = [BatchSizes.of(run.training).before(self.step) for run in (ours, theirs)]
        if seen[0] != seen[1]:
            logger.warning(
                "the %d steps before this branch have %d windows by its own batch sizes, and had "
                "%d in %s: it goes on in the order of the data from where its own are; a ramp "
                "(config.training.batch_ramp) that ends in another size goes on from theirs",
                self.step, *seen, self.folder.home,
            )  # fmt: skip
        template = setup.abstract_state()
        checkpoints = Checkpoints(self.folder.checkpoints)
        checkpoints.require_step(self.step)
        logger.info("branching from step %d of %s", self.step, self.folder.home)
        parameters, optimizer = checkpoints.restore(
            self.step, template.parameters, template.optimizer
        )
        checkpoints.close()
        counter = jax.device_put(jnp.int32(self.step), setup.shardings.step)
        return TrainState(counter, parameters, optimizer)


def _require_same_state(name: str, ours: object, theirs: object, home: AnyPath) -> None:
    """Raises `UserError` where a setting that the optimizer's state depends on differs."""
    if ours != theirs:
        raise UserError(
            f"config.init_state='all' takes over the optimizer's state of {home}, whose "
            f"config.{name} is {theirs!r}, not {ours!r}; set it to that, or take "
            "config.init_state='parameters'"
        )


@dataclasses.dataclass(frozen=True)
class _Begun:
    """A run that has its own checkpoint: its source need not be there any more."""

    config: ModelConfig

    @property
    def files(self) -> dict[str, bytes]:
        return {}  # the run has them

    def check_tokenizer(self, file: Path) -> None:
        """The run checks its data itself."""

    def parameters(self, config: ModelConfig, shardings: Parameters) -> Parameters:
        raise UserError("the run has no checkpoint any more and its init_from was not opened")

    def branch(self, setup: TrainSetup) -> None:
        return None  # and `parameters` says so


def open_initial(run: RunConfig, workdir: str | PurePath) -> _Published | _OfRun | _Begun:
    """Opens what `config.init_from` names, for the run in `workdir`.

    Raises:
      UserError: see `open_pretrained`; or there is no such checkpoint, or one is named of a model
        that has none; or its parameters were not drawn for the run's `width_transfer`.
    """
    source, step = run.init_from, run.init_step
    folder = run_folder(workdir)
    if is_run(folder.path) and folder.checkpoints.is_dir():
        begun = json.loads(folder.config_file.read_text())
        if begun.get("init_from") == source and Checkpoints(folder.checkpoints).latest_step:
            return _Begun(open_run(workdir)[1].model)
    if is_run(as_path(source)):
        of_run, config = open_run(source)
        _require_drawn_for(run.optimizer, config.optimizer, source)
        checkpoints = Checkpoints(of_run.checkpoints)
        checkpoints.require_step(step or None)
        checkpoints.close()
        whole = run.init_state == "all"
        if whole and of_run.skips():
            raise UserError(
                f"config.init_state='all': the run in {of_run.home} left batches out "
                f"({of_run.skips_file.name}), so that its step {step} is not that of the order of "
                "its data; take config.init_state='parameters'"
            )
        return _OfRun(of_run, config, step, whole)
    if step or run.init_state == "all":
        raise UserError(
            f"config.init_step={step} and config.init_state={run.init_state!r} are of a run, and "
            f"config.init_from={source} is none; leave them out"
        )
    _require_drawn_for(run.optimizer, OptimizerConfig(), source)
    return _Published(open_pretrained(source))


def _require_drawn_for(ours: OptimizerConfig, theirs: OptimizerConfig, source: str) -> None:
    """Raises `UserError` where a run's rates would be for parameters that are drawn otherwise."""
    for name in ("width_transfer", "width_transfer_head_dim"):
        asked, had = getattr(ours, name), getattr(theirs, name)
        if ours.width_transfer > 0 and asked != had:
            raise UserError(
                f"config.optimizer.{name}={asked} moves parameters that were drawn for it, and "
                f"the model in config.init_from={source} was trained with {had}; set it to that"
            )


def _require_same_tokens(tokenizer, file: Path, source: AnyPath) -> None:
    if load_tokenizer(file).get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"the data was prepared with another tokenizer ({file}) than the model in {source} "
            f"has; prepare it with `layerskip prepare --tokenizer={source} ...`"
        )


def resolve(config: RunConfig, manifest: Manifest) -> RunConfig:
    """Fills in what the data decides, and checks that model and data fit each other.

    Raises:
      ConfigError: naming the setting.
    """
    model = config.model
    vocab_size = model.vocab_size or manifest.vocab_size
    rows = dataclasses.replace(model, vocab_size=vocab_size).vocab_rows
    if rows < manifest.vocab_size:
        raise ConfigError(
            f"config.model.vocab_size={vocab_size} is smaller than the tokenizer's "
            f"{manifest.vocab_size}; set 0 to take it from the data"
        )
    if vocab_size < manifest.vocab_size:
        for path in (config.data.path, *config.data.mixture):
            read_manifest(path).check_tokens(vocab_size, path)
    if manifest.sequence_length > model.max_sequence_length:
        raise ConfigError(
            f"config.model.max_sequence_length={model.max_sequence_length} is shorter than the "
            f"windows of {manifest.sequence_length} tokens in {config.data.path}; raise it, or "
            "prepare shorter windows"
        )
    return dataclasses.replace(config, model=dataclasses.replace(model, vocab_size=vocab_size))


def shaped_like(model: ModelConfig, source: ModelConfig) -> ModelConfig:
    """Returns `source` with what `model` says of how to compute, not of the shape.

    Raises:
      ConfigError: a setting of the shape was changed, to something else than the source's.
    """
    free, default = ["dtype", "remat", "attention", "packing_mask", "exits"], ModelConfig()
    for name in ("max_sequence_length", "pad_vocab_to_multiple_of"):
        if getattr(model, name) != getattr(default, name):
            free.append(name)
    for field in dataclasses.fields(ModelConfig):
        ours, theirs = getattr(model, field.name), getattr(source, field.name)
        if field.name not in free and ours not in (theirs, getattr(default, field.name)):
            raise ConfigError(
                f"config.model.{field.name}={ours} contradicts config.init_from, whose model has "
                f"{theirs}; leave it out"
            )
    return dataclasses.replace(source, **{name: getattr(model, name) for name in free})


def initial_parameters(setup: TrainSetup, initial: Initial) -> Parameters:
    """Returns the parameters that a run starts from, on its mesh.

    What the model to start from has of exits is not taken over: they begin anew, each adapter's
    norm as the final norm.
    """
    config, shardings = setup.config.model, dict(setup.shardings.parameters)
    exits = shardings.pop("exits", None)
    if theirs := initial.config.exits:
        logger.warning(
            "config.init_from: the exits of %s (adapters %s, learned %s) are left out; %s",
            setup.config.init_from, theirs.adapters, theirs.learned,
            "config.model.exits begins anew" if exits else "the exits read through the final norm",
        )  # fmt: skip
    parameters = initial.parameters(dataclasses.replace(config, exits=ExitsConfig()), shardings)
    if exits is None:
        return parameters

    def make(final_scale):
        key = jax.random.key(setup.config.seed)
        made = setup.definition.init(key)["exits"]
        if config.exits.adapters:
            made["scale"] = jnp.tile(final_scale, (len(config.exits.adapters), 1))
        return made

    made = jax.jit(make, out_shardings=exits)(parameters["final_norm"]["scale"])
    return {**parameters, "exits": made}

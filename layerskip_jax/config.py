"""A run's whole configuration, and the way from a recipe and a command line to it.

A recipe in `configs/` starts from `default_config()`, changes what differs, and returns the
ConfigDict. The dataclasses below hold the defaults and the ranges; nothing else does.
"""

import contextlib
import dataclasses
import json
import os
import re
import runpy
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from layerskip_jax.distributed.mesh import MeshShape
from layerskip_jax.distributed.sharding import ShardingRules
from layerskip_jax.early_exit_loss import EarlyExitConfig
from layerskip_jax.layer_dropout import LayerDropoutConfig
from layerskip_jax.model.config import ModelConfig
from layerskip_jax.schema import (
    LARGEST_UINT32,
    ConfigError,
    UserError,
    build,
    changeable,
    nearest,
    new_names,
    require,
    require_choice,
    require_count,
    require_range,
)

LEARNING_RATE_SCHEDULES = ("cosine", "wsd", "constant")
COMMON = "common"  # what recipes share, beside them


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its learning rate.

    Attributes:
      name: which of the optimizers in `training/optimizer.py`: `adamw`, or `muon`, which moves the
        matrices of the layers by an orthogonal step, and what else there is as `adamw` does.
      learning_rate: the peak, above 0.
      schedule: `cosine` (to `final_fraction` of the peak), `wsd` (warm up, stay, then decay
        linearly over the last `decay_fraction` of the steps) or `constant`.
      warmup_steps: optimizer steps of linear warm-up, at least 0; the first is taken at the peak
        over this.
      decay_fraction: share of the steps that `wsd` decays over, in [0, 1].
      final_fraction: the last learning rate as a share of the peak, in [0, 1].
      beta1: decay of the first moment, in [0, 1).
      beta2: decay of the second moment, in [0, 1).
      eps: epsilon, added to the root of the second moment, at least 1e-18: the squares of smaller
        gradients are 0 in float32.
      weight_decay: decoupled decay of matrices and embeddings, at least 0; norms and biases are
        left alone.
      clip_norm: largest global gradient norm, at least 0; 0 turns clipping off.
      muon_learning_rate: the peak for what `muon` itself moves, at least 0; 0 takes that of
        `learning_rate`. Its schedule is the same.
      muon_momentum: decay of `muon`'s momentum, in [0, 1).
      muon_rms: root mean square of an update by `muon` before its learning rate, in [0, 1]: 0.2 is
        about AdamW's, so that both take the same rates; 0 scales an update of m inputs and n
        outputs by sqrt(max(1, n / m)) instead.
      width_transfer: the `model_dim` at which the rates were tuned, at least 0: a run of another
        width draws and moves its parameters so that they hold there too (muP). The widths of MLP
        and heads together are to grow with it. 0 takes rates as they are.
      width_transfer_head_dim: the `head_dim` at which they were tuned, at least 0; 0 takes it to
        be the model's. Above 0 only where `width_transfer` is.
    """

    name: str = "adamw"
    learning_rate: float = 3e-4
    schedule: str = "cosine"
    warmup_steps: int = 100
    decay_fraction: float = 0.2
    final_fraction: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    muon_learning_rate: float = 0.0
    muon_momentum: float = 0.95
    muon_rms: float = 0.2
    width_transfer: int = 0
    width_transfer_head_dim: int = 0

    def __post_init__(self):
        require_choice("schedule", self.schedule, LEARNING_RATE_SCHEDULES)
        require_count("warmup_steps", self.warmup_steps, 0)
        for name, interval in {
            "learning_rate": "(0, inf)", "final_fraction": "[0, 1]", "decay_fraction": "[0, 1]",
            "beta1": "[0, 1)", "beta2": "[0, 1)", "eps": "[1e-18, inf)",
            "weight_decay": "[0, inf)", "clip_norm": "[0, inf)",
            "muon_learning_rate": "[0, inf)", "muon_momentum": "[0, 1)", "muon_rms": "[0, 1]",
        }.items():  # fmt: skip
            require_range(name, getattr(self, name), interval)
        for name in ("width_transfer", "width_transfer_head_dim"):
            require_count(name, getattr(self, name), 0)
        require(
            self.width_transfer > 0 or self.width_transfer_head_dim == 0,
            f"width_transfer_head_dim={self.width_transfer_head_dim} is the size of a head at the "
            "width_transfer where rates were tuned, and that is 0; set both, or neither",
        )


ON_DAMAGED = ("stop", "skip")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What a run reads.

    Attributes:
      path: folder made by `layerskip prepare`. Its validation split is what a run is evaluated on,
        of a mixture too.
      mixture: further such folders, prepared with the same tokenizer, to mix with it.
      weights: shares of the rows that come from `path` and from each of `mixture`, at least 0;
        empty without a mixture. Each is above 0 here or in a later change.
      weight_changes: steps, ascending from 1 on, each with the weights from that step (from 0) on:
        `((1000, (0.5, 0.5)), (4000, (0.2, 0.8)))`. Each folder goes on with its next window.
      validation: further such folders, prepared with the same tokenizer, whose validation splits
        are evaluated beside it; each goes by its folder's name. Their windows may have another
        length.
      prefetch: batches read ahead in the background, at least 1.
      read_threads: threads that read them, a batch each, at least 1; more than `prefetch` are idle.
      on_damaged: what a damaged record does to the run: `stop` it, or `skip` the record, which
        then trains nothing, and in an evaluation counts nothing, and is logged and counted.
    """

    path: str = ""
    mixture: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    weight_changes: tuple[tuple[int, tuple[float, ...]], ...] = ()
    validation: tuple[str, ...] = ()
    prefetch: int = 4
    read_threads: int = 2
    on_damaged: str = "stop"

    def __post_init__(self):
        for number, weight in enumerate(self.weights):
            require_range(f"weights[{number}]", weight, "[0, inf)")
        for change, (step, weights) in enumerate(self.weight_changes):
            require_count(f"weight_changes[{change}][0]", step, 1)
            for number, weight in enumerate(weights):
                require_range(f"weight_changes[{change}][1][{number}]", weight, "[0, inf)")
        steps = [step for step, _ in self.weight_changes]
        require(
            steps == sorted(set(steps)),
            f"weight_changes={self.weight_changes} must name later and later steps, each once",
        )
        require_choice("on_damaged", self.on_damaged, ON_DAMAGED)
        for name in ("prefetch", "read_threads"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        names = [folder_name(path) for path in self.validation]
        for path, name in zip(self.validation, names, strict=True):
            require(path.strip() != "", f"validation={self.validation} names a folder ''")
            require(
                names.count(name) == 1,
                f"validation={self.validation} has more than one folder {name!r}, and a set goes "
                "by its folder's name; rename one, or link to it by another name",
            )


def folder_name(path: str) -> str:
    """Returns the last part of a path, also of one that ends with a slash or dots."""
    return Path(os.path.abspath(path)).name


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Tasks of EleutherAI's lm-eval (`pip install lm_eval`) that a run is evaluated on.

    The parameters are taken as they lie in training, so log-likelihoods are scored on all devices
    and processes. A task that generates runs on the first device, which has to have room for the
    model a second time, and only where there is one process.

    Attributes:
      tasks: their names; empty evaluates none.
      include_path: folder of their YAML files; empty, or for a name it does not have, takes
        lm-eval's own, whose texts may have to be downloaded.
      every: steps between two such evaluations, at least 0; 0 evaluates at the end only.
      exits: the exits to evaluate, in layers run, each at least 1; empty takes the last one.
      limit: documents of each task, at least 0; 0 takes all.
      batch_size: rows scored at once, at least 1, rounded up to a multiple of the batch's shards.
    """

    tasks: tuple[str, ...] = ()
    include_path: str = ""
    every: int = 0
    exits: tuple[int, ...] = ()
    limit: int = 0
    batch_size: int = 8

    def __post_init__(self):
        for name in ("tasks", "exits"):
            values = getattr(self, name)
            require(len(set(values)) == len(values), f"{name}={values} names one twice")
        for layers in self.exits:
            require_count("exits", layers, 1)
        for name, least in {"every": 0, "limit": 0, "batch_size": 1}.items():
            require_count(name, getattr(self, name), least)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How a run is laid out on its devices.

    Attributes:
      shape: devices along each mesh axis.
      rules: mesh axes of each logical axis.
      topology: the devices that the recipe is laid out for, such as `v5p:4x4x8` (one of
        `shape.slice` TPU slices) or `h100:64`; what `layerskip plan` compiles or calculates for.
    """

    shape: MeshShape = MeshShape()
    rules: ShardingRules = ShardingRules()
    topology: str = ""


@dataclasses.dataclass(frozen=True)
class CompilerConfig:
    """How programs are compiled.

    Attributes:
      options: `xla_NAME=VALUE` adds to the compiler's settings for the chip, or replaces one;
        `xla_NAME=` takes one out (see `hardware/compiler_options.py`).
      cache: folder of compiled programs, which a restarted run need not compile again; `auto` is
        one in the run's folder for TPUs and GPUs, and none for CPUs. Empty keeps none.
    """

    options: tuple[str, ...] = ()
    cache: str = "auto"


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When a run is saved.

    Attributes:
      every_steps: optimizer steps between two saves, at least 1; the last step is always saved.
      keep: checkpoints kept, newest first, at least 1.
      keep_every_steps: checkpoints of multiples of so many steps, at least 0, are kept for good; 0
        keeps none.
      keep_every_hours: a checkpoint is kept for good where the last one kept for this reason is so
        many hours older, in [0, 1e6]; 0 keeps none.
      on_failure: what a save that fails does to the run: `stop` it, or `continue` with an error
        in the log (the last save stops it all the same).
    """

    every_steps: int = 1000
    keep: int = 3
    keep_every_steps: int = 0
    keep_every_hours: float = 0.0
    on_failure: str = "stop"

    def __post_init__(self):
        require(self.every_steps >= 1, f"every_steps={self.every_steps} must be at least 1")
        require(self.keep >= 1, f"keep={self.keep} must be at least 1")
        steps, hours = self.keep_every_steps, self.keep_every_hours
        require(steps >= 0, f"keep_every_steps={steps} must not be negative")
        require(
            0 <= hours <= MOST_HOURS, f"keep_every_hours={hours} must be in [0, {MOST_HOURS:g}]"
        )
        require_choice("on_failure", self.on_failure, ("stop", "continue"))


MOST_HOURS = 1e6  # a hundred years: longer times overflow in the libraries that wait
SPIKE_WINDOW = 50  # steps whose mean and deviation a loss is compared with


@dataclasses.dataclass(frozen=True)
class GuardsConfig:
    """What a run does when a step goes wrong.

    Attributes:
      nonfinite_limit: steps in a row, at least 0, that may be skipped because their loss or
        gradient is not finite; one more ends the run.
      roll_backs: how often, at least 0 times, a run that would end like that goes back instead to
        the newest checkpoint from before those steps, and leaves their batches out from then on.
      spike_deviations: a loss so many standard deviations, at least 0, above the mean of the last
        50 steps is logged with its batch; 0 logs none.
      step_timeout: seconds, in [0, 3.6e9], that a step, an evaluation's batch or the last save may
        take before the process writes all stacks and ends, for the launcher to restart it; 0 waits
        for ever.
    """

    nonfinite_limit: int = 10
    roll_backs: int = 0
    spike_deviations: float = 6.0
    step_timeout: float = 0.0

    def __post_init__(self):
        for name in ("nonfinite_limit", "roll_backs"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative")
        require_range("spike_deviations", self.spike_deviations, "[0, inf)")
        most = MOST_HOURS * 3600
        require(
            0 <= self.step_timeout <= most,
            f"step_timeout={self.step_timeout} must be in [0, {most:g}]",
        )


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """The length of a run and what it reports.

    Attributes:
      steps: optimizer steps, T, at least 1.
      epochs: passes over the training windows, at least 0, that give the number of steps in place
        of `steps`, the last step whole; of a mixture, over the windows of all its folders together.
        0 leaves it to `steps`.
      batch_size: windows per optimizer step, over all devices and accumulation steps, at least 1.
      batch_ramp: steps, ascending from 1 on, from which on a batch has twice the windows, and
        batch_size after the last of them: `(100, 300)` of 32 is 8 windows a step, 16 from step 100
        (from 0) on and 32 from 300 on. The order of the windows is the same as without. The devices
        and `layer_dropout.row_groups` divide the first batch too; microbatches are as few as have
        no more windows than those of batch_size.
      gradient_accumulation: microbatches a step is computed in, at least 0; 0 takes as few as
        `rows_per_device` allows.
      rows_per_device: windows of a microbatch that one device may get, where
        gradient_accumulation is 0; at least 0, and 0 elsewhere.
      loss_chunk: positions of the sequence scored by the head at once, at least 1.
      log_every: steps between two logged lines, at least 1.
      evaluate_every: steps between two evaluations, at least 0; 0 evaluates at the end only.
      evaluate_batches: batches per evaluation during training, at least 0; 0 takes the whole set.
      peak_tflops: dense peak of one device in TFLOP/s, at least 0, which MFU is a share of; 0 takes
        the published bfloat16 peak of known accelerators, and none elsewhere.
      profile_step: the step, at least 0, from which on a trace of the devices is written; 0 writes
        one only when the process receives SIGUSR1.
      profile_steps: steps that a trace holds, at least 1.
      trainable: `all` trains the model; `exits` trains what `config.model.exits` adds to it and
        leaves the model itself bit for bit as it is, with no backward pass through its layers;
        anything else is a regular expression, and what it matches of the parameters' whole names,
        such as `layers.mlp.up` (of all layers) or `embedding`, is trained.
      wandb: project of Weights & Biases that the metrics go to beside TensorBoard; its package has
        to be installed. Empty sends none.
    """

    steps: int = 1000
    epochs: float = 0.0
    batch_size: int = 32
    batch_ramp: tuple[int, ...] = ()
    gradient_accumulation: int = changeable(1, was="accumulation")
    rows_per_device: int = changeable(0)
    loss_chunk: int = 128
    log_every: int = changeable(10)
    evaluate_every: int = changeable(0)
    evaluate_batches: int = changeable(0)
    peak_tflops: float = changeable(0.0)
    profile_step: int = changeable(0)
    profile_steps: int = changeable(3)
    trainable: str = "all"
    wandb: str = changeable("")

    def __post_init__(self):
        for name in ("steps", "batch_size", "loss_chunk"):
            require_count(name, getattr(self, name), 1)
        ramp = self.batch_ramp
        for step in ramp:
            require_count("batch_ramp", step, 1)
        require(
            list(ramp) == sorted(set(ramp)),
            f"batch_ramp={ramp} must name later and later steps, each once",
        )
        require(
            self.batch_size % 2 ** len(ramp) == 0,
            f"batch_size={self.batch_size} cannot be reached by the {len(ramp)} doublings of "
            f"batch_ramp={ramp}; make it a multiple of {2 ** len(ramp)}, or leave some out",
        )
        try:
            re.compile(self.trainable)
        except re.error as error:
            raise ConfigError(
                f"trainable={self.trainable!r} is neither all, exits nor a regular expression: "
                f"{error}"
            ) from None
        for name in ("log_every", "profile_steps"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        accumulation, rows = self.gradient_accumulation, self.rows_per_device
        require(accumulation >= 0, f"gradient_accumulation={accumulation} must not be negative")
        require(rows >= 0, f"rows_per_device={rows} must not be negative")
        require(
            (accumulation == 0) == (rows > 0),
            f"gradient_accumulation={accumulation} and rows_per_device={rows} do not go together: "
            "either set gradient_accumulation to 0 and rows_per_device to at least 1, or leave "
            "rows_per_device 0",
        )
        for name in ("evaluate_every", "evaluate_batches", "profile_step"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative")
        for name in ("epochs", "peak_tflops"):
            require_range(name, getattr(self, name), "[0, inf)")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that defines a run; two runs with equal configs and data are equal.

    Attributes:
      seed: what parameters, data order and layer dropout are drawn from, in
        0..4294967295.
      init_from: where the first parameters come from: a Hugging Face folder, a GGUF file or the
        folder of another run; its shape is then the model's. Empty draws them at random.
      init_step: of a run that init_from names, the checkpoint to take, at least 0; 0 takes the
        newest.
      init_state: `parameters` takes those alone, and the run begins at step 0; `all` takes the
        optimizer's state too and goes on after `init_step`, with the batches that come then and its
        own schedules: a branch of that run.
      data: what the run reads.
      model: shape and numerics of the decoder.
      layer_dropout: when layers are skipped.
      early_exit: which exits learn, and how much.
      optimizer: which it is, and its learning rate.
      training: the length of the run and what it reports.
      evaluation: tasks that the run is evaluated on.
      checkpoint: when the run is saved.
      guards: what the run does when a step goes wrong.
      mesh: how the run is laid out on its devices.
      compiler: how programs are compiled.
    """

    seed: int = 0
    init_from: str = ""
    init_step: int = 0
    init_state: str = "parameters"
    data: DataConfig = changeable(DataConfig())
    model: ModelConfig = ModelConfig()
    layer_dropout: LayerDropoutConfig = LayerDropoutConfig()
    early_exit: EarlyExitConfig = EarlyExitConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = changeable(EvaluationConfig())
    checkpoint: CheckpointConfig = changeable(CheckpointConfig())
    guards: GuardsConfig = changeable(GuardsConfig())
    mesh: MeshConfig = changeable(MeshConfig())
    compiler: CompilerConfig = changeable(CompilerConfig())

    def __post_init__(self):
        require_count("seed", self.seed, 0, LARGEST_UINT32)
        require_count("init_step", self.init_step, 0)
        require_choice("init_state", self.init_state, ("parameters", "all"))
        require(
            self.init_from != "" or (self.init_step == 0 and self.init_state == "parameters"),
            f"init_step={self.init_step} and init_state={self.init_state!r} say what to take of "
            "init_from, and that is empty; name a run there",
        )
        require(
            self.init_state != "all" or 0 < self.init_step < self.training.steps,
            f"init_state='all' goes on after init_step={self.init_step}, to be in "
            f"1..{self.training.steps - 1} for training.steps={self.training.steps}; name the step "
            "of a checkpoint, and the step to end at",
        )
        exits, only_exits = self.model.exits, self.training.trainable == "exits"
        require(
            bool(exits) if only_exits else not exits.adapters,
            f"training.trainable={self.training.trainable!r} does not go with "
            f"model.exits.adapters={exits.adapters} and model.exits.learned={exits.learned}: "
            "adapters are trained by training.trainable='exits', which needs adapters or learned",
        )
        require(
            only_exits or not exits.learned or self.early_exit.curriculum != "last",
            "model.exits.learned=True learns from the exits that are on, and "
            "early_exit.curriculum='last' turns none on; take another, or train it on a finished "
            "model with training.trainable='exits'",
        )
        require(
            not only_exits or self.layer_dropout.p_max == 0,
            f"layer_dropout.p_max={self.layer_dropout.p_max} drops layers of a model that "
            "training.trainable='exits' leaves as it is; set it to 0",
        )
        require(
            not only_exits or self.init_from != "",
            "training.trainable='exits' leaves the model as it is, and init_from is empty, which "
            "draws it at random; name a run, a Hugging Face folder or a GGUF file",
        )

    def to_dict(self) -> dict:
        """Returns nested plain values, as `from_dict` and JSON take them."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, values) -> "RunConfig":
        """Builds a config from nested values; see `schema.build` for the errors."""
        return build(cls, values)

    @classmethod
    def of_run(cls, values) -> "RunConfig":
        """Builds the config of a run's folder, whose settings may bear names they had before.

        Raises:
          ConfigError: it is none, or of a later version.
        """
        if not is_run_config(values):
            names = ", ".join(list(values)[:3]) if isinstance(values, Mapping) else repr(values)
            raise ConfigError(
                f"the folder's config.json is another program's (it has {names}), so it holds no "
                "run; a model from elsewhere becomes one with `layerskip import --source=FOLDER`"
            )
        return build(cls, values, old_names=True)


def is_run_config(values: Any) -> bool:
    """Whether what is in a config.json is a run's config, and not that of a Hugging Face folder."""
    return isinstance(values, Mapping) and {"model", "training"} <= values.keys()


def default_config() -> ConfigDict:
    """Returns all settings at their defaults, for a recipe to change."""
    config = ConfigDict(dataclasses.asdict(RunConfig()))
    # 0 means "derive it"; the dataclass has already derived it from the default shape.
    config.model.head_dim = 0
    return config.lock()


def as_variant(
    config: ConfigDict, variant: str, targets: Mapping[str, Mapping[str, Any]] | None = None
) -> ConfigDict:
    """Applies what follows the colon in `--config=RECIPE:VARIANT`.

    Every recipe takes `plain`: the same model trained without layer dropout and early exits. A
    recipe with targets takes the name of one too, and both with a hyphen: `plain-v5p`.

    Args:
      config: the recipe.
      variant: its variant.
      targets: by name, the settings that lay the recipe out for some devices.

    Raises:
      ConfigError: unknown variant.
    """
    targets = targets or {}
    chosen = set(variant.split("-")) - {""}
    known = {"plain", *targets}
    if unknown := sorted(chosen - known):
        raise ConfigError(
            f"--config: there is no variant {unknown[0]!r}; there is {', '.join(sorted(known))}, "
            "and one with another, as in plain-v5p"
        )
    if len(chosen - {"plain"}) > 1:
        raise ConfigError(f"--config: {variant!r} names more than one target; name one")
    if "plain" in chosen:
        config.layer_dropout.p_max = 0.0
        config.early_exit.curriculum = "last"
    for target in chosen - {"plain"}:
        config.update_from_flattened_dict(targets[target])
    return config


def recipe_folder() -> Path:
    """Returns the folder of the recipes: within an installed package, or `configs/` beside it."""
    package = Path(__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def recipe_names() -> list[str]:
    """Returns the names that `--config=NAME` takes from any folder."""
    return sorted(path.stem for path in recipe_folder().glob("*.py") if path.stem != COMMON)


def recipe_targets(file: Path) -> Mapping[str, Mapping[str, Any]]:
    """Returns the TARGETS of a recipe: by name, the settings that lay it out for some devices."""
    with _recipe_imports(file):
        return runpy.run_path(str(file)).get("TARGETS", {})


@contextlib.contextmanager
def _recipe_imports(file: Path) -> Iterator[None]:
    """Lets a recipe import the files beside it and our `common`, and forgets them afterwards."""
    folders = [file.parent.resolve(), recipe_folder()]
    path, known, common = list(sys.path), set(sys.modules), sys.modules.pop(COMMON, None)
    sys.path[:0] = map(str, folders)
    try:
        yield
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - known | {COMMON}:
            source = getattr(sys.modules.get(name), "__file__", None)
            if source and Path(source).parent in folders:
                del sys.modules[name]
        if common:
            sys.modules[COMMON] = common


def recipe_path(recipe: str) -> Path:
    """Returns the file of a recipe, given by its path or by the name of one in `configs/`.

    Raises:
      ConfigError: there is no such file and no such name; the message has the nearest of both.
    """
    path = Path(recipe)
    if path.is_file():
        return path
    if recipe in recipe_names():
        return recipe_folder() / f"{recipe}.py"
    files = nearest(recipe, map(str, path.parent.glob("*.py")))
    hint = files or nearest(path.stem, recipe_names())
    raise ConfigError(
        f"--config={recipe}: there is no such file and no recipe of that name.{hint} "
        "`layerskip train --help` lists the recipes"
    )


def load_config(argv: list[str]) -> RunConfig:
    """Reads `--config=RECIPE[:VARIANT]` and its `--config.a.b=value` overrides.

    Args:
      argv: exactly these arguments, without the program's name; RECIPE as `recipe_path` takes it.

    Raises:
      ConfigError: no such recipe, a recipe that fails, an unknown key, a wrong type or value.
    """
    given = [arg.split("=", 1)[1] for arg in argv if arg.startswith("--config=")]
    if len(given) != 1:
        raise ConfigError("name one recipe: --config=NAME, or --config=FILE.py for your own")
    recipe, colon, variant = given[0].partition(":")
    file = recipe_path(recipe)
    named = f"--config={file}{colon}{variant}"
    argv = [named if arg.startswith("--config=") else arg for arg in argv]
    known, renamed = set(_leaves(default_config())), new_names(RunConfig)
    for arg in argv:
        key = re.match(r"--config\.([^=]*)", arg)
        if key and (new := renamed.get(f"config.{key[1]}")):
            raise ConfigError(f"config.{key[1]} is called {new} now")
        if key and key[1] not in known:
            raise ConfigError(f"config.{key[1]} is not a setting.{nearest(key[1], known)}")
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=["layerskip", *argv])
    try:
        with _recipe_imports(file):
            values(["layerskip", *argv])
    except (flags.Error, AttributeError, TypeError, ValueError, KeyError) as error:
        # What a recipe itself refuses comes wrapped with a traceback; the innermost has the words.
        message, inner = error, error
        while inner := inner.__cause__ or inner.__context__:
            message = inner if isinstance(inner, ConfigError) else message
        raise ConfigError(f"{given[0]}: {message}{_renamed_in(str(message))}") from error
    return RunConfig.from_dict(values.config.to_dict())


def _renamed_in(message: str) -> str:
    """Returns what a key that a message says does not exist is called now, if it was renamed."""
    missing = re.search(r"Key \"(\w+)\" does not exist", message)
    new = [
        f"{old} is called {new} now"
        for old, new in new_names(RunConfig).items()
        if missing and old.rpartition(".")[2] == missing[1]
    ]
    return f"; {', '.join(new)}" if new else ""


def _leaves(config: ConfigDict, prefix: str = "") -> list[str]:
    names = []
    for key, value in config.items():
        is_group = isinstance(value, ConfigDict)
        names += _leaves(value, f"{prefix}{key}.") if is_group else [prefix + key]
    return names


def differences(old: dict, new: dict, prefix: str = "config") -> list[str]:
    """Returns one line `key: old -> new` for each setting in which two configs differ."""
    lines = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{prefix}.{key}")
        elif a != b:
            lines.append(f"{prefix}.{key}: {a!r} -> {b!r}")
    return lines


__all__ = [
    "ConfigError",
    "RunConfig",
    "UserError",
    "as_variant",
    "default_config",
    "differences",
    "load_config",
    "recipe_folder",
    "recipe_names",
    "recipe_path",
    "recipe_targets",
]

r"""What a training step costs against a plain one, and against its own arithmetic.

    python benchmarks/train_step.py --json=train_step.json           # --quick for a first look

For each setting, the plain step and its variants are compiled, then run in turns, one step of
each a round, on the same batch and from the same state, with a plain step after every third
variant. `measured` is the median over the rounds of a variant's time over the mean of the plain
steps before and after it, so that a machine whose speed drifts does not decide it; `arithmetic`
is the ratio of the FLOPs in `layerskip_jax.training.flops`, for the rows that were dropped and the
exits that were scored in those very steps; `quotient` is measured over arithmetic. Steps are
spread over the run, so that schedules over time count as a whole. Memory is that of the compiled
step, arguments and temporaries; on a GPU the measured peak is printed too. The file has the
medians of the rounds so far. With `--quick` two variants are compiled at a time, so that
`compile` is no more than a hint.
"""

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import harness
import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from layerskip_jax.config import CompilerConfig, RunConfig, TrainingConfig
from layerskip_jax.early_exit_loss import EarlyExitConfig
from layerskip_jax.layer_dropout import LayerDropoutConfig
from layerskip_jax.model.config import ModelConfig
from layerskip_jax.ops.linear_cross_entropy import HeadInputs, linear_cross_entropy
from layerskip_jax.training.flops import CostModel
from layerskip_jax.training.setup import TrainSetup, make_setup
from layerskip_jax.training.step import Batch, TrainState

TOTAL_STEPS = 1000


@dataclasses.dataclass(frozen=True)
class Setting:
    """A model and a batch, and the variants that are run with it, compiled with these options."""

    about: str
    model: ModelConfig
    batch_size: int
    sequence_length: int
    variants: dict[str, dict]
    compiler: CompilerConfig = CompilerConfig()


@dataclasses.dataclass
class Measured:
    """What is known of one variant of one setting."""

    name: str
    setup: TrainSetup
    step: object
    cost: CostModel
    compile_seconds: float
    seconds: list[float] = dataclasses.field(default_factory=list)
    flops: list[float] = dataclasses.field(default_factory=list)
    plain_seconds: list[float] = dataclasses.field(default_factory=list)
    plain_flops: float = 0.0

    @property
    def measured(self) -> float:
        """Median time over that of the plain steps around it."""
        return float(np.median(np.divide(self.seconds, self.plain_seconds)))

    @property
    def arithmetic(self) -> float:
        """Mean FLOPs over those of a plain step."""
        return float(np.mean(self.flops)) / self.plain_flops

    @property
    def quotient(self) -> float:
        """Median of measured over arithmetic."""
        ratio = np.divide(self.seconds, self.plain_seconds)
        return float(np.median(ratio / np.divide(self.flops, self.plain_flops)))

    @property
    def memory(self) -> int:
        """Bytes of arguments and temporaries of the compiled step."""
        analysis = self.step.memory_analysis()
        return analysis.argument_size_in_bytes + analysis.temp_size_in_bytes


def dropout(p_max: float, execution: str, depth: str = "linear", **changes) -> dict:
    """Returns the settings of a variant with layer dropout."""
    return {
        "layer_dropout": LayerDropoutConfig(p_max, depth, execution=execution, **changes),
    }


def exits(curriculum: str, **changes) -> dict:
    """Returns the settings of a variant with early exits."""
    return {"early_exit": EarlyExitConfig(curriculum, **changes)}


# Don't Drop Dropout (docs/method.md, section 1), with a mean probability of .15.
DONT_DROP = dropout(0.6, "gather", time_schedule="decreasing", residual_scale="inverse_keep")
# LayerSkip's continual pretraining (docs/method.md, section 3): p_max .1, rotational 8.
LAYERSKIP = dropout(0.1, "gather", "exp") | exits("rotational", rotation_interval=8)
QUARTER = dropout(0.1, "gather", "exp") | exits(
    "rotational", rotation_interval=8, exit_token_fraction=0.25
)


def settings(device: str, quick: bool = False) -> dict[str, Setting]:
    """Returns the settings by name, sized for a CPU, less of it if `quick`, or for a GPU."""
    gpu = device != "cpu"
    quick = quick and not gpu
    length = 1024 if gpu else 256
    dtype = "bfloat16" if gpu else "float32"

    def model(layers, dim, ffn, heads, vocab):
        return ModelConfig(
            num_layers=layers, model_dim=dim, ffn_dim=ffn, num_heads=heads, num_kv_heads=heads,
            vocab_size=vocab, max_sequence_length=4096, dtype=dtype, remat="full",
        )  # fmt: skip

    if gpu:
        small, deep = model(12, 1024, 2816, 16, 32768), model(24, 2048, 5504, 16, 32768)
        seven = model(32, 1024, 2752, 8, 8192)
    elif quick:
        small, deep = model(8, 256, 704, 4, 4096), model(24, 128, 344, 1, 2048)
        seven = model(32, 128, 344, 1, 1024)
    else:
        small, deep = model(16, 512, 1408, 8, 8192), model(24, 256, 688, 2, 4096)
        seven = model(32, 256, 688, 2, 2048)
    ways = {
        f"{execution} p_max={p_max}": dropout(p_max, execution)
        for p_max in (0.1, 0.2, 0.6)
        for execution in ("mask", "gather", "cond")
    }
    # Without the newer emitters a step compiles in 0.7 of the time, and runs about as fast.
    compiler = CompilerConfig(options=("xla_cpu_use_fusion_emitters=false",) if quick else ())
    return {
        "layers": Setting(
            "every execution of layer dropout, linear in depth",
            small, 2 if quick else 16, length, ways | {"dont_drop": DONT_DROP}, compiler,
        ),
        "exits": Setting(
            "the proportions of the paper's 1.5B model: 24 layers, V = 16 D",
            deep, 2 if quick else 8, length,
            {
                "exits rotational(23)": exits("rotational", rotation_interval=23),
                "exits rotational(8)": exits("rotational", rotation_interval=8),
                "exits all": exits("all"),
                "1.5B recipe": dropout(0.1, "gather", "exp", time_schedule="exp")
                | exits("rotational", rotation_interval=23),
                "dont_drop": DONT_DROP,
            },
            compiler,
        ),
        "layerskip": Setting(
            "LayerSkip's recipe at the proportions of Llama 2 7B: 32 layers, V = 8 D",
            seven, 2 if quick else 16, length,
            {"layerskip": LAYERSKIP, "layerskip quarter tokens": QUARTER}, compiler,
        ),
    }  # fmt: skip


def random_batch(setting: Setting, setup: TrainSetup, seed: int) -> Batch:
    """Returns a batch of random tokens, one document a row."""
    random = np.random.default_rng(seed)
    shape = (setting.batch_size, setting.sequence_length)
    tokens = random.integers(0, setting.model.vocab_size, (shape[0], shape[1] + 1), np.int32)
    batch = Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        valid=np.ones(shape, bool),
        segment_ids=np.ones(shape, np.int32),
        positions=np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1)),
    )
    return setup.placement.place(batch)


def compile_variant(setting: Setting, name: str, changes: dict) -> Measured:
    """Builds and compiles one variant."""
    training = TrainingConfig(steps=TOTAL_STEPS, batch_size=setting.batch_size)
    fixed = {"model": setting.model, "training": training, "compiler": setting.compiler}
    config = RunConfig(**(fixed | changes))
    setup = make_setup(config, jax.devices()[:1])
    start = time.perf_counter()
    with jax.set_mesh(setup.mesh):
        step = setup.compile_step(setting.sequence_length)
    seconds = time.perf_counter() - start
    return Measured(name, setup, step, CostModel(setup.config, setting.sequence_length), seconds)


def chosen_variants(setting: Setting, only: str = "") -> dict[str, dict]:
    """Returns the plain step and the variants with `only` in their name."""
    return {"plain": {}} | {k: v for k, v in setting.variants.items() if only in k}


def compile_variants(setting: Setting, name: str, only: str, bench: harness.Bench):
    """Compiles the plain step and the variants, two at a time for a quick look."""

    def compiled(item: tuple[str, dict]) -> Measured:
        bench.begin(f"{name}: compiling {item[0]}")
        return compile_variant(setting, *item)

    with ThreadPoolExecutor(2 if bench.quick else 1) as pool:
        return list(pool.map(compiled, chosen_variants(setting, only).items()))


def measure(
    setting: Setting,
    variants: list[Measured],
    rounds: int,
    bench: harness.Bench,
    *,
    name: str,
    make_batch: Callable[..., Batch] = random_batch,
    beside: Callable[[], None] | None = None,
    after_round: Callable[[], None] | None = None,
) -> None:
    """Runs `rounds` steps of each variant in turns, the first of them plain.

    Args:
      setting: what the variants were compiled from.
      variants: take the seconds and FLOPs.
      rounds: steps of each.
      bench: is told of each round.
      name: of the setting.
      make_batch: of a setting, a setup and a seed.
      beside: something to be timed in turns with them, which times itself.
      after_round: called when a round's figures are complete.
    """
    plain, rest = variants[0], variants[1:]
    for variant in variants:
        variant.plain_flops = plain.cost.plain().computed
    with jax.set_mesh(plain.setup.mesh):
        state = plain.setup.init()

        def run(variant, at, batch):
            nonlocal state
            state = TrainState(jnp.int32(at), state.parameters, state.optimizer)
            jax.block_until_ready((state, batch))
            start = time.perf_counter()
            state, metrics = variant.step(state, batch)
            jax.block_until_ready(state)
            return time.perf_counter() - start, variant.cost.done(jax.device_get(metrics)).computed

        bench.begin(f"{name}: warming up")
        for variant in variants:
            run(variant, 0, make_batch(setting, plain.setup, 0))
        for round_ in range(rounds):
            bench.begin(f"{name}: round {round_ + 1} of {rounds}")
            batch = make_batch(setting, plain.setup, round_)
            at = int((round_ + 0.5) * TOTAL_STEPS / rounds)
            before, flops = run(plain, at, batch)
            for start in range(0, len(rest), 3):
                some = rest[start : start + 3]
                for variant in some:
                    seconds, done = run(variant, at, batch)
                    variant.seconds.append(seconds)
                    variant.flops.append(done)
                after, flops = run(plain, at, batch)
                for variant in some:
                    variant.plain_seconds.append((before + after) / 2)
                plain.seconds.append(after)
                before = after
            plain.plain_seconds = plain.seconds
            plain.flops = [flops] * len(plain.seconds)
            if beside:
                beside()
            if after_round:
                after_round()
    del state
    gc.collect()


def naive_loss(states, head, targets, valid, weights) -> jax.Array:
    """The loss of several exits with the logits of all tokens held at once."""
    logits = jnp.einsum("abmd,dv->abmv", states, head.astype(states.dtype))
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets[None, ..., None], axis=-1)[..., 0]
    nll = jnp.where(valid, jax.nn.logsumexp(logits, axis=-1) - picked, 0)
    return jnp.sum(weights * nll.sum(axis=(1, 2)))


def fused_loss(states, head, targets, valid, weights) -> jax.Array:
    """The same by `linear_cross_entropy`."""
    return linear_cross_entropy((HeadInputs(states, targets, valid, weights),), head, chunk=128)[0]


def compile_loss(loss, batch: int, length: int, width: int, vocab: int, dtype: str):
    """Compiles value and gradient of a loss over five exits."""
    shapes = (
        jax.ShapeDtypeStruct((5, batch, length, width), jnp.dtype(dtype)),
        jax.ShapeDtypeStruct((width, vocab), jnp.float32),
        jax.ShapeDtypeStruct((batch, length), jnp.int32),
        jax.ShapeDtypeStruct((batch, length), jnp.bool_),
        jax.ShapeDtypeStruct((5,), jnp.float32),
    )
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*shapes).compile()


def fused_against_naive(gpu: bool, rounds: int = 5) -> dict[str, float]:
    """Compares the fused loss of five exits with one that holds all logits.

    Memory is that of the compiled gradient at T 8192, D 2048, V 128k; time is taken at V 32k
    with sizes that both can run.
    """
    dtype = "bfloat16" if gpu else "float32"
    losses = (fused_loss, naive_loss)
    large = [compile_loss(loss, 8, 1024, 2048, 131072, dtype) for loss in losses]
    memory = [program.memory_analysis().temp_size_in_bytes for program in large]
    batch, length, width, vocab = (4, 1024, 2048, 32768) if gpu else (4, 128, 512, 32768)
    programs = [compile_loss(loss, batch, length, width, vocab, dtype) for loss in losses]
    keys = jax.random.split(jax.random.key(0), 3)
    inputs = (
        jax.random.normal(keys[0], (5, batch, length, width), jnp.dtype(dtype)),
        jax.random.normal(keys[1], (width, vocab)) * width**-0.5,
        jax.random.randint(keys[2], (batch, length), 0, vocab),
        jnp.ones((batch, length), bool),
        jnp.full(5, 0.2) / (batch * length),
    )
    seconds = [[], []]
    for round_ in range(rounds + 1):
        for index, program in enumerate(programs):
            start = time.perf_counter()
            jax.block_until_ready(program(*inputs))
            if round_:
                seconds[index].append(time.perf_counter() - start)
    fused_time, naive_time = map(statistics.median, seconds)
    return {
        "fused_over_naive_memory": memory[0] / memory[1],
        "fused_over_naive_time": fused_time / naive_time,
    }


def compiled_figures(variant: Measured, plain: Measured) -> dict[str, float]:
    """Returns what is known of a variant before it has run, over the plain step's."""
    temporaries = [v.step.memory_analysis().temp_size_in_bytes for v in (variant, plain)]
    return {
        "memory": variant.memory / plain.memory,
        "temporaries": temporaries[0] / temporaries[1],
        "compile": variant.compile_seconds / plain.compile_seconds,
    }


def timed_figures(variant: Measured) -> dict[str, float]:
    """Returns the medians of the rounds so far."""
    return {
        "seconds": statistics.median(variant.seconds),
        "measured": variant.measured,
        "arithmetic": variant.arithmetic,
        "quotient": variant.quotient,
    }


def flat(name: str, variants: list[Measured], figures: Callable) -> dict[str, float]:
    """Returns the figures of each variant under the setting's and the variant's name."""
    return {
        f"{name}/{variant.name}/{key}": value
        for variant in variants
        for key, value in figures(variant).items()
    }


def summary(figures: dict) -> dict[str, float]:
    """Returns the short names of what matters most, for what was measured."""
    found = {
        short: figures[key]
        for short, key in {
            "gather_pmax0.6_over_plain": "layers/gather p_max=0.6/measured",
            "layerskip_over_plain": "layerskip/layerskip/measured",
            "layerskip_quarter_tokens_over_plain": "layerskip/layerskip quarter tokens/measured",
            "layerskip_memory_over_plain": "layerskip/layerskip/memory",
            "dont_drop_over_plain": "layers/dont_drop/measured",
        }.items()
        if key in figures
    }
    quotients = [value for key, value in figures.items() if key.endswith("/quotient")]
    return found | ({"worst_measured_over_arithmetic": max(quotients)} if quotients else {})


def print_table(bench: harness.Bench, variants: list[Measured]) -> None:
    """Prints a setting's figures."""
    table = Table()
    headings = ("variant", "s/step", "measured", "arithmetic", "quotient")
    for heading in (*headings, "memory", "temporaries", "compile"):
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    for variant in variants:
        row = timed_figures(variant) | compiled_figures(variant, variants[0])
        table.add_row(variant.name, *(f"{value:.3f}" for value in row.values()))
    bench.print(table)


def run_setting(bench: harness.Bench, name: str, setting: Setting, only: str, rounds: int) -> None:
    """Measures one setting and adds its figures."""
    model = setting.model
    bench.print(
        f"\n[bold]{name}[/]: {setting.about}; L {model.num_layers}, D {model.model_dim}, "
        f"V {model.vocab_size}, S {setting.sequence_length}, batch {setting.batch_size}, "
        f"{model.dtype}, remat {model.remat}"
    )
    variants = compile_variants(setting, name, only, bench)
    bench.add(flat(name, variants, lambda v: compiled_figures(v, variants[0])), show=False)
    for variant in variants:
        memory = compiled_figures(variant, variants[0])["memory"]
        kernel = variant.setup.config.model.attention
        bench.add({f"{name}/{variant.name}/attention": kernel}, show=False)
        bench.print(
            f"{variant.name}: compiled in {variant.compile_seconds:.1f} s, memory {memory:.3f}, "
            f"attention {kernel}"
        )
    measure(
        setting, variants, rounds, bench, name=name,
        after_round=lambda: bench.add(flat(name, variants, timed_figures), show=False),
    )  # fmt: skip
    print_table(bench, variants)
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        bench.add({f"{name}/peak_bytes": stats["peak_bytes_in_use"]})


def main() -> int:
    """Runs the benchmark."""
    parser = harness.parser(__doc__.split("\n")[0], rounds=(6, 2))
    parser.add_argument("--setting", help="only this one: layers, exits, layerskip or fused")
    parser.add_argument("--only", default="", help="only variants with this in their name")
    options = harness.parse(parser)
    known = [*settings("cpu"), "fused"]
    if options.setting not in (None, *known):
        parser.error(f"--setting={options.setting} is none of {', '.join(known)}")
    device = jax.devices()[0].platform
    chosen = {
        name: setting
        for name, setting in settings(device, options.quick).items()
        if options.setting in (None, name) and any(options.only in v for v in setting.variants)
    }
    fused = options.setting in (None, "fused")
    with harness.Bench(options) as bench:
        for setting in chosen.values():  # each is compiled; then one round to warm up
            bench.expect(len(chosen_variants(setting, options.only)) + options.rounds + 1)
        bench.expect(bool(chosen) + fused)
        if chosen:
            # The first compilation in a process pays for more than itself.
            name, setting = next(iter(chosen.items()))
            bench.begin(f"{name}: compiling plain, to warm up")
            compile_variant(setting, "plain", {})
        for name, setting in chosen.items():
            before = summary(bench.figures)
            run_setting(bench, name, setting, options.only, options.rounds)
            found = summary(bench.figures)
            bench.add({key: value for key, value in found.items() if before.get(key) != value})
        if fused:
            bench.begin("fused: the loss of five exits with and without all logits")
            bench.add(fused_against_naive(device != "cpu", 2 if options.quick else 5))
    return 0


if __name__ == "__main__":
    harness.run(main)

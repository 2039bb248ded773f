r"""What attention costs by kernel, with a window and without, and how far it is from float32.

    python benchmarks/attention.py --json=attention.json             # --quick for a first look
    python benchmarks/attention.py --setting=kernels --only=cudnn

`kernels`: each that the device has, forward and with the backward pass, at the shape of Mistral
7B's attention, for windows that hold several documents (`packed`) and with the documents let see
each other (`joined`). `error` is the worst relative distance
||x - reference|| / ||reference|| of the result and the three gradients; the reference is
`jax.nn.dot_product_attention` in float32 at the highest precision on a float32 copy of the first
row and some of the heads. `over full` is the time over that of the same kernel without a window;
`pairs` the same ratio of what a token sees. All take turns; times are medians over the rounds.

`steps`: a training step of a small Mistral with windows, and with windows in three of four layers,
scanned by a traced kind, against the same step without, as in `train_step.py`.
"""

import dataclasses
import statistics
import time

import harness
import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table
from train_mfu import DOCUMENTS
from train_step import Setting, chosen_variants, run_setting

from layerskip_jax.model.config import ModelConfig
from layerskip_jax.ops.attention import KERNELS, PackedAttention, choose_kernel, seen_pairs
from layerskip_jax.schema import ConfigError

CALLS = 10  # that are timed together
# Of the heads, that the reference has room for at the longest sequences.
REFERENCE_KV_HEADS = 2


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of what the kernels are given: `tokens` in all, `windows` that each token may see."""

    tokens: int
    lengths: tuple[int, ...]
    windows: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str


@dataclasses.dataclass
class Case:
    """One kernel, one kind of mask and one window, compiled."""

    name: str
    window: int
    forward: jax.stages.Compiled
    both: jax.stages.Compiled
    error: float
    seconds: dict[str, list[float]]


def shape(gpu: bool, quick: bool) -> Shape:
    """Returns the sizes for a GPU or for a CPU, less of them if `quick`."""
    if gpu:
        return Shape(16384, (2048, 8192), (0, 128, 1024), 32, 8, 128, "bfloat16")
    lengths, windows = ((512,), (0, 64)) if quick else ((1024, 4096), (0, 128, 1024))
    return Shape(lengths[-1], lengths, windows, 8, 2, 64, "float32")


def step_setting(gpu: bool, quick: bool) -> Setting:
    """Returns a small Mistral, and itself with windows, packed documents apart or not."""
    window, length = (1024, 8192) if gpu else (64, 256) if quick else (128, 1024)
    dim, ffn, heads, vocab = (2048, 7168, 16, 32768) if gpu else (256, 896, 4, 2048)
    model = ModelConfig(
        vocab_size=vocab, num_layers=8, model_dim=dim, ffn_dim=ffn, num_heads=heads,
        num_kv_heads=heads // 4, max_sequence_length=length,
        dtype="bfloat16" if gpu else "float32", remat="full",
    )  # fmt: skip
    windowed = {"sliding_window": window}
    changes = {
        "window": windowed,
        "window in 3 of 4": windowed | {"full_attention_every": 4},
        "joined": {"packing_mask": False},
        "joined, window": windowed | {"packing_mask": False},
        "joined, window in 3 of 4": windowed
        | {"full_attention_every": 4, "packing_mask": False},
    }  # fmt: skip
    return Setting(
        f"a small Mistral, windows of {window}", model, 2, length,
        {name: {"model": dataclasses.replace(model, **change)} for name, change in changes.items()},
    )  # fmt: skip


def available(platform: str, shape: Shape, packed: bool, window: int) -> list[str]:
    """Returns the kernels that can do this here, none named twice."""
    found = []
    for name in KERNELS:
        try:
            found.append(
                choose_kernel(
                    name,
                    platform,
                    packing_mask=packed,
                    context=1,
                    window=window,
                    dtype=shape.dtype,
                    head_dim=shape.head_dim,
                )
            )
        except ConfigError:
            continue
    return list(dict.fromkeys(found))


def draw(shape: Shape, length: int) -> tuple[jax.Array, ...]:
    """Returns q, k, v, what the gradients are weighted by, and the documents of each position."""
    rows, random = shape.tokens // length, np.random.default_rng(length)
    segments = np.sort(random.integers(0, DOCUMENTS, (rows, length)), axis=1).astype(np.int32)
    dtype, keys = jnp.dtype(shape.dtype), jax.random.split(jax.random.key(length), 4)
    q, k, v, w = (
        jax.random.normal(key, (rows, length, heads, shape.head_dim), dtype)
        for key, heads in zip(
            keys, (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads), strict=True
        )
    )
    return q, k, v, w, jnp.asarray(segments)


def with_gradients(attend):
    """Returns a function of q, k, v, w and segments that gives the result and its gradients."""

    def both(q, k, v, w, segments):
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, segments), q, k, v)
        return out, *pull(w)

    return both


def part_of(x: jax.Array, heads: int) -> jax.Array:
    """Returns the first row and heads."""
    return x[:1, :, :heads]


def reference(inputs: tuple[jax.Array, ...], packed: bool, window: int) -> list[np.ndarray]:
    """Returns the result and the gradients of the first row and heads by the library, float32."""
    q, k, v, w, segments = inputs
    groups = q.shape[2] // k.shape[2]

    def attend(q, k, v, segments):
        same = (segments[:, :, None] == segments[:, None])[:, None] if packed else None
        return jax.nn.dot_product_attention(
            q, k, v, mask=same, is_causal=True, implementation="xla",
            local_window_size=(window - 1, 0) if window else None,
        )  # fmt: skip

    q, w = (part_of(x, REFERENCE_KV_HEADS * groups).astype(jnp.float32) for x in (q, w))
    k, v = (part_of(x, REFERENCE_KV_HEADS).astype(jnp.float32) for x in (k, v))
    with jax.default_matmul_precision("highest"):
        found = jax.jit(with_gradients(attend))(q, k, v, w, segments[:1])
    return [np.asarray(x) for x in found]


def distance(found: tuple[jax.Array, ...], expected: list[np.ndarray]) -> float:
    """Returns the worst relative distance of the result and the gradients."""
    parts = [
        np.asarray(part_of(x, e.shape[2]), np.float32) - e
        for x, e in zip(found, expected, strict=True)
    ]
    norm = np.linalg.norm
    return max(float(norm(d) / norm(e)) for d, e in zip(parts, expected, strict=True))


def compile_case(
    name: str, kernel: str, packed: bool, window: int, inputs: tuple, expected: list[np.ndarray]
) -> Case:
    """Compiles a kernel's two programs, runs them once, and compares."""
    attend = PackedAttention(kernel, packing_mask=packed, window=window)
    q, k, v, _, segments = inputs
    forward = jax.jit(attend.__call__).lower(q, k, v, segments).compile()
    both = jax.jit(with_gradients(attend)).lower(*inputs).compile()
    jax.block_until_ready(forward(q, k, v, segments))
    error = distance(both(*inputs), expected)
    return Case(name, window, forward, both, error, {"forward": [], "both": []})


def time_calls(program, *inputs) -> float:
    """Returns the seconds of one call of several in a row."""
    start = time.perf_counter()
    for _ in range(CALLS):
        out = program(*inputs)
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / CALLS


def run_kernels(bench: harness.Bench, shape: Shape, only: str, rounds: int) -> None:
    """Measures every kernel and adds its figures."""
    platform = jax.devices()[0].platform
    for length in shape.lengths:
        inputs = draw(shape, length)
        q, k, v, _, segments = inputs
        cases: list[Case] = []
        for packed in (False, True):
            for window in shape.windows:
                names = available(platform, shape, packed, window)
                chosen = names[0]  # `auto` is the first of KERNELS
                mask = "packed" if packed else "joined"
                bench.add({f"kernels/{mask}/window {window}/auto": chosen}, show=False)
                named = {kernel: f"{mask}/{kernel}/S {length}/window {window}" for kernel in names}
                named = {kernel: name for kernel, name in named.items() if only in name}
                bench.begin(f"{mask}, S {length}, window {window}: {', '.join(named) or 'none'}")
                if not named:
                    continue
                expected = reference(inputs, packed, window)
                for kernel, name in named.items():
                    case = compile_case(name, kernel, packed, window, inputs, expected)
                    bench.add({f"kernels/{name}/error": case.error}, show=False)
                    cases.append(case)
        for round_ in range(rounds + 1):
            bench.begin(f"S {length}: round {round_} of {rounds}")
            for case in cases:
                seconds = {
                    "forward": time_calls(case.forward, q, k, v, segments),
                    "both": time_calls(case.both, *inputs),
                }
                for key, value in seconds.items() if round_ else ():
                    case.seconds[key].append(value)
        add_kernels(bench, shape, length, cases)


def add_kernels(bench: harness.Bench, shape: Shape, length: int, cases: list[Case]) -> None:
    """Adds the times of one length, and prints them as a table."""
    table = Table(f"S {length}", title=f"batch {shape.tokens // length}")
    for heading in ("forward ms", "over full", "with gradients ms", "over full", "pairs", "error"):
        table.add_column(heading, justify="right")
    median = {
        case.name: {key: statistics.median(values) for key, values in case.seconds.items()}
        for case in cases
    }
    for case in cases:
        own = median[case.name]
        full = median.get(case.name.replace(f"/window {case.window}", "/window 0"))
        figures, cells = {}, []
        for key, seconds in own.items():
            figures[f"{key}_seconds"] = seconds
            cells.append(f"{seconds * 1e3:.3f}")
            if full:
                figures[f"{key}_over_full"] = seconds / full[key]
            cells.append(f"{seconds / full[key]:.3f}" if full else "")
        pairs = seen_pairs(length, case.window) / seen_pairs(length)
        table.add_row(case.name, *cells, f"{pairs:.3f}", f"{case.error:.2g}")
        bench.add({f"kernels/{case.name}/{k}": v for k, v in figures.items()}, show=False)
    bench.print(table)


def main() -> int:
    """Runs the benchmark."""
    parser = harness.parser(__doc__.split("\n")[0], rounds=(6, 2))
    parser.add_argument("--setting", choices=("kernels", "steps"), help="only this one")
    parser.add_argument("--only", default="", help="only what has this in its name")
    options = harness.parse(parser)
    gpu = jax.devices()[0].platform != "cpu"
    with harness.Bench(options) as bench:
        if options.setting in (None, "kernels"):
            sizes = shape(gpu, options.quick)
            masks = 2 * len(sizes.windows) + options.rounds + 1  # and one round to warm up
            bench.expect(len(sizes.lengths) * masks)
            run_kernels(bench, sizes, options.only, options.rounds)
        if options.setting in (None, "steps"):
            setting = step_setting(gpu, options.quick)
            bench.expect(len(chosen_variants(setting, options.only)) + options.rounds + 1)
            run_setting(bench, "steps", setting, options.only, options.rounds)
    return 0


if __name__ == "__main__":
    harness.run(main)

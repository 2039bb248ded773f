r"""Training speed, packed, against `transformers` in the same run, and MFU where the peak is known.

    python benchmarks/train_mfu.py --json=train_mfu.json             # --quick for fewer rounds

On a GPU: the shape of Llama 3.2 1B in bfloat16; beside ours, `transformers`' Llama of the same
shape and batch with torch.compile, bfloat16 autocast, scaled_dot_product_attention without a
packing mask, gradient checkpointing, fused AdamW. On a CPU: 34M parameters in float32 (8 layers,
D 512, V 8192, 8 windows of 256), once without rematerialisation and once with all of it, against
`transformers` in eager mode on as many threads as there are cores, with gradient checkpointing
for the latter.

Windows hold several documents, kept apart by the attention kernel that `auto` takes. A round is
a plain step, one of LayerSkip's continual recipe, a plain one and one of `transformers`, so that
a machine whose speed drifts slows all of them; speeds over `transformers` are medians over the
rounds, of its seconds over ours, LayerSkip's too over its plain step. MFU is the matrix-product
FLOPs that the step needs over time and the chip's published bfloat16 peak. Names without a
rematerialisation before them are those of the first.

Both run in one process: between steps neither keeps a core busy (`transformers/idle_cpu_seconds`
is the processor time that the process takes in half a second of waiting after a step of theirs).
"""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable

import harness
import jax
import numpy as np
from rich.table import Table
from train_step import (
    LAYERSKIP,
    Measured,
    Setting,
    chosen_variants,
    compile_variants,
    measure,
)

from layerskip_jax.hardware.chips import peak_flops
from layerskip_jax.model.config import ModelConfig
from layerskip_jax.training.setup import TrainSetup
from layerskip_jax.training.step import Batch

DOCUMENTS = 5  # in a window


def setting(gpu: bool) -> Setting:
    """Returns the model and the batch, sized for a GPU of 80 GB or for a CPU."""
    if gpu:
        model = ModelConfig(
            vocab_size=128256, num_layers=16, model_dim=2048, ffn_dim=8192, num_heads=32,
            num_kv_heads=8, max_sequence_length=4096, rope_theta=500_000.0, tie_embeddings=True,
            dtype="bfloat16", remat="save_attention",
        )  # fmt: skip
        return Setting("Llama 3.2 1B", model, 4, 4096, {"layerskip": LAYERSKIP})
    model = ModelConfig(
        vocab_size=8192, num_layers=8, model_dim=512, ffn_dim=1408, num_heads=8, num_kv_heads=8,
        max_sequence_length=256, tie_embeddings=False, dtype="float32", remat="none",
    )  # fmt: skip
    return Setting("8 layers of width 512", model, 8, 256, {"layerskip": LAYERSKIP})


def remats(gpu: bool) -> tuple[str, ...]:
    """Returns the rematerialisations that are measured: a GPU has no room for `none`."""
    return ("save_attention",) if gpu else ("none", "full")


def packed_batch(setting: Setting, setup: TrainSetup, seed: int) -> Batch:
    """Returns windows of random tokens, each of several documents of random lengths."""
    random = np.random.default_rng(seed)
    rows, length = setting.batch_size, setting.sequence_length
    tokens = random.integers(0, setting.model.vocab_size, (rows, length + 1), np.int32)
    segments = np.sort(random.integers(1, DOCUMENTS + 1, (rows, length)), axis=1).astype(np.int32)
    index = np.arange(length, dtype=np.int32)
    starts = np.maximum.accumulate(
        np.where(np.diff(segments, axis=1, prepend=0) != 0, index, 0), axis=1
    )
    valid = np.diff(segments, axis=1, append=0) == 0
    batch = Batch(tokens[:, :-1], tokens[:, 1:], valid, segments, index - starts)
    return setup.placement.place(batch)


def in_torch(setting: Setting, checkpointing: bool) -> Callable[[], float] | None:
    """Returns a step of `transformers` that gives its seconds, or None without torch."""
    try:
        import torch
        import transformers
    except ImportError:
        return None
    model, device = setting.model, "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=model.vocab_size, hidden_size=model.model_dim,
        intermediate_size=model.ffn_dim, num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads, num_key_value_heads=model.num_kv_heads,
        max_position_embeddings=model.max_sequence_length,
        tie_word_embeddings=model.tie_embeddings,
    )  # fmt: skip
    llama = transformers.LlamaForCausalLM(config).to(device).train()
    if checkpointing:
        # Its older name where `transformers` is an older one.
        enable = getattr(llama, "activation_checkpointing_enable", None)
        (enable or llama.gradient_checkpointing_enable)()
    adamw = torch.optim.AdamW(llama.parameters(), lr=1e-4, fused=device == "cuda")
    # Compiling costs a CPU minutes and shows nothing of a GPU.
    compiled = torch.compile(llama) if device == "cuda" else llama
    shape = (setting.batch_size, setting.sequence_length)

    def step() -> float:
        tokens = torch.randint(0, model.vocab_size, shape, device=device)
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = compiled(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(llama.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return step


def idle_cpu_seconds() -> float:
    """Returns the processor time that this process takes in half a second of doing nothing."""
    start = time.process_time()
    time.sleep(0.5)
    return time.process_time() - start


def speed(needed: float, seconds: float, peak: float | None) -> dict[str, float]:
    """Returns seconds, FLOP/s that the step needed, and MFU where the peak is known."""
    figures = {"seconds": seconds, "needed_flops_per_second": needed / seconds}
    if peak:
        figures["mfu"] = needed / seconds / peak
    return figures


def figures_of(
    variants: list[Measured], theirs: list[float], peak: float | None
) -> dict[str, float]:
    """Returns the figures of the rounds so far.

    Args:
      variants: plain, and LayerSkip.
      theirs: seconds of `transformers`, each after a plain step; empty without torch.
      peak: FLOP/s, or None.
    """
    plain, ours = variants
    figures = {}
    for variant in variants:
        needed = variant.cost.planned(0, variant.setup.config.training.steps).needed
        of_variant = speed(needed, statistics.median(variant.seconds), peak)
        figures |= {f"{variant.name}/{key}": value for key, value in of_variant.items()}
    figures["layerskip_over_plain"] = ours.measured
    if theirs:
        of_theirs = speed(plain.cost.plain().needed, statistics.median(theirs), peak)
        figures |= {f"transformers/{key}": value for key, value in of_theirs.items()}
        for variant in variants:
            ratio = float(np.median(np.divide(theirs, variant.seconds)))
            figures[f"{variant.name}_over_transformers_speed"] = ratio
    return figures


def print_table(bench: harness.Bench, remat: str, peak: float | None) -> None:
    """Prints a rematerialisation's figures."""
    table = Table("step", "s", "TFLOP/s needed", "MFU")
    for name in ("plain", "layerskip", "transformers"):
        if f"{remat}/{name}/seconds" in bench.figures:
            row = {
                key: bench.figures.get(f"{remat}/{name}/{key}", 0.0)
                for key in ("seconds", "needed_flops_per_second", "mfu")
            }
            table.add_row(
                name, f"{row['seconds']:.4f}", f"{row['needed_flops_per_second'] / 1e12:.3f}",
                f"{row['mfu']:.1%}" if peak else "",
            )  # fmt: skip
    bench.print(table)


def run_remat(
    bench: harness.Bench, setting: Setting, rounds: int, peak: float | None, first: bool
) -> None:
    """Measures one rematerialisation and adds its figures."""
    remat = setting.model.remat
    name = f"remat {remat}"
    variants = compile_variants(setting, name, "", bench)
    kernel = variants[0].setup.config.model.attention
    if first:
        bench.add({"attention": kernel})
    step = in_torch(setting, checkpointing=remat != "none")
    seconds: list[float] = []

    def beside() -> None:
        if step:
            seconds.append(step())

    def add(show: bool = False) -> None:
        found = figures_of(variants, seconds, peak)
        bench.add({f"{remat}/{key}": value for key, value in found.items()}, show=False)
        if first:  # of each variant's own figures there is one set, by name
            bench.add({k: v for k, v in found.items() if "/" not in k}, show=False)
        if show:
            for key, value in found.items():
                if "/" not in key:
                    bench.print(f"{remat}/{key}: {harness.shown(value)}")

    if step:
        bench.begin(f"{name}: warming up transformers")
        step()
        if first:
            bench.add({"transformers/idle_cpu_seconds": idle_cpu_seconds()})
    measure(
        setting, variants, rounds, bench,
        name=name, make_batch=packed_batch, beside=beside, after_round=add,
    )  # fmt: skip
    print_table(bench, remat, peak)
    add(show=True)


def main() -> int:
    """Runs the benchmark."""
    parser = harness.parser(__doc__.split("\n")[0], rounds=(10, 3))
    parser.add_argument("--peak-tflops", type=float, default=0.0, help="of the device, if unknown")
    options = harness.parse(parser)
    device = jax.devices()[0]
    gpu = device.platform != "cpu"
    peak = peak_flops([device], options.peak_tflops)
    chosen = setting(gpu)
    with harness.Bench(options) as bench:
        bench.print(
            f"{chosen.about}, {chosen.batch_size} windows of {chosen.sequence_length}, "
            f"{DOCUMENTS} documents each, {chosen.model.dtype}"
        )
        bench.add({"device": device.device_kind}, show=False)
        # Each is compiled; then ours and theirs warm up.
        steps = len(chosen_variants(chosen)) + options.rounds + 2
        bench.expect(steps * len(remats(gpu)))
        for index, remat in enumerate(remats(gpu)):
            model = dataclasses.replace(chosen.model, remat=remat)
            run_remat(
                bench, dataclasses.replace(chosen, model=model), options.rounds, peak, index == 0
            )
    return 0


if __name__ == "__main__":
    harness.run(main)

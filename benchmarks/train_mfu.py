r"""Training speed of a model of 1B parameters, packed, in bfloat16, and `transformers` beside it.

    python benchmarks/train_mfu.py --json=train_mfu.json

The shape is Llama 3.2 1B's; windows hold several documents, kept apart by the attention kernel
that `auto` takes, and the step is run with LayerSkip's continual recipe and plainly, in turns (see
train_step.py). MFU is matrix-product FLOPs needed over time and the chip's published bfloat16 peak.
Beside it, on the same device in the same run, a step of `transformers`' Llama of the same shape and
batch: torch.compile, bfloat16 autocast, scaled_dot_product_attention without a packing mask,
gradient checkpointing, fused AdamW. On a CPU the model is tiny and the figures mean little.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.table import Table
from train_step import LAYERSKIP, Measured, Setting, measure

from layerskip_jax.model.config import ModelConfig
from layerskip_jax.parallel.chips import peak_flops
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
        return Setting("Llama 3.2 1B", model, 8, 4096, {"layerskip": LAYERSKIP})
    model = ModelConfig(
        vocab_size=512, num_layers=8, model_dim=128, ffn_dim=256, num_heads=4, num_kv_heads=2,
        max_sequence_length=128, tie_embeddings=True, dtype="float32", remat="save_attention",
    )  # fmt: skip
    return Setting("a small model", model, 8, 128, {"layerskip": LAYERSKIP})


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


def in_torch(setting: Setting, rounds: int) -> float | None:
    """Returns the median seconds of a step of `transformers`, or None without torch."""
    try:
        import torch
        import transformers
    except ImportError:
        return None
    model, device = setting.model, "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=model.vocab_size, hidden_size=model.model_dim,
        intermediate_size=model.ffn_dim, num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads, num_key_value_heads=model.num_kv_heads,
        max_position_embeddings=model.max_sequence_length, tie_word_embeddings=True,
    )  # fmt: skip
    llama = transformers.LlamaForCausalLM(config).to(device).train()
    llama.activation_checkpointing_enable()
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

    for _ in range(3):
        step()
    return statistics.median(step() for _ in range(rounds))


def figures_of(variant: Measured, peak: float | None) -> dict[str, float]:
    """Returns seconds, FLOP/s that the step needed, and MFU where the peak is known."""
    setup_config = variant.setup.config
    needed = variant.cost.planned(0, setup_config.training.steps).needed
    seconds = statistics.median(variant.seconds)
    figures = {"seconds": seconds, "needed_flops_per_second": needed / seconds}
    if peak:
        figures["mfu"] = needed / seconds / peak
    return figures


def main() -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[2])
    parser.add_argument("--rounds", type=int, default=10, help="counted steps of each variant")
    parser.add_argument("--peak-tflops", type=float, default=0.0, help="of the device, if unknown")
    parser.add_argument("--json", type=Path, help="file to write the figures to, flat")
    options = parser.parse_args()
    device = jax.devices()[0]
    chosen = setting(device.platform != "cpu")
    peak = peak_flops([device], options.peak_tflops)
    variants = measure(chosen, "", options.rounds, packed_batch)
    plain, ours = variants
    kernel = plain.setup.config.model.attention
    result: dict = {"device": device.device_kind, "attention": kernel}
    table = Table("step", "s", "TFLOP/s needed", "MFU")
    seconds = {}
    for variant in variants:
        figures = figures_of(variant, peak)
        seconds[variant.name] = figures["seconds"]
        result |= {f"{variant.name}/{name}": value for name, value in figures.items()}
        table.add_row(
            variant.name, f"{figures['seconds']:.4f}",
            f"{figures['needed_flops_per_second'] / 1e12:.3f}",
            f"{figures['mfu']:.1%}" if peak else "",
        )  # fmt: skip
    result["layerskip_over_plain"] = ours.measured
    theirs = in_torch(chosen, options.rounds)
    if theirs is not None:
        result["transformers/seconds"] = theirs
        result["plain_over_transformers_speed"] = theirs / seconds["plain"]
        flops = plain.cost.plain().needed / theirs
        table.add_row(
            "transformers", f"{theirs:.4f}", f"{flops / 1e12:.3f}",
            f"{flops / peak:.1%}" if peak else "",
        )  # fmt: skip
    console = Console(width=110)
    console.print(
        f"{chosen.about}, {chosen.batch_size} windows of {chosen.sequence_length}, "
        f"{DOCUMENTS} documents each, {chosen.model.dtype}, attention {kernel}, on "
        f"{device.device_kind}",
        highlight=False,
    )
    console.print(table)
    console.print(f"LayerSkip over plain: {ours.measured:.3f}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

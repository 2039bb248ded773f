"""A run folder with made-up but plausible contents, for the report to read."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from layerskip_jax.config import RunConfig
from layerskip_jax.early_exit_loss import EarlyExitConfig, exit_weights
from layerskip_jax.layer_dropout import LayerDropoutConfig, drop_probabilities
from layerskip_jax.run_folder.atomic import write_json


def small_config(layers: int = 8, steps: int = 60, **early_exit) -> RunConfig:
    """Returns the config of a run with linear, decreasing dropout and rotating exits."""
    config = RunConfig()
    early_exit = {"curriculum": "rotational", "rotation_interval": 4, **early_exit}
    return dataclasses.replace(
        config,
        model=dataclasses.replace(
            config.model,
            num_layers=layers,
            vocab_size=4096,
            model_dim=64,
            head_dim=16,
            num_heads=4,
            num_kv_heads=2,
            ffn_dim=160,
        ),
        layer_dropout=LayerDropoutConfig(
            p_max=0.6, depth_schedule="linear", time_schedule="decreasing"
        ),
        early_exit=EarlyExitConfig(**early_exit),
        training=dataclasses.replace(config.training, steps=steps, log_every=1, evaluate_every=20),
    )


def make_run(folder: Path, config: RunConfig, *, seed: int = 0, upto: int | None = None) -> Path:
    """Writes config, metrics, evaluations, manifest, sweep and plain twin of a run.

    Args:
      folder: where; created.
      config: its layers, steps and schedules shape the curves.
      seed: of the noise.
      upto: the last step done; None finishes the run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    layers, total = config.model.num_layers, config.training.steps
    upto, every = upto or total, config.training.log_every
    tokens_per_step = config.training.batch_size * 256
    floor = 3.05 + 0.9 * ((layers - 1 - np.arange(layers)) / layers) ** 2.2

    def exit_losses(step):
        return floor + (math.log(4096) - floor) / (1 + 14 * step / total) ** 0.9

    write_json(folder / "config.json", config.to_dict())
    steps = jnp.arange(upto)
    all_weights = np.asarray(
        jax.vmap(lambda t: exit_weights(config.early_exit, layers, t, total))(steps)
    )
    dropped = np.asarray(
        jax.vmap(lambda t: drop_probabilities(config.layer_dropout, layers, t, total))(steps)
    ).mean(axis=1)
    lines = []
    for step in range(1, upto + 1):
        if step % every and step != 1 and step != upto:
            continue
        weights = all_weights[max(step - min(every, layers), 0) : step].sum(axis=0)
        noisy = exit_losses(step) + rng.normal(0, 0.05, layers)
        kept = 1 - dropped[step - 1]
        lines.append(
            {
                "step": step,
                "loss": float((noisy * weights).sum() / weights.sum()),
                "exit_loss": {str(i + 1): float(noisy[i]) for i in np.flatnonzero(weights)},
                "tokens": step * tokens_per_step,
                "tokens_per_second": float(9200 / kept * rng.normal(1, 0.03)),
                "gradient_norm": float(0.4 + 3 / (1 + 20 * step / total) + rng.gamma(2, 0.05)),
                "learning_rate": 3e-4 * min(step / (0.1 * total), 1.15 - step / total),
                "layers_run": float(np.clip(kept + rng.normal(0, 0.02), 0, 1)),
                "seconds": step * 0.82,
            }
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def evaluation(losses):
        return [
            {"layers": i + 1, "loss": float(loss), "perplexity": math.exp(loss)}
            for i, loss in enumerate(losses)
        ]

    due = config.training.evaluate_every
    steps = sorted({*range(due, upto + 1, due), upto})
    evaluations = [{"step": s, "exits": evaluation(exit_losses(s) + 0.06)} for s in steps]
    text = "".join(json.dumps(e) + "\n" for e in evaluations)
    (folder / "evaluations.jsonl").write_text(text)
    plain = exit_losses(upto)[-1] + 5.2 * ((layers - 1 - np.arange(layers)) / layers) ** 0.8
    write_json(
        folder / "plain.json", {"label": "dropout and exits off", "exits": evaluation(plain)}
    )

    def needed(model, late):
        counts = np.arange(1, layers + 1) * late + 10 * np.arange(layers, 0, -1)
        tokens = int(counts.sum())
        mean = float(counts @ np.arange(1, layers + 1) / tokens)
        depth = {"mean": mean, "saving": 1 - mean / layers, "histogram": counts.tolist()}
        found = {"class": "word begin", "tokens": tokens, "settled": mean}
        return {
            "model": model, "layers": layers, "tokens": tokens, "first_agreement": depth,
            "settled": depth, "changes_of_mind": {**depth, "mean": mean - 1}, "classes": [found],
        }  # fmt: skip

    write_json(folder / "layers_needed.json", {**needed("run", 1), "beside": [needed("plain", 9)]})
    write_json(
        folder / "data.json",
        {
            "vocab_size": 4096,
            "sequence_length": 256,
            "unigram_entropy_nats": 6.31,
            "train": {
                "documents": 5120,
                "tokens": 9_800_000,
                "shards": [{"name": "train-00000", "windows": 38_281, "sha256": "0a1b"}],
            },
            "validation": {"documents": 160, "tokens": 310_000, "shards": []},
            "request": {"sources": ["/usr/lib/python3.11"], "seed": 0},
        },
    )
    pairs = []
    for exit_layer in sorted({max(layers // 4, 1), max(layers // 2, 1), max(3 * layers // 4, 1)}):
        rate = 0.45 + 0.5 * exit_layer / layers
        for draft_length in (2, 3, 4, 6, 8):
            kept = [rate ** (i + 1) for i in range(draft_length)]
            cost = draft_length * exit_layer / layers + 1 - 0.6 * exit_layer / layers + 0.15
            speedup = (1 + sum(kept)) / cost
            pairs.append(
                {
                    "exit_layer": exit_layer,
                    "draft_length": draft_length,
                    "acceptance": sum(kept) / draft_length,
                    "tokens_per_cycle": 1 + sum(kept),
                    "acceptance_by_position": kept,
                    "tokens_per_second": 212.4 * speedup,
                    "speedup": speedup,
                    "identical": True,
                }
            )
    best = max(pairs, key=lambda pair: pair["speedup"])
    write_json(
        folder / "speculation.json",
        {
            "prompts": 16,
            "prompt_tokens": 64,
            "new_tokens": 128,
            "plain_tokens_per_second": 212.4,
            "pairs": pairs,
            "best": {key: best[key] for key in ("exit_layer", "draft_length", "speedup")},
        },
    )
    return folder

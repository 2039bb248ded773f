"""The README.md of an exported model."""

import math
from pathlib import PurePath
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from layerskip_jax.config import RunConfig, TrainingConfig
from layerskip_jax.data.batch_sizes import BatchSizes
from layerskip_jax.interop.huggingface import OF_FAMILIES
from layerskip_jax.model.config import ModelConfig

_NAME = "A LayerSkip model"

_DRAFT = """\
## Drafting with its own first layers

All exits share the final norm and the head, so the model can draft with its first layers and
verify with all of them. Greedy decoding gives the same text as without; how much faster it is
depends on how often the drafts are right. {measured}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
prompt = tokenizer("Once upon a time", return_tensors="pt")
tokens = model.generate(
    **prompt, assistant_early_exit={draft}, do_sample=False, max_new_tokens={new_tokens}
)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))
```

With one cache for drafts and verification, and compiled, in layerskip_jax:

```
layerskip generate --workdir=RUN --prompt="Once upon a time" --draft={draft},{draft_length}
```
"""

_MEASURED = """\
Measured on {prompts} prompts, batch 1: with
{exit_layer} layers drafting {draft_length} tokens, {acceptance:.0%} of the drafts were right and \
decoding was {speedup:.2f} times as fast as
without."""


def write_model_card(
    config: RunConfig,
    *,
    model: ModelConfig,
    step: int,
    dtype: str,
    evaluation: dict[str, Any] | None,
    before: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    speculation: dict[str, Any] | None = None,
) -> str:
    """Returns the text: what the model is, how it was trained, how good each exit is.

    Args:
      config: the run's.
      model: what is exported, with as many layers as are exported.
      step: optimizer steps the parameters were trained for.
      dtype: the stored tensors' dtype.
      evaluation: `{"step": n, "exits": [{"layers": E, "loss": ..., "perplexity": ...}]}`, loss
        in nats a token; None where there was none.
      before: the same of the model that the run started from.
      data: the manifest of the data, as far as there is one.
      speculation: what `layerskip sweep` found.
    """
    source = PurePath(config.init_from).name
    if source and step == 0:
        text = f"The weights of {source}, converted by layerskip_jax and not trained further.\n"
    else:
        text = (
            "A decoder of the Llama family, trained with layerskip_jax in the manner of LayerSkip\n"
            "(Elhoushi et al., 2024, arXiv:2404.16710)"
        )
        text += f", starting from the weights of\n{source}.\n" if source else ".\n"
    if model.num_layers < config.model.num_layers:
        text += (
            f"\nThese are its first {model.num_layers} layers of {config.model.num_layers}, with "
            "the head that all exits share.\n"
        )
    exits = [entry for entry in _finite(evaluation) if entry["layers"] <= model.num_layers]
    parts = [
        f"---\n{_front_matter(exits, data)}\n---\n",
        f"# {_NAME}\n",
        text,
        _table(("setting", "value"), _settings(config, model, step, dtype).items()),
    ]
    if data and "train" in data and step:
        parts.append("## Data\n\n" + _table(("", ""), _data(data).items()))
    if exits:
        start = {entry["layers"]: entry for entry in _finite(before)}
        heading = ["layers", "loss (nats a token)", "perplexity"]
        rows = [
            [entry["layers"], f"{entry['loss']:.4f}", f"{entry['perplexity']:.2f}"]
            for entry in exits
        ]
        if start and evaluation["step"]:
            heading.append(f"perplexity of {source or 'the start'}")
            for row in rows:
                row.append(f"{start[row[0]]['perplexity']:.2f}" if row[0] in start else "")
        parts += [
            f"## Perplexity by exit\n\nOn the validation set, at step {evaluation['step']}.\n"
            + _own_exits(model),
            _table(heading, rows),
        ]
    if model.num_layers > 1:
        parts.append(_drafting(model, speculation))
    return "\n".join(parts)


def _finite(evaluation: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Returns the exits of an evaluation but those whose figures are not finite (null in JSON)."""

    def is_finite(value: float | None) -> bool:
        return value is not None and math.isfinite(value)

    exits = (evaluation or {}).get("exits", ())
    return [e for e in exits if is_finite(e["loss"]) and is_finite(e["perplexity"])]


def _front_matter(exits: list[dict[str, Any]], data: dict[str, Any] | None) -> ModelCardData:
    """Returns what the Hub reads: tags, and each exit's perplexity as an evaluation result."""
    names = _source_names(data) if data and "train" in data else []
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["layerskip", "early-exit", "self-speculative-decoding"],
        model_name=_NAME,
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type=names[0] if names else "text",
                dataset_name=", ".join([*names, "validation set"]),
                metric_type="perplexity",
                metric_name=f"Perplexity of the first {entry['layers']} layers",
                metric_value=round(entry["perplexity"], 2),
            )
            for entry in exits
        ]
        or None,
    )


def _of_family(model: ModelConfig) -> dict[str, str]:
    """Returns what differs from Llama, by the names of the settings."""
    plain = ModelConfig()
    return {
        name.replace("_", " "): str(getattr(model, name))
        for name in OF_FAMILIES
        if getattr(model, name) != getattr(plain, name)
    }


def _settings(config: RunConfig, model: ModelConfig, step: int, dtype: str) -> dict[str, Any]:
    dropout, exits = config.layer_dropout, config.early_exit
    settings = {
        "layers": model.num_layers,
        "width": model.model_dim,
        "feed-forward width": model.ffn_dim,
        "query heads": model.num_heads,
        "key/value heads": model.num_kv_heads,
        "vocabulary": model.vocab_size,
        "context": f"{model.max_sequence_length} tokens",
        **_of_family(model),
        "tied embeddings": "yes" if model.tie_embeddings else "no",
        "stored as": dtype,
    }
    if step == 0:
        return settings
    return settings | {
        "optimizer steps": f"{step} of {config.training.steps}",
        "windows a step": _batch(config.training),
        "learning rate": config.optimizer.learning_rate,
        "layer dropout": (
            f"up to {dropout.p_max}, {dropout.depth_schedule} over the layers, "
            f"{dropout.time_schedule} over the steps"
            if dropout.p_max
            else "none"
        ),
        "early-exit loss": (
            "none; the last layer alone was trained"
            if exits.curriculum == "last"
            else f"{exits.curriculum} curriculum, scale {exits.e_scale}"
        ),
        "seed": config.seed,
    }


def _batch(training: TrainingConfig) -> str:
    """Returns the windows of a step."""
    begins = BatchSizes.of(training).stages[0][1]
    steps = ", ".join(map(str, training.batch_ramp))
    ramp = f", from {begins} on, doubled at the steps {steps}" if steps else ""
    return f"{training.batch_size}{ramp}"


def _data(data: dict[str, Any]) -> dict[str, Any]:
    """Returns what the manifest says of the corpus, without the folders of who prepared it."""
    train, validation = data["train"], data["validation"]
    return {
        "sources": ", ".join(f"`{name}`" for name in _source_names(data)),
        "training": f"{train['documents']:,} documents, {train['tokens']:,} tokens, "
        f"{train['windows']:,} windows of {data['sequence_length']}",
        "validation": f"{validation['documents']:,} documents, {validation['tokens']:,} tokens",
        "fingerprint": f"`{data['fingerprint']}`",
    }


def _source_names(data: dict[str, Any]) -> list[str]:
    sources = [str(source) for source in data["request"]["sources"]]
    return [PurePath(source).name if "/" in source else source for source in sources]


def _drafting(model: ModelConfig, speculation: dict[str, Any] | None) -> str:
    best = (speculation or {}).get("best")
    if not best or best["exit_layer"] >= model.num_layers:
        measured = f"Try other values of\n`assistant_early_exit`, from 1 to {model.num_layers - 1}."
        best = {"exit_layer": max(1, model.num_layers // 4), "draft_length": 3}
    else:
        measured = _MEASURED.format(prompts=speculation["prompts"], **best)
    return _DRAFT.format(
        measured=measured,
        draft=best["exit_layer"],
        draft_length=best["draft_length"],
        new_tokens=min(64, model.max_sequence_length // 2),
    )


def _own_exits(model: ModelConfig) -> str:
    """Returns what the card says of exits that are trained by themselves."""
    if not model.exits.adapters:
        return ""
    which = ", ".join(map(str, model.exits.adapters))
    return (
        f"\nThe exits after {which} layers have adapters (exits.safetensors), which layerskip_jax\n"
        "reads them through, and so did this table; transformers has no use for that file.\n"
    )


def _table(heading, rows) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)

"""The README.md of an exported model."""

from typing import Any

from layerskip_jax.config import RunConfig

_FRONT_MATTER = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- layerskip
- early-exit
- self-speculative-decoding
---
"""

_DRAFT = """\
## Drafting with its own first layers

All exits share the final norm and the head, so the model can draft with its first layers and
verify with all of them. Greedy decoding gives the same text as without; how much faster it is
depends on how often the drafts are right. Try other values of `assistant_early_exit`, from 1
to {last}.

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
"""


def write_model_card(
    config: RunConfig, *, step: int, dtype: str, evaluation: dict[str, Any] | None
) -> str:
    """Returns the text: what the model is, how it was trained, how good each exit is.

    Args:
      config: the run's.
      step: optimizer steps the parameters were trained for.
      dtype: of the stored tensors.
      evaluation: `{"step": n, "exits": [{"layers": E, "loss": ..., "perplexity": ...}]}`, loss
        in nats a token; None where there was none.
    """
    model, dropout, exits = config.model, config.layer_dropout, config.early_exit
    settings = {
        "layers": model.num_layers,
        "width": model.model_dim,
        "feed-forward width": model.ffn_dim,
        "query heads": model.num_heads,
        "key/value heads": model.num_kv_heads,
        "vocabulary": model.vocab_size,
        "context": f"{model.max_sequence_length} tokens",
        "tied embeddings": "yes" if model.tie_embeddings else "no",
        "stored as": dtype,
        "optimizer steps": f"{step} of {config.training.steps}",
        "windows a step": config.training.batch_size,
        "layer dropout": (
            f"up to {dropout.p_max}, {dropout.depth} over the layers, {dropout.time} over the steps"
            if dropout.p_max
            else "none"
        ),
        "early-exit loss": (
            "none; the last layer alone was trained"
            if exits.curriculum == "last"
            else f"{exits.curriculum} curriculum, scale {exits.scale}"
        ),
        "seed": config.seed,
    }
    parts = [
        _FRONT_MATTER,
        "# A LayerSkip model\n",
        "A decoder of the Llama family, trained with layerskip_jax in the manner of LayerSkip\n"
        "(Elhoushi et al., 2024, arXiv:2404.16710).\n",
        _table(("setting", "value"), settings.items()),
    ]
    if evaluation is not None:
        rows = [
            (entry["layers"], f"{entry['loss']:.4f}", f"{entry['perplexity']:.2f}")
            for entry in evaluation["exits"]
        ]
        parts += [
            f"## Perplexity by exit\n\nOn the validation set, at step {evaluation['step']}.\n",
            _table(("layers", "loss (nats a token)", "perplexity"), rows),
        ]
    if model.num_layers > 1:
        parts.append(
            _DRAFT.format(
                last=model.num_layers - 1,
                draft=max(1, model.num_layers // 4),
                new_tokens=min(64, model.max_sequence_length // 2),
            )
        )
    return "\n".join(parts)


def _table(heading, rows) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)

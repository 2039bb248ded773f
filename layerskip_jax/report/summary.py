"""The headline of a run: its few numbers that matter, each with its definition."""

import numpy as np

from layerskip_jax.model.definition import ModelDefinition
from layerskip_jax.report.run_record import MissingPiece, RunRecord, number
from layerskip_jax.report.words import amount, count, duration, percent, times


def headline(run: RunRecord) -> list[tuple[str, str, str]]:
    """Returns name, value and definition of each headline number."""
    return [_model(run), _tokens(run), _last(run), _middle(run), _speculation(run), _time(run)]


def sentence(run: RunRecord) -> str:
    """Returns what the run shows, in a sentence or two of plain words."""
    parts = []
    layers, middle = run.num_layers, run.middle
    try:
        ours, plain = run.final_perplexities(), run.plain_perplexities()
        if layers > 1 and {middle, layers} <= ours.keys():
            text = (
                f"Stopped after {middle} of its {layers} layers, the model reaches a perplexity "
                f"of {amount(ours[middle])}, {times(ours[middle] / ours[layers])} the "
                f"{amount(ours[layers])} of all {layers}"
            )
            if {middle, layers} <= plain.keys():
                text += (
                    f"; in the plain twin the same two are {amount(plain[middle])} and "
                    f"{amount(plain[layers])}"
                )
            parts.append(text + ".")
    except MissingPiece:
        pass
    try:
        best = run.best_pair()
        speedup = number(best.get("speedup"))
        if speedup and speedup < 1:
            parts.append("No pair that the sweep tried decodes faster than plain decoding.")
        elif speedup:
            parts.append(
                f"Drafting with {best['exit_layer']} layers and verifying with the rest decodes "
                f"{times(speedup)} as fast as plain decoding."
            )
    except MissingPiece:
        pass
    if run.last_step < run.total_steps:
        parts.append(
            f"The run is not finished: {run.last_step:,} of {run.total_steps:,} steps are done."
        )
    return " ".join(parts)


def training_seconds(run: RunRecord) -> float | None:
    """Returns the logged wall-clock time, summed over resumptions."""
    # The clock starts again at 0 when a run goes on from a checkpoint.
    total, before = 0.0, 0.0
    for seconds in run.series("seconds")[1]:
        if seconds < before:
            total += before
        before = float(seconds)
    return total + before or None


def _model(run: RunRecord) -> tuple[str, str, str]:
    model = run.config.model
    shape = f"{run.num_layers} layers of width {model.model_dim:,}"
    if model.vocab_size == 0:
        return "Model", shape, "Its vocabulary comes from the data, so its size is not known."
    definition = ModelDefinition(model)
    total = definition.num_parameters
    tables = model.vocab_size * model.model_dim * (1 if model.tie_embeddings else 2)
    return (
        "Parameters",
        count(total),
        f"{shape}; {percent(tables / total)} of the parameters are the embedding and the "
        f"head, for a vocabulary of {model.vocab_size:,}.",
    )


def _tokens(run: RunRecord) -> tuple[str, str, str]:
    seen = run.latest("tokens")
    text = f"After {run.last_step:,} of {run.total_steps:,} optimizer steps, padding included."
    split = run.data.get("train")
    tokens = number(split.get("tokens")) if isinstance(split, dict) else None
    if seen and tokens:
        text += f" That is {amount(seen / tokens)} times the training set."
    return "Tokens seen", count(seen), text


def _last(run: RunRecord) -> tuple[str, str, str]:
    try:
        value = run.final_perplexities().get(run.num_layers)
    except MissingPiece:
        steps, losses = run.exit_series().get(run.num_layers, run.series("loss"))
        if not len(losses):
            return "Final loss", "–", "No finite loss was logged."
        tail = max(round(0.03 * len(losses)), 1)
        return (
            "Last training loss",
            f"{losses[-tail:].mean():.3f} nats",
            "Cross-entropy per token of the last layer on training text, mean over the last "
            f"{tail} record{'s' * (tail > 1)}; there is no evaluation.",
        )
    if value is None:
        return "Final perplexity", "–", "The last evaluation leaves the last layer out."
    return (
        "Final perplexity",
        amount(value),
        f"All {run.num_layers} layers, validation set: exp of {np.log(value):.3f} nats per token.",
    )


def _middle(run: RunRecord) -> tuple[str, str, str]:
    name = f"Perplexity after {run.middle} layer{'s' * (run.middle > 1)}"
    try:
        values, plain = run.final_perplexities(), run.plain_perplexities()
    except MissingPiece:
        return name, "–", "There is no evaluation yet."
    if not {run.middle, run.num_layers} <= values.keys():
        return name, "–", "The last evaluation leaves this exit out."
    ratio = values[run.middle] / values[run.num_layers]
    text = f"The middle exit: {times(ratio)} the last one's."
    if {run.middle, run.num_layers} <= plain.keys():
        ratio = plain[run.middle] / plain[run.num_layers]
        text += f" Plain twin: {amount(plain[run.middle])}, {times(ratio)}."
    return name, amount(values[run.middle]), text


def _speculation(run: RunRecord) -> tuple[str, str, str]:
    name = "Best decoding speedup"
    try:
        best = run.best_pair()
    except MissingPiece as missing:
        return name, "–", str(missing)
    text = f"Drafting {best['draft_length']} tokens with {best['exit_layer']} layers"
    speed, plain = best.get("tokens_per_second"), run.speculation.get("plain_tokens_per_second")
    if number(speed) and number(plain):
        text += f": {amount(number(speed))} tokens/s against {amount(number(plain))} plain"
    return name, times(number(best.get("speedup"))), text + "."


def _time(run: RunRecord) -> tuple[str, str, str]:
    speeds = run.series("tokens_per_second")[1]
    shares = run.series("layers_run")[1]
    text = "Wall-clock time that the records cover"
    if len(speeds):
        text += f"; median {amount(float(np.median(speeds)))} tokens/s"
    if len(shares):
        text += f"; {percent(float(shares.mean()), 1)} of the layers were run"
    return "Training time", duration(training_seconds(run)), text + "."

"""The headline of a run: its few numbers that matter, each with its definition."""

from pathlib import PurePath
from typing import NamedTuple

import numpy as np

from layerskip_jax.model.definition import ModelDefinition
from layerskip_jax.report.run_record import MissingPiece, RunRecord, number, threshold
from layerskip_jax.report.words import amount, count, duration, percent, times


class Tile(NamedTuple):
    """A headline number: its name, its value, and what it is."""

    name: str
    value: str
    what: str


def headline(run: RunRecord) -> list[Tile]:
    """Returns the headline numbers."""
    return [_model(run), _tokens(run), _last(run), _middle(run), _speculation(run), _time(run)]


def sentence(run: RunRecord) -> str:
    """Returns what the run shows, in a sentence or two of plain words."""
    parts = []
    layers, middle = run.num_layers, run.middle
    ours, plain = run.final_perplexities() if run.evaluations else {}, run.plain_perplexities()
    ratio, speedup = run.to_last(ours, middle), number(run.best_pair().get("speedup"))
    if layers > 1 and ratio:
        text = (
            f"Stopped after {middle} of its {layers} layers, the model reaches a perplexity of "
            f"{amount(ours[middle])}, {times(ratio)} the {amount(ours[layers])} of all {layers}"
        )
        if run.to_last(plain, middle):
            text += (
                f"; in the plain twin the same two are {amount(plain[middle])} and "
                f"{amount(plain[layers])}"
            )
        parts.append(text + ".")
    if speedup and speedup < 1:
        parts.append("No pair that the sweep tried decodes faster than plain decoding.")
    elif speedup:
        parts.append(
            f"Drafting with {run.best_pair()['exit_layer']} layers and verifying with the rest "
            f"decodes {times(speedup)} as fast as plain decoding."
        )
    if run.config.init_state == "all":
        source = PurePath(run.config.init_from).name
        parts.append(f"It branched from step {run.config.init_step:,} of {source}.")
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


def _model(run: RunRecord) -> Tile:
    model = run.config.model
    shape = f"{run.num_layers} layers of width {model.model_dim:,}"
    if model.vocab_size == 0:
        text = "Its vocabulary comes from the data, so its size is not known."
        return Tile("Model", shape, text)
    total = ModelDefinition(model).num_parameters
    tables = model.vocab_size * model.model_dim * (1 if model.tie_embeddings else 2)
    text = (
        f"{shape}; {percent(tables / total)} of the parameters are the embedding and the head, "
        f"for a vocabulary of {model.vocab_size:,}."
    )
    return Tile("Parameters", count(total), text)


def _tokens(run: RunRecord) -> Tile:
    counts = run.series("tokens")[1]
    seen = float(counts[-1]) if len(counts) else None
    text = f"After {run.last_step:,} of {run.total_steps:,} optimizer steps, padding included."
    split = run.data.get("train")
    tokens = number(split.get("tokens")) if isinstance(split, dict) else None
    if seen and tokens:
        text += f" That is {amount(seen / tokens)} times the training set."
    return Tile("Tokens seen", count(seen), text)


def _last(run: RunRecord) -> Tile:
    if run.evaluations:
        value = run.final_perplexities().get(run.num_layers)
        if value is None:
            return Tile("Final perplexity", "–", "The last evaluation leaves the last layer out.")
        nats = f"exp of {np.log(value):.3f} nats per token"
        text = f"All {run.num_layers} layers, validation set: {nats}."
        return Tile("Final perplexity", amount(value), text)
    losses = run.exit_series().get(run.num_layers, run.series("loss"))[1]
    if not len(losses):
        return Tile("Final loss", "–", "No finite loss was logged.")
    tail = max(round(0.03 * len(losses)), 1)
    text = (
        "Cross-entropy per token of the last layer on training text, mean over the last "
        f"{tail} record{'s' * (tail > 1)}; there is no evaluation."
    )
    return Tile("Last training loss", f"{losses[-tail:].mean():.3f} nats", text)


def _middle(run: RunRecord) -> Tile:
    name = f"Perplexity after {run.middle} layer{'s' * (run.middle > 1)}"
    if not run.evaluations:
        return Tile(name, "–", "There is no evaluation yet.")
    values, plain = run.final_perplexities(), run.plain_perplexities()
    ratio, twin = run.to_last(values, run.middle), run.to_last(plain, run.middle)
    if ratio is None:
        return Tile(name, "–", "The last evaluation leaves this exit out.")
    text = f"The middle exit: {times(ratio)} the last one's."
    if twin:
        text += f" Plain twin: {amount(plain[run.middle])}, {times(twin)}."
    return Tile(name, amount(values[run.middle]), text)


def _speculation(run: RunRecord) -> Tile:
    name = "Best decoding speedup"
    try:
        run.speculation_pairs()
    except MissingPiece as missing:
        return Tile(name, "–", str(missing))
    best = run.best_pair()
    text = f"Drafting {best['draft_length']} tokens with {best['exit_layer']} layers"
    if below := threshold(best.get("stop_below")):
        text = text.replace("Drafting", "Drafting up to") + f", until one is below {below}"
    speed = number(best.get("tokens_per_second"))
    plain = number(run.speculation.get("plain_tokens_per_second"))
    if speed and plain:
        text += f": {amount(speed)} tokens/s against {amount(plain)} plain"
    return Tile(name, times(number(best.get("speedup"))), text + ".")


def _time(run: RunRecord) -> Tile:
    speeds = run.series("tokens_per_second")[1]
    shares = run.series("layers_run")[1]
    text = "Wall-clock time that the records cover"
    if len(speeds):
        text += f"; median {amount(float(np.median(speeds)))} tokens/s"
    if len(shares):
        text += f"; {percent(float(shares.mean()), 1)} of the layers were run"
    return Tile("Training time", duration(training_seconds(run)), text + ".")

"""What a run's folder holds, read once and leniently: only the metrics are required."""

import dataclasses
import json
import math
import shlex
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from layerskip_jax.config import RunConfig
from layerskip_jax.generation.options import stop_below_text
from layerskip_jax.run_folder.paths import RunFolder, open_run, read_json_lines
from layerskip_jax.schema import ConfigError, UserError


class MissingPiece(Exception):
    """A part of the report that this run cannot fill; the message says why, or what would."""


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """A run as the report sees it.

    Attributes:
      folder: where it lies.
      config: its whole configuration.
      metrics: one dict a logged step, by step; `read_run` takes no run without any.
      evaluations: one dict an evaluation that has exits, by step.
      tasks: one dict an evaluation on tasks, by step.
      data: the manifest of the training data, or {}.
      speculation: what `layerskip sweep` measured, or {}.
      plain: perplexity by exit of the plain twin, or {}.
      layers_needed: what `layerskip inspect` measured, or {}.
    """

    folder: RunFolder
    config: RunConfig
    metrics: list[dict] = dataclasses.field(default_factory=list)
    evaluations: list[dict] = dataclasses.field(default_factory=list)
    tasks: list[dict] = dataclasses.field(default_factory=list)
    data: dict = dataclasses.field(default_factory=dict)
    speculation: dict = dataclasses.field(default_factory=dict)
    plain: dict = dataclasses.field(default_factory=dict)
    layers_needed: dict = dataclasses.field(default_factory=dict)

    @property
    def num_layers(self) -> int:
        """The number of layers, L."""
        return self.config.model.num_layers

    @property
    def total_steps(self) -> int:
        """T."""
        return self.config.training.steps

    @property
    def last_step(self) -> int:
        """The last logged step."""
        return self.metrics[-1]["step"]

    @property
    def middle(self) -> int:
        """The middle exit, in layers run: half of them, rounded down, and at least one."""
        return max(self.num_layers // 2, 1)

    @property
    def unigram_perplexity(self) -> float | None:
        """The exp of the data's unigram entropy, or None where the manifest lacks it."""
        entropy = number(self.data.get("unigram_entropy_nats"))
        return math.exp(entropy) if entropy is not None and entropy < 50 else None

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns the steps at which `key` was logged as a finite number, and its values."""
        return _points((m["step"], m.get(key)) for m in self.metrics)

    def exit_series(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Returns steps and training losses of each exit that was ever scored, by depth."""
        points: dict[int, list] = {}
        for record in self.metrics:
            for layers, loss in (record.get("exit_loss") or {}).items():
                points.setdefault(int(layers), []).append((record["step"], loss))
        series = {layers: _points(points[layers]) for layers in sorted(points)}
        return {layers: s for layers, s in series.items() if len(s[0])}

    def final_perplexities(self) -> dict[int, float]:
        """Returns perplexity by layers run at the last evaluation.

        Raises:
          MissingPiece: the run has not been evaluated.
        """
        if not self.evaluations:
            raise MissingPiece(
                "No evaluation is recorded yet. Training makes one when it ends (and every "
                f"`config.training.evaluate_every` steps); {self.command('train')} with the "
                "run's `--config` goes on with it."
            )
        return perplexities(self.evaluations[-1])

    def further_perplexities(self) -> dict[str, dict[int, float]]:
        """Returns the same of each further validation set, by name; empty without any."""
        sets = self.evaluations[-1].get("sets") if self.evaluations else None
        sets = sets if isinstance(sets, dict) else {}
        found = {str(name): perplexities({"exits": exits}) for name, exits in sets.items()}
        return {name: values for name, values in found.items() if values}

    def task_scores(self) -> dict[tuple[str, str], dict[int, float]]:
        """Returns, by task and metric, the last scores by layers run; empty without any."""
        scores: dict[tuple[str, str], dict[int, float]] = {}
        for entry in (self.tasks[-1].get("exits") or []) if self.tasks else []:
            for task, metrics in (entry.get("tasks") or {}).items():
                for metric, value in metrics.items():
                    if number(value) is not None:
                        scores.setdefault((task, metric), {})[int(entry["layers"])] = value
        return scores

    def plain_perplexities(self) -> dict[int, float]:
        """Returns perplexity by layers run of the plain twin, empty without one."""
        return perplexities(self.plain)

    @property
    def evaluation_note(self) -> str:
        """What sets the last evaluation apart from the others, or "" if nothing does."""
        batches = self.config.training.evaluate_batches
        whole = self.evaluations and self.evaluations[-1]["step"] >= self.total_steps
        if not (batches and whole):
            return ""
        return (
            f"The last evaluation takes the whole validation set, the others the same "
            f"{batches} batches of it, drawn by a fixed seed, so it does not continue them."
        )

    @property
    def plain_label(self) -> str:
        """What to call the plain twin."""
        return str(self.plain.get("label") or "plain twin")

    def to_last(self, values: dict[int, float], layers: int) -> float | None:
        """Returns the ratio of an exit's perplexity to the last one's, None where either lacks."""
        if not {layers, self.num_layers} <= values.keys():
            return None
        return values[layers] / values[self.num_layers]

    @property
    def pairs(self) -> list[dict]:
        """The measured pairs of exit layer and draft length, fastest first."""
        pairs = [
            pair
            for pair in self.speculation.get("pairs") or []
            if isinstance(pair, dict)
            and number(pair.get("exit_layer")) is not None
            and number(pair.get("draft_length")) is not None
        ]
        return sorted(pairs, key=lambda pair: -(number(pair.get("speedup")) or 0))

    def speculation_pairs(self) -> list[dict]:
        """Returns `pairs`.

        Raises:
          MissingPiece: nothing was measured.
        """
        if not self.pairs:
            raise MissingPiece(
                f"Self-speculation has not been measured yet; {self.command('sweep')} does it."
            )
        return self.pairs

    def best_pair(self) -> dict:
        """Returns the pair that the sweep calls best, with all measured of it; {} without one.

        Its drafts may end early (`stop_below`), and be longer than those of any static pair.
        """
        best = self.speculation.get("best")
        for pair in self.pairs if isinstance(best, dict) else []:
            if all(pair[key] == best.get(key) for key in ("exit_layer", "draft_length")):
                return {**pair, **best}
        if isinstance(best, dict) and threshold(best.get("stop_below")):
            if all(number(best.get(key)) is not None for key in ("exit_layer", "draft_length")):
                return best
        return self.pairs[0] if self.pairs else {}

    def depths(self) -> list[dict]:
        """Returns the layers that tokens need in this run, then in what was measured beside it.

        Raises:
          MissingPiece: nothing was measured, or not of this many layers.
        """
        beside = self.layers_needed.get("beside")
        measured = [self.layers_needed, *(beside if isinstance(beside, list) else [])]
        whole = [entry for entry in measured if _is_depth(entry)]
        if not whole or not _is_depth(self.layers_needed):
            raise MissingPiece(
                "How many layers tokens need has not been measured yet; "
                f"{self.command('inspect')} does it."
            )
        return whole

    def command(self, verb: str) -> str:
        """Returns the command line of another verb on this run."""
        return f"`layerskip {verb} --workdir={shlex.quote(str(self.folder.home))}`"


def read_run(workdir: str | PurePath) -> RunRecord:
    """Reads a run's folder.

    Raises:
      UserError: no run there, a run that has logged nothing yet, or a damaged file.
    """
    folder, config = open_run(workdir)
    metrics = _read_lines(folder.metrics_file)
    if not metrics:
        raise UserError(
            f"{folder.shown(folder.metrics_file)} holds no logged step, so there is nothing to "
            "report; start the run with `layerskip train`, or wait for its first logged line"
        )
    return RunRecord(
        folder=folder,
        config=config,
        metrics=metrics,
        evaluations=[e for e in _read_lines(folder.evaluations_file) if perplexities(e)],
        tasks=_read_lines(folder.tasks_file),
        data=_read_object(folder.data_file),
        speculation=_read_object(folder.speculation_file),
        plain=_read_object(folder.path / "plain.json"),
        layers_needed=_read_object(folder.layers_needed_file),
    )


def _is_depth(entry: Any) -> bool:
    """Whether an entry of layers_needed.json has what the report shows of it."""
    if not isinstance(entry, dict) or not number(entry.get("tokens")):
        return False
    parts = [entry.get(name) for name in ("first_agreement", "settled", "changes_of_mind")]
    return all(
        isinstance(part, dict)
        and number(part.get("mean")) is not None
        and isinstance(part.get("histogram"), list)
        and len(part["histogram"]) == entry.get("layers")
        and all(number(count) is not None for count in part["histogram"])
        for part in parts
    )


def number(value: Any) -> float | None:
    """Returns `value` as a float if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def threshold(value: Any) -> str:
    """Returns a threshold that drafts end below, such as `0.4` or `lead:0.6`; "" if it is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return ""
    try:
        return stop_below_text(value)
    except ConfigError:
        return ""


def perplexities(evaluation: dict) -> dict[int, float]:
    """Returns perplexity by layers run from the `exits` of an evaluation, by depth."""
    found = {}
    for record in evaluation.get("exits") or []:
        value, loss = number(record.get("perplexity")), number(record.get("loss"))
        if value is None and loss is not None and loss < 700:
            value = math.exp(loss)
        if value is not None and value > 0 and "layers" in record:
            found[int(record["layers"])] = value
    return dict(sorted(found.items()))


def _points(pairs) -> tuple[np.ndarray, np.ndarray]:
    kept = [(step, value) for step, value in pairs if number(value) is not None]
    steps = np.array([step for step, _ in kept], dtype=np.int64)
    return steps, np.array([value for _, value in kept], dtype=np.float64)


def _read_lines(path: Path) -> list[dict]:
    try:
        return read_json_lines(path)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} holds a line that has no step; remove that line") from error


def _read_object(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text())
    except ValueError as error:  # of JSON or UTF-8
        raise UserError(f"{path} is not JSON ({error}); make it again or remove it") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object; make it again or remove it")
    return value

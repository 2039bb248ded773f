"""What a run says of itself while it trains: a line, a JSON record, curves."""

import sys
import time
import zlib
from collections import defaultdict
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from layerskip_jax.run_folder.atomic import named_writes, to_json
from layerskip_jax.run_folder.paths import RunFolder
from layerskip_jax.training.flops import CostModel
from layerskip_jax.training.observe import Clock
from layerskip_jax.training.step import StepMetrics
from layerskip_jax.training.trackers import Boards


class MetricsLog:
    """Averages the metrics of the steps between two records, and writes the records.

    Only the first process writes. Losses are in nats per token; `tokens_per_second` counts
    the positions of all windows, padding included, over wall-clock time, evaluation and
    checkpoints included and compilation not. Steps that were skipped, their loss or gradient not
    finite, are counted and left out of the means. `left_out` counts, since the run's first step,
    the records that were damaged and trained nothing. `goodput` is the share of the time since the
    run's start that went to steps, `lost` the seconds of the rest by cause (see `Clock`). FLOPs are
    those that a step needs, as `layerskip_jax.training.flops` counts them: `step_flops` from the
    rows that were dropped and the exits that were scored, `step_flops_planned` from the schedules,
    `mfu` over the peak of the devices where that is known.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        total_steps: int,
        first_step: int,
        cost: CostModel,
        peak_flops: float | None = None,
        clock: Clock | None = None,
        left_out: int = 0,
    ):
        self.folder, self.clock = folder, clock or Clock()
        self.left_out = left_out
        self._step_ends: list[float] = []
        self._writes = jax.process_index() == 0
        self._total_steps = total_steps
        self._cost, self._peak_flops = cost, peak_flops
        self._start = self._window_start = time.monotonic()
        self._window: list[StepMetrics] = []
        self._progress = None
        if not self._writes:
            return
        config = cost.config
        with named_writes(folder.path):
            self._boards = Boards(
                folder,
                first_step=first_step,
                project=config.training.wandb,
                config=config.to_dict(),
            )
            self._file = _open_to_append(folder.metrics_file)
        if sys.stderr.isatty():
            self._progress = progress_bar(Console(stderr=True))
            self._task = self._progress.add_task("", total=total_steps, completed=first_step)
            self._progress.start()

    def add(self, step: int, metrics: StepMetrics) -> StepMetrics:
        """Takes the metrics of the step that brought the count of steps to `step`.

        Reading them waits for that step, so call this after the next one is dispatched.

        Returns:
          The metrics on the host.
        """
        metrics = jax.device_get(metrics)
        self._step_ends.append(time.monotonic())
        self._window.append(metrics)
        self.left_out += int(metrics.left_out)
        if self._progress:
            self._progress.update(self._task, completed=step)
        return metrics

    def restart_clock(self) -> None:
        """Leaves what has passed since the last record out of `tokens_per_second`."""
        self._window_start = time.monotonic()

    def say(self, line: str) -> None:
        """Prints a line, above the progress bar where there is one."""
        if self._progress:
            self._progress.console.print(line, highlight=False, markup=False)
        elif self._writes:
            print(line, flush=True)

    def evaluation(self, step: int, exits: list[dict], name: str = "") -> None:
        """Adds the losses of an evaluation to the curves, those of a further set by its name."""
        if self._writes:
            prefix = f"validation/{name}/" if name else "validation/"
            losses = {f"{prefix}loss_exit_{e['layers']:02d}": e["loss"] for e in exits}
            self._boards.add(losses, step)

    def task_scores(self, step: int, exits: list[dict]) -> None:
        """Adds what an evaluation on tasks returned to the curves."""
        if self._writes:
            values = {
                f"tasks/{task}/{metric}_exit_{entry['layers']:02d}": value
                for entry in exits
                for task, metrics in entry["tasks"].items()
                for metric, value in metrics.items()
            }
            self._boards.add(values, step)

    def close(self) -> None:
        """Ends the progress bar and closes the files."""
        if self._progress:
            self._progress.stop()
        if self._writes:
            self._file.close()
            self._boards.close()

    def record(self, step: int) -> None:
        """Writes down the steps since the record before, of which `step` is the last."""
        window, self._window = self._window, []
        now = time.monotonic()
        seconds, self._window_start = now - self._window_start, now
        durations, self._step_ends = np.diff(self._step_ends), self._step_ends[-1:]
        kept = [metrics for metrics in window if not metrics.skipped]
        if not self._writes or not kept:
            return  # the guards have named steps that were not finite
        by_exit = defaultdict(list)
        for metrics in kept:
            for layer, loss, weight in zip(
                metrics.exit_layers, metrics.exit_losses, metrics.exit_weights, strict=True
            ):
                if weight > 0:
                    by_exit[int(layer) + 1].append(float(loss))
        last = window[-1]
        first = step - len(window)
        sizes, length = self._cost.sizes, self._cost.sequence_length
        rows = sizes.between(first, step)
        flops = np.mean(
            [self._cost.done(m, n).needed for m, n in zip(window, rows.tolist(), strict=True)]
        )
        record = {
            "step": step,
            "loss": float(np.mean([m.loss for m in kept])),
            "exit_loss": {str(e): float(np.mean(by_exit[e])) for e in sorted(by_exit)},
            "tokens": sizes.before(step) * length,
            "tokens_per_second": int(rows.sum()) * length / seconds,
            "gradient_norm": float(np.mean([m.gradient_norm for m in kept])),
            "learning_rate": float(last.learning_rate),
            "layers_run": float(np.mean([m.layers_run for m in window])),
            "skipped": int(sum(m.skipped for m in window)),
            "left_out": self.left_out,
            "step_flops": float(flops),
            "step_flops_planned": self._cost.planned(first, step).needed,
            "flops_per_second": float(flops * len(window) / seconds),
            "seconds": now - self._start,
            # One number for the batches of these steps, in their order.
            "batches": zlib.crc32(np.array([m.batch for m in window], "<u4").tobytes()),
        }
        record["goodput"], record["lost"] = self.clock.report()
        # Over the steps since the record before, in seconds; an evaluation between them counts.
        record["step_time_deviation"] = float(np.std(durations)) if len(durations) else 0.0
        if self._peak_flops:
            record["mfu"] = record["flops_per_second"] / self._peak_flops
        self._file.write(to_json(record) + "\n")
        self._file.flush()
        hidden = ("step", "batches", "exit_loss", "lost")
        curves = {f"train/{name}": v for name, v in record.items() if name not in hidden}
        curves |= {f"train/loss_exit_{int(e):02d}": v for e, v in record["exit_loss"].items()}
        curves |= {f"train/lost_{cause}": v for cause, v in record["lost"].items()}
        self._boards.add(curves, step)
        exits = list(record["exit_loss"].items())
        shown = [exits[0], exits[-1]] if len(exits) > 1 else exits
        text = f"loss {record['loss']:.3f}  " + "  ".join(f"exit {e} {v:.3f}" for e, v in shown)
        text += f"  {record['tokens_per_second']:,.0f} tokens/s"
        text += f"  mfu {record['mfu']:.1%}" if "mfu" in record else ""
        text += f"  damaged records left out {self.left_out}" if self.left_out else ""
        if self._progress:
            self._progress.update(self._task, description=text)
        else:
            self.say(
                f"step {step}/{self._total_steps}  {text}  lr {record['learning_rate']:.2e}  "
                f"grad {record['gradient_norm']:.2f}  layers run {record['layers_run']:.0%}"
            )


def progress_bar(console: Console) -> Progress:
    """Returns what shows steps, time and figures, and where there is room a bar."""
    columns = [
        TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", table_column=Column(overflow="fold")),
    ]
    if console.width < 120:
        del columns[1]
    return Progress(*columns, console=console)


def _open_to_append(path: Path):
    """Opens a JSON-lines file; a last line cut short by a crash is ended first."""
    file = path.open("a+b")
    if file.tell() > 0:
        file.seek(-1, 2)
        if file.read(1) != b"\n":
            file.write(b"\n")
    file.close()
    return path.open("a")

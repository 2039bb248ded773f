"""What guards, metrics and logs add to a training step.

    python benchmarks/guards.py --json=guards.json

Two parts. On the device: the step with its check for what is not finite and the checksum of its
batch against the same step without them, run in turns from the same state; the median over the
rounds of the one's time over the mean of the two of the other around it. On the host: all that
the loop of `layerskip train` does for a step beside dispatching it (metrics, guards, watchdog,
clock, a record with TensorBoard and a heartbeat every `--log-every` steps), a thousand times on
metrics that are there already, over the time of the step.
"""

import tempfile
import time
from pathlib import Path

import harness
import jax
import jax.numpy as jnp
import numpy as np
from train_step import LAYERSKIP, random_batch, settings

from layerskip_jax.config import GuardsConfig, RunConfig, TrainingConfig
from layerskip_jax.run_folder.paths import RunFolder
from layerskip_jax.training.flops import CostModel
from layerskip_jax.training.guards import Guards, Watchdog
from layerskip_jax.training.metrics import MetricsLog
from layerskip_jax.training.observe import Clock, heartbeat, process_log
from layerskip_jax.training.setup import make_setup
from layerskip_jax.training.step import TrainState


def device_part(setting, config: RunConfig, rounds: int, bench: harness.Bench):
    """Adds the guarded step's seconds and their ratio over the other's; returns its metrics."""
    setup = make_setup(config, jax.devices()[:1])
    with jax.set_mesh(setup.mesh):
        bench.begin("compiling the step without guards")
        bare = setup.compile_step(setting.sequence_length, guarded=False)
        bench.begin("compiling the step with guards")
        guarded = setup.compile_step(setting.sequence_length, guarded=True)
        state = setup.init()

        def run(step, at):
            nonlocal state, metrics
            batch = random_batch(setting, setup, at)
            state = TrainState(jnp.int32(at), state.parameters, state.optimizer)
            jax.block_until_ready((state, batch))
            start = time.perf_counter()
            state, metrics = step(state, batch)
            jax.block_until_ready(state)
            return time.perf_counter() - start

        metrics = None
        bench.begin("warming up")
        for step in (bare, guarded):
            run(step, 0)
        seconds, ratios = [], []
        before = run(bare, 0)
        for at in range(rounds):
            bench.begin(f"round {at + 1} of {rounds}")
            seconds.append(run(guarded, at))
            metrics_of_guarded = metrics
            after = run(bare, at)
            ratios.append(2 * seconds[-1] / (before + after))
            before = after
            bench.add(
                {
                    "guarded_over_bare_step": float(np.median(ratios)),
                    "step_seconds": float(np.median(seconds)),
                },
                show=at == rounds - 1,
            )
    return metrics_of_guarded


def host_part(config: RunConfig, sequence_length: int, metrics, steps: int) -> float:
    """Returns the seconds a step that the loop spends beside dispatching and reading data."""
    with tempfile.TemporaryDirectory() as path:
        folder = RunFolder(Path(path))
        clock, watchdog = Clock(), Watchdog(3600.0)
        guards = Guards(config.guards, lambda step: [], lambda: None)
        log = MetricsLog(
            folder, total_steps=config.training.steps, first_step=0,
            cost=CostModel(config, sequence_length), clock=clock,
        )  # fmt: skip
        log.say = lambda line: None
        with process_log(folder), watchdog.watching():
            start = time.perf_counter()
            for index in watchdog.each(clock.each(range(steps), "data")):
                due = (index + 1) % config.training.log_every == 0
                seen = log.add(index + 1, metrics)
                if due:
                    log.record(index + 1)
                guards.check(index + 1, seen)
                if due:
                    heartbeat(folder, index + 1)
            seconds = time.perf_counter() - start
        log.close()
    return seconds / steps


def main() -> int:
    """Runs the benchmark."""
    parser = harness.parser(__doc__.split("\n")[0], rounds=(12, 4))
    parser.add_argument("--host-steps", type=int, default=1000)
    parser.add_argument("--log-every", type=int, default=10)
    parser.add_argument("--setting", default="layerskip", help="of benchmarks/train_step.py")
    options = harness.parse(parser)
    known = settings(jax.devices()[0].platform, options.quick)
    if options.setting not in known:
        parser.error(f"--setting={options.setting} is none of {', '.join(known)}")
    setting = known[options.setting]
    training = TrainingConfig(
        steps=100_000, batch_size=setting.batch_size, log_every=options.log_every
    )
    guards = GuardsConfig(step_timeout=3600.0)
    config = RunConfig(model=setting.model, training=training, guards=guards, **LAYERSKIP)
    with harness.Bench(options) as bench:
        bench.print(setting.about)
        bench.expect(options.rounds + 4)
        metrics = device_part(setting, config, options.rounds, bench)
        bench.begin(f"{options.host_steps} steps of the host's part")
        host = host_part(config, setting.sequence_length, metrics, options.host_steps)
        share = host / bench.figures["step_seconds"]
        bench.add(
            {
                "host_seconds_per_step": host,
                "host_over_step": share,
                "cost_of_guards_and_metrics": bench.figures["guarded_over_bare_step"] - 1 + share,
            }
        )
    return 0


if __name__ == "__main__":
    harness.run(main)

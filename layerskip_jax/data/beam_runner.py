"""Units done by Apache Beam: on one machine, or on Dataflow, Flink or Spark.

Every worker writes into the folder of the units, which they all share with who submits: on a
network disk or an object store. So a unit that is done is there whatever becomes of the pipeline,
and the engine's own repetition of work does no harm.
"""

import dataclasses
import importlib.util
import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

from layerskip_jax.data.runners import Failure, Work, attempt
from layerskip_jax.data.units import Job, Task, UnitRecord, read_records
from layerskip_jax.schema import UserError

logger = logging.getLogger(__name__)

NAMESPACE = "prepare"
RESULTS = "results"  # of the pipeline that runs, a file a unit


@dataclasses.dataclass(frozen=True)
class BeamRunner:
    """Does units as a Beam pipeline.

    Attributes:
      options: what Beam's command lines take, as `--runner=FlinkRunner`.
    """

    options: tuple[str, ...] = ()

    def __post_init__(self):
        if importlib.util.find_spec("apache_beam") is None:
            raise UserError(
                "--runner=beam needs Apache Beam, which is not installed; `pip install "
                "'layerskip-jax[beam]'`, or `pip install .[beam]` in a clone"
            )
        self._pipeline_options()

    def _pipeline_options(self) -> Any:
        """Returns Beam's options, none of which it passed over.

        Raises:
          UserError: it knows no such option.
        """
        from apache_beam.options.pipeline_options import PipelineOptions

        options = PipelineOptions(list(self.options))
        known = options.get_all_options()
        for flag in self.options:
            name = flag.removeprefix("--").partition("=")[0]
            if flag.startswith("--") and not {name, name.removeprefix("no_")} & known.keys():
                raise UserError(f"--beam-options: Beam {_version()} knows no option --{name}")
        return options

    def run(
        self,
        work: Work,
        job: Job,
        tasks: Sequence[Task],
        done: Callable[[Task, Any], None],
        failed: Callable[[Failure], None],
    ) -> None:
        """See `runners.Runner`; tells of the units once the pipeline has ended.

        Raises:
          UserError: the pipeline failed; says with what.
        """
        if not tasks:
            return
        import apache_beam as beam

        job.folder.remove(RESULTS)
        pipeline = beam.Pipeline(options=self._pipeline_options())
        units = pipeline | "units" >> beam.Create(list(enumerate(tasks)), reshuffle=False)
        _ = units | "spread" >> beam.Reshuffle() | "work" >> beam.Map(do_task, work, job)
        try:
            result = pipeline.run()
            state = result.wait_until_finish()
        except Exception as error:  # each engine raises kinds of its own
            raise UserError(
                f"the Beam pipeline failed ({_last_line(error)}); what is done is kept, and the "
                "same command goes on there"
            ) from error
        _say_counters(result, str(state))
        outcomes = job.folder.texts(map(_result_name, range(len(tasks))))
        records = read_records(job.folder, [task.key for task in tasks])
        for number, task in enumerate(tasks):
            outcome = outcomes.get(_result_name(number))
            if outcome is None:
                failed(Failure(task, "the pipeline ended without it"))
            elif failure := json.loads(outcome):
                failed(Failure(task, **failure))
            else:
                done(task, records.get(task.key))
        job.folder.remove(RESULTS)


def _result_name(number: int) -> str:
    return f"{RESULTS}/{number}.json"


def do_task(numbered: tuple[int, Task], work: Work, job: Job) -> int:
    """Does a unit in a worker of Beam, writes how that ended, and counts it."""
    from apache_beam.metrics import Metrics

    number, task = numbered
    outcome = attempt(work, job, task)
    failure = {}
    if isinstance(outcome, Failure):
        failure = {name: getattr(outcome, name) for name in ("reason", "is_input", "is_disk")}
    stage = job.folder.scratch("outcome.json")
    stage.write_text(json.dumps(failure), encoding="utf-8")
    job.folder.put(stage, _result_name(number))
    Metrics.counter(NAMESPACE, "failed_units" if failure else "units").inc()
    if isinstance(outcome, UnitRecord):
        counts = outcome.train + outcome.held_out
        Metrics.counter(NAMESPACE, "documents").inc(counts.documents)
        Metrics.counter(NAMESPACE, "tokens").inc(counts.tokens)
    return number


def _say_counters(result: Any, state: str) -> None:
    from apache_beam.metrics import MetricsFilter

    try:
        found = result.metrics().query(MetricsFilter().with_namespace(NAMESPACE))["counters"]
    except NotImplementedError:  # an engine that has none
        found = []
    counts = {counter.key.metric.name: counter.result for counter in found}
    told = ", ".join(f"{name} {value:,}" for name, value in sorted(counts.items()))
    logger.info("the Beam pipeline ended (%s)%s", state, f": {told}" if told else "")


def _version() -> str:
    import apache_beam

    return apache_beam.__version__


def _last_line(error: Exception) -> str:
    """Returns what a worker's error says at its end, after pages of where it came from."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__

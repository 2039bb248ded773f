"""Tasks of lm-eval, and further validation sets, evaluated by a run as it trains."""

import dataclasses
import importlib
import json
import os
import shutil
import signal
import sys

import jax
import numpy as np
import pytest

from layerskip_jax.cli import main
from layerskip_jax.commands import prepare
from layerskip_jax.commands.evaluate import evaluate
from layerskip_jax.config import EvaluationConfig, RunConfig
from layerskip_jax.data.manifest import read_manifest
from layerskip_jax.data.tokenizer import file_sha256
from layerskip_jax.distributed.mesh import MeshShape
from layerskip_jax.distributed.processes import RESTART_EXIT_CODE, Stopped
from layerskip_jax.report.page import build_page
from layerskip_jax.report.run_record import read_run
from layerskip_jax.run_folder.paths import RunFolder, read_json_lines
from layerskip_jax.schema import UserError
from layerskip_jax.training.restore import load_run
from layerskip_jax.training.setup import make_setup

pytest.importorskip("lm_eval", reason="the test requirements install it")
from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from layerskip_jax.evaluation import training_tasks  # noqa: E402
from layerskip_jax.evaluation.lm_eval import LayerSkipLM  # noqa: E402
from layerskip_jax.evaluation.training_tasks import TrainingLM, TrainingTasks  # noqa: E402

# Not the function of that name, which the package has.
train_module = importlib.import_module("layerskip_jax.training.train")
TEXTS = [
    ("word1 word2", " word3 word5"),
    ("", "Document 4."),
    ("Document 3.", " word0"),
    ("word7 " * 60, "word8"),  # longer than the context
]


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


@pytest.fixture(scope="session")
def further(made_once, prepared):
    """Another set by the same tokenizer, of longer windows."""

    def make(folder):
        texts = folder / "texts"
        texts.mkdir()
        for number in range(12):
            (texts / f"{number}.txt").write_text(
                " ".join(f"word{(k + number) % 5}" for k in range(40 + number))
            )
        assert prepare.main([
            f"--source={texts}", f"--output={folder / 'repeats'}", "--sequence-length=16",
            "--validation-fraction=0.5", f"--tokenizer={prepared / 'tokenizer.json'}",
        ]) == 0  # fmt: skip

    return made_once("further", make) / "repeats"


@pytest.fixture(scope="module")
def command(arguments):
    return [
        "train", *arguments, "--config.training.steps=4", "--config.checkpoint.every_steps=2",
        "--config.training.evaluate_every=2", "--config.evaluation.every=2",
        "--config.layer_dropout.execution=mask",  # compiled in half the time
    ]  # fmt: skip


@pytest.fixture(scope="module")
def asked(tasks, further):
    return [
        f"--config.data.validation=('{further}',)", f"--config.evaluation.include_path={tasks}",
        "--config.evaluation.tasks=('local_choice', 'local_text')",
        "--config.evaluation.exits=(4, 2)",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def evaluated(command, asked, tmp_path_factory):
    """A run of four steps that is stopped within its first evaluation on tasks, and goes on.

    Beside it, what scored the tasks before and after the stop.
    """
    workdir = tmp_path_factory.mktemp("evaluated") / "run"
    scorers, make, call = [], training_tasks.make_token_scorer, TrainingTasks.__call__

    def stopped(self, parameters, watch):
        os.kill(os.getpid(), signal.SIGTERM)
        return call(self, parameters, watch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            training_tasks, "make_token_scorer",
            lambda *given: scorers.append(make(*given)) or scorers[-1],
        )  # fmt: skip
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        patch.setattr(TrainingTasks, "__call__", stopped)
        assert main([*command, *asked, f"--workdir={workdir}"]) == RESTART_EXIT_CODE
        assert not RunFolder(workdir).tasks_file.exists()
        patch.setattr(TrainingTasks, "__call__", call)
        assert main([*command, *asked, f"--workdir={workdir}"]) == 0
    return workdir, scorers


def test_further_sets_are_evaluated_beside_the_runs_own(evaluated, further):
    records = read_json_lines(RunFolder(evaluated[0]).evaluations_file)
    assert [record["step"] for record in records] == [2, 4]
    for data, exits in ((None, "exits"), (str(further), "sets")):
        alone = evaluate(evaluated[0], data=data)["exits"]
        found = records[-1][exits] if data is None else records[-1][exits]["repeats"]
        assert [entry["layers"] for entry in found] == [1, 2, 3, 4]
        np.testing.assert_allclose(
            [entry["loss"] for entry in found], [entry["loss"] for entry in alone], rtol=1e-5
        )
    assert records[-1]["sets"]["repeats"] != records[-1]["exits"]


def test_tasks_are_scored_as_the_harness_scores_the_checkpoint(evaluated, tasks):
    workdir, scorers = evaluated
    records = read_json_lines(RunFolder(workdir).tasks_file)
    assert [record["step"] for record in records] == [2, 4], "the one that was stopped is made up"
    assert records[0]["documents"] == {"local_choice": 3, "local_text": 3}
    assert [entry["layers"] for entry in records[-1]["exits"]] == [2, 4]
    sizes = [scorer._cache_size() for scorer in scorers]
    assert sizes == [0, 1], "one program for all exits, steps and tasks"
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    for entry in records[-1]["exits"]:
        theirs = simple_evaluate(
            LayerSkipLM(str(workdir), exit=entry["layers"]), tasks=["local_choice", "local_text"],
            task_manager=manager, bootstrap_iters=0,
        )["results"]  # fmt: skip
        assert entry["tasks"] == {
            "local_choice": {"acc": theirs["local_choice"]["acc,none"]},
            "local_text": {"exact_match": theirs["local_text"]["exact_match,none"]},
        }
    log = (RunFolder(workdir).logs / "process-0.jsonl").read_text()
    assert "compiled the train step" in log
    lost = read_json_lines(RunFolder(workdir).metrics_file)[-1]["lost"]
    assert lost["evaluation"] > 0


def test_the_report_shows_both(evaluated):
    page = build_page(read_run(evaluated[0]))
    assert "On further sets" in page and '<th scope="col" class="number">repeats</th>' in page
    assert "local_choice, acc" in page and "By lm-eval, at step 4." in page


def test_a_task_that_fails_is_told_and_a_stop_is_obeyed(caplog):
    """A task's own error costs the record, and not the run."""

    def fails(parameters, watch):
        raise ZeroDivisionError("of the task's own")

    def stops(parameters, watch):
        raise Stopped

    assert train_module._task_scores(fails, {}, iter, 2) is None
    assert "step 2: the tasks of config.evaluation failed, and the run goes on" in caplog.text
    assert "ZeroDivisionError: of the task's own" in caplog.text
    with pytest.raises(Stopped):
        train_module._task_scores(stops, {}, iter, 2)


def test_sharded_parameters_score_as_whole_ones(finished, prepared):
    """On eight devices, rows, weights and vocabulary split; and no program is made twice."""
    run = load_run(finished)
    mesh = dataclasses.replace(run.config.mesh, shape=MeshShape(data=2, fsdp=2, tensor=2))
    asked = EvaluationConfig(tasks=("none",), exits=(1, 4), batch_size=3)
    dropout = dataclasses.replace(run.config.layer_dropout, execution="mask")
    setup = make_setup(
        dataclasses.replace(run.config, mesh=mesh, evaluation=asked, layer_dropout=dropout)
    )
    parameters = jax.device_put(run.parameters, setup.shardings.parameters)
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(TEXTS)]
    texts = [Instance("generate_until", {}, ("word1 word2", {"max_gen_toks": 6}), 0)]
    expected = {}
    for exit_layer in asked.exits:
        theirs = LayerSkipLM(str(finished), exit=exit_layer, batch_size=3)
        answers = theirs.loglikelihood(requests, disable_tqdm=True)
        expected[exit_layer] = answers, theirs.generate_until(texts, disable_tqdm=True)
    lm = TrainingLM(setup, prepared / "tokenizer.json", read_manifest(prepared).end_token_id)
    for turn in range(2):
        with jax.set_mesh(setup.mesh), lm.of(parameters, iter):
            for lm.exit, (answers, written) in expected.items():
                found = lm.loglikelihood(requests, disable_tqdm=True)
                np.testing.assert_allclose(
                    [p for p, _ in found], [p for p, _ in answers], rtol=1e-4
                )
                assert [greedy for _, greedy in found] == [greedy for _, greedy in answers]
                assert lm.generate_until(texts, disable_tqdm=True) == written
        if turn == 0:
            made = lm._model.generator.compilations
    assert lm._scorer._cache_size() == 1 and lm._model.generator.compilations == made
    other = jax.tree.map(lambda leaf: leaf * 1.5, parameters)
    with jax.set_mesh(setup.mesh), lm.of(other, iter):
        assert lm.loglikelihood(requests, disable_tqdm=True) != answers


def test_what_cannot_be_evaluated_is_refused_before_the_first_step(
    command, tasks, further, tmp_path, monkeypatch, capsys
):
    workdir = tmp_path / "run"
    local = [f"--config.evaluation.include_path={tasks}"]
    one = [*local, "--config.evaluation.tasks=('local_text',)"]

    def refused(*flags):
        assert main([*command, f"--workdir={workdir}", *flags]) == 2
        assert not workdir.exists()
        return capsys.readouterr().err

    folder = shutil.copytree(tasks, tmp_path / "tasks")
    broken = (folder / "local_choice.yaml").read_text().replace("local_choice", "broken")
    (folder / "broken.yaml").write_text(broken.replace("{{question}}", "{{question.no.such}}"))
    later = broken.replace("broken", "later")
    later = later.replace("{{question}}", "{{ 1 // (question != 'over the lazy')|int }}")
    (folder / "later.yaml").write_text(later)
    lost = (folder / "local_text.yaml").read_text().replace("local_text", "lost")
    (folder / "lost.yaml").write_text(lost.replace("rows.jsonl", "nowhere.jsonl"))
    beams = (folder / "local_text.yaml").read_text().replace("local_text", "beams")
    (folder / "beams.yaml").write_text(beams.replace("max_gen_toks: 8", "num_beams: 4"))
    there = f"--config.evaluation.include_path={folder}"
    for name, message in (
        ("broken", "tasks=('broken',): they cannot be read"),
        ("later", "task later: its questions cannot be written (ZeroDivisionError"),
        ("lost", "they cannot be read"),
        ("beams", "task beams: generation option num_beams=4 is none of this model's"),
    ):
        assert message in refused(there, f"--config.evaluation.tasks=('{name}',)")
    monkeypatch.setattr(TaskManager, "__init__", _only_local(TaskManager.__init__))
    typo = refused(*local, "--config.evaluation.tasks=('local_txt',)")
    assert "there is no task 'local_txt' in" in typo and "Did you mean 'local_text'?" in typo
    assert "is no folder" in refused(*one, "--config.evaluation.include_path=nowhere")
    assert "the model's exits are 1 to 4" in refused(*one, "--config.evaluation.exits=(5,)")
    assert "names one twice" in refused("--config.evaluation.exits=(2, 2)")
    twice = f"--config.data.validation=('{further}', '{further}/')"
    assert "has more than one folder 'repeats'" in refused(twice)
    other = shutil.copytree(further, tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    further = f"--config.data.validation=('{other}',)"
    long = json.dumps(manifest | {"sequence_length": 128})
    (other / "manifest.json").write_text(long)
    assert "windows of 128 tokens, longer" in refused(further)
    with (other / "tokenizer.json").open("a") as file:
        file.write("\n")
    changed = {"tokenizer_sha256": file_sha256(other / "tokenizer.json")}
    (other / "manifest.json").write_text(json.dumps(manifest | changed))
    assert "another tokenizer" in refused(further)
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    monkeypatch.delitem(sys.modules, "layerskip_jax.evaluation.training_tasks")
    assert "pip install --upgrade lm_eval" in refused(*one)


def _only_local(init):
    """The harness's own thousands of tasks take seconds to list."""
    return lambda self, include_path=None, **_: init(
        self, include_path=include_path, include_defaults=False
    )


def test_generation_is_refused_on_several_processes(finished, prepared, tasks, monkeypatch):
    asked = EvaluationConfig(tasks=("local_text",), include_path=str(tasks))
    config = dataclasses.replace(load_run(finished).config, evaluation=asked)
    setup = make_setup(config, jax.devices())
    monkeypatch.setattr(training_tasks.jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="task local_text generates, which a run does only in one"):
        TrainingTasks(setup, read_manifest(prepared), {})


def test_a_program_of_its_own_is_told_what_to_hand_in(finished, tmp_path):
    config = load_run(finished).config.to_dict()
    config["evaluation"] = {"tasks": ["local_choice"]}
    with pytest.raises(ValueError, match="gives train.. open_tasks=layerskip_jax.evaluation"):
        train_module.train(RunConfig.from_dict(config), tmp_path / "run")

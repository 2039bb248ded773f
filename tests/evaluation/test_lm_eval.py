"""The lm-evaluation-harness with our model, on tasks of local files, against its own `hf` model."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, processors
from transformers import AutoModelForCausalLM

import layerskip_jax
from layerskip_jax.cli import main
from layerskip_jax.commands.export import export
from layerskip_jax.schema import ConfigError, UserError
from tests.interop.helpers import END

pytest.importorskip("lm_eval", reason="the test requirements install it")
from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from layerskip_jax.evaluation.lm_eval import CHUNK, LayerSkipLM, parse_draft  # noqa: E402

PAIRS = [
    ("the quick brown", " fox jumps over"),
    ("", "the lazy dog"),
    ("the cat sat on the mat while ", "the dog"),
    ("the " * 90, "cat sat"),  # longer than the context
]


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm_eval") / "model"
    export(run[0].path, folder)
    return folder


def _requests(kind, arguments):
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def _in_transformers(exported, ours, exit_layer):
    """Log-likelihoods by definition: each pair alone, each layer through norm and head."""
    model = AutoModelForCausalLM.from_pretrained(exported).eval()
    answers = []
    for context, continuation in PAIRS:
        # As the harness does: spaces at the end of a context belong to the continuation.
        text = context.rstrip()
        tokens = ours.tok_encode(text + context[len(text) :] + continuation)
        start = len(ours.tok_encode(text)) if text else 0
        tokens = tokens if text else [ours.eot_token_id, *tokens]
        count = len(tokens) - (start or 1)
        tokens = tokens[-(ours.max_length + 1) :]
        with torch.no_grad():
            states = model(torch.tensor([tokens[:-1]]), output_hidden_states=True)
            logits = states.logits
            if exit_layer < 3:
                logits = model.lm_head(model.model.norm(states.hidden_states[exit_layer]))
        log_p = torch.log_softmax(logits[0, -count:], dim=-1)
        targets = torch.tensor(tokens[-count:])
        chosen = log_p.gather(1, targets[:, None]).sum().item()
        answers.append((chosen, bool((log_p.argmax(-1) == targets).all())))
    return answers


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("exit_layer", [1, 2, 3])
def test_every_exit_scores_by_definition(run, exported, exit_layer, batch_size):
    ours = LayerSkipLM(str(run[0].path), exit=exit_layer, batch_size=batch_size)
    found = ours.loglikelihood(_requests("loglikelihood", PAIRS), disable_tqdm=True)
    expected = _in_transformers(exported, ours, exit_layer)
    np.testing.assert_allclose([a for a, _ in found], [a for a, _ in expected], rtol=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_rolling_scores_are_those_of_the_harness_own_model(run, exported):
    from lm_eval.models.huggingface import HFLM

    texts = [("the cat sat on the mat",), ("the quick brown fox " * 40,)]
    requests = _requests("loglikelihood_rolling", texts)
    ours = LayerSkipLM(str(exported), dtype="float32").loglikelihood_rolling(requests)
    theirs = HFLM(pretrained=str(exported), device="cpu", dtype="float32", max_length=64)
    np.testing.assert_allclose(ours, theirs.loglikelihood_rolling(requests), rtol=1e-4)


def test_a_text_begins_as_the_harness_own_model_begins_it(exported, tmp_path):
    """As the tokenizer's template says, and not twice where a chat template has done so."""
    from lm_eval.models.huggingface import HFLM

    folder = shutil.copytree(exported, tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<s>"])
    begin = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", begin)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"bos_token": "<s>"}))
    ours = LayerSkipLM(str(folder), dtype="float32")
    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", max_length=64)
    for text in ("the cat", "<s>the cat", f"the {END}cat"):
        assert ours.tok_encode(text) == theirs.tok_encode(text)
        assert ours.tok_encode(text)[0] == begin
    assert ours.prefix_token_id == theirs.prefix_token_id == begin
    requests = _requests("loglikelihood", PAIRS)
    np.testing.assert_allclose(
        [score for score, _ in ours.loglikelihood(requests, disable_tqdm=True)],
        [score for score, _ in theirs.loglikelihood(requests, disable_tqdm=True)],
        rtol=1e-4,
    )


def test_chats_are_those_of_the_harness_own_model(run, exported, tmp_path, caplog):
    from lm_eval.models.huggingface import HFLM

    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}[{{ m.role }}] {{ m.content }} {{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    folder = shutil.copytree(exported, tmp_path / "model")
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | {"chat_template": template, "eos_token": END}
    file.write_text(json.dumps(settings))
    ours = LayerSkipLM(str(folder), dtype="float32")
    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", max_length=64)
    system, asks = ({"role": "system", "content": "sit"}, {"role": "user", "content": "the cat"})
    says = {"role": "assistant", "content": " on"}
    for turns, begins in (([asks], True), ([asks, says], False), ([system, asks], True)):
        text = ours.apply_chat_template(turns, add_generation_prompt=begins)
        assert text == theirs.apply_chat_template(turns, add_generation_prompt=begins)
        assert ours.tok_encode(text) == theirs.tok_encode(text)
    assert ours.apply_chat_template([asks]) == f"[user] the cat {END}[assistant] "
    assert "no system; the system's turns are left out" in caplog.text
    assert ours.chat_template(True) == theirs.chat_template(True) == template
    assert ours.chat_template(False) is None
    with pytest.raises(ConfigError, match="--apply_chat_template=tools: a model's default"):
        ours.chat_template("tools")
    without = LayerSkipLM(str(run[0].path))
    assert without.tokenizer_name != ours.tokenizer_name
    for chats in (lambda: without.chat_template(True), lambda: without.apply_chat_template([asks])):
        with pytest.raises(ConfigError, match="has no chat template, .* leave --apply_chat"):
            chats()


def test_generation_is_the_same_drafted_and_not_and_stops(run):
    requests = _requests(
        "generate_until",
        [("the cat", {"until": ["q"], "max_gen_toks": 12}), ("", {"max_gen_toks": 5})],
    )
    plain = LayerSkipLM(str(run[0].path)).generate_until(requests, disable_tqdm=True)
    drafted = LayerSkipLM(str(run[0].path), draft="1:2")
    assert drafted.generate_until(requests, disable_tqdm=True) == plain
    whole = _requests("generate_until", [("the cat", {"max_gen_toks": 12})])
    [text] = drafted.generate_until(whole, disable_tqdm=True)
    stop = text[3:5]
    stopped = _requests("generate_until", [("the cat", {"until": [stop], "max_gen_toks": 12})])
    assert drafted.generate_until(stopped, disable_tqdm=True) == [text[: text.find(stop)]]


def test_generation_may_exit_when_sure(run):
    requests = _requests("generate_until", [("the cat", {"max_gen_toks": 12})])
    sure = LayerSkipLM(str(run[0].path), exit_when="margin:0", kv="deferred")
    first = layerskip_jax.load(run[0].path).generate(
        "the cat", 12, exit_when="margin:0", kv="deferred"
    )
    assert first.generation.depth.mean_layers == 1
    assert sure.generate_until(requests, disable_tqdm=True) == first.texts


def test_repeats_are_drawn_independently_and_fixed_by_the_seed(run):
    given = {"do_sample": True, "temperature": 0.8, "max_gen_toks": 12}
    [request] = _requests("generate_until", [("the cat", given)])
    model = LayerSkipLM(str(run[0].path))
    drawn = model.generate_until([request] * 8, disable_tqdm=True)
    assert len(set(drawn)) > 5
    assert model.generate_until([request] * 8, disable_tqdm=True) == drawn
    assert model.generate_until([request] * 2, disable_tqdm=True) == drawn[:2]
    assert LayerSkipLM(str(run[0].path), seed=1).generate_until([request], True) != drawn[:1]
    [seeded] = _requests("generate_until", [("the cat", given | {"seed": 1})])
    [other] = LayerSkipLM(str(run[0].path), draft="1:2").generate_until([seeded], True)
    assert model.generate_until([seeded], True) == [other] != drawn[:1]


def test_options_of_the_harness_are_honoured_or_refused(run):
    model = LayerSkipLM(str(run[0].path))

    def text(**given):
        requests = _requests("generate_until", [("the cat", {"max_gen_toks": 12} | given)])
        return model.generate_until(requests, disable_tqdm=True)

    greedy = text()
    assert text(do_sample=False, temperature=0.7) == greedy
    assert text(temperature=0.9, top_k=1) == greedy, "the likeliest of one"
    assert text(temperature=0.9, top_p=1e-6) == greedy
    assert text(do_sample=True) == text(do_sample=True, temperature=1.0) != greedy
    assert text(temperature=0.9, top_k=-1) == text(temperature=0.9, top_k=0) != greedy
    assert text(num_beams=1, repetition_penalty=1.0, min_p=None) == greedy
    for name, value in (("num_beams", 4), ("repetition_penalty", 1.2), ("min_tokens", 3)):
        with pytest.raises(ConfigError, match=f"generation option {name}={value} is none of"):
            text(**{name: value})
    for temperature in (-1.0, float("nan")):  # which would be greedy, unsaid
        with pytest.raises(ConfigError, match=f"temperature={temperature} must be"):
            text(do_sample=True, temperature=temperature)


def test_a_log_probability_that_is_not_finite_is_refused(run, monkeypatch):
    model = LayerSkipLM(str(run[0].path))
    nothing = np.full((1, CHUNK), np.nan, np.float32)
    monkeypatch.setattr(
        "layerskip_jax.evaluation.lm_eval.score", lambda *_, **__: (nothing, nothing)
    )
    with pytest.raises(UserError, match="a log-probability is not finite in float32"):
        model.loglikelihood(_requests("loglikelihood", [("the cat", " sat")]), disable_tqdm=True)


def test_a_request_without_room_costs_itself_alone(run, caplog):
    """And what cannot be honoured is found before anything is computed."""
    model = LayerSkipLM(str(run[0].path))
    long = {"max_gen_toks": model.max_length}
    requests = _requests(
        "generate_until",
        [("the", {"max_gen_toks": 4}), ("cat", long), ("sat", {"max_gen_toks": 4})],
    )
    alone = model.generate_until([requests[0], requests[2]], disable_tqdm=True)
    found = model.generate_until(requests, disable_tqdm=True)
    assert found == [alone[0], "", alone[1]]
    assert "its documents" in caplog.text and "max_gen_toks leaves no room" in caplog.text
    pairs = [("the quick", " brown fox"), ("the", " cat sat" * 200), ("the " * 90, "cat sat")]
    scored = model.loglikelihood(_requests("loglikelihood", pairs), disable_tqdm=True)
    alone = model.loglikelihood(_requests("loglikelihood", pairs[:1]), disable_tqdm=True)
    assert scored[0] == pytest.approx(alone[0], rel=1e-5) and scored[1] == (-math.inf, False)
    assert np.isfinite(scored[2][0])
    assert "1 of 3 continuations alone are longer than the context" in caplog.text
    assert "1 of 3 log-likelihoods are of more than" in caplog.text
    model._model = None  # computes nothing
    bad = _requests("generate_until", [("the", {}), ("cat", {"num_beams": 2})])
    with pytest.raises(ConfigError, match="num_beams=2"):
        model.generate_until(bad, disable_tqdm=True)


@pytest.mark.slow
def test_the_command_runs_local_tasks(run, exported, tasks, tmp_path, monkeypatch, capsys):
    """And its accuracy is that of the harness's own model on the exported folder."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    output = tmp_path / "results"
    arguments = [
        "lm-eval", "--model", "layerskip", "--model_args", f"path={run[0].path},draft=auto",
        "--tasks", "local_choice,local_text", "--include_path", str(tasks),
        "--output_path", str(output),
    ]  # fmt: skip
    assert main(arguments) == 0
    [file] = output.rglob("results_*.json")
    found = json.loads(file.read_text())["results"]
    theirs = simple_evaluate(
        "hf", model_args=f"pretrained={exported},device=cpu,dtype=float32",
        tasks=["local_choice", "local_text"],
        task_manager=TaskManager(include_path=str(tasks)),
    )["results"]  # fmt: skip
    for task, metric in (("local_choice", "acc,none"), ("local_text", "exact_match,none")):
        assert found[task][metric] == theirs[task][metric]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"exit": 4}, "exit=4 must be in 1..3"),
        ({"exit": 1, "draft": "auto"}, "exit=1 decodes with those layers alone"),
        ({"draft": "fast"}, "draft='fast' is not best, auto or E:G"),
        ({"exit_when": "margin:0.5", "draft": "auto"}, "exit_when=margin:0.5 decides how deep"),
        ({"exit_when": "learned:0.5"}, "learned:0.5.* asks a classifier"),
        ({"exit_when": "entropy"}, "none was calibrated for kv=propagate"),
        ({"kv": "deferred"}, "kv=deferred has no meaning without exit_when"),
        ({"batch_size": "auto"}, "batch_size=auto must be a number"),
        ({"dtyp": "float32"}, "model argument dtyp is none of this model's; they are path, exit"),
        ({"device": "cuda:1"}, "device=cuda:1: jax chooses it"),
        ({"max_length": 0}, "max_length=0 must be above 0"),
    ],
)
def test_bad_arguments_are_named(run, arguments, message):
    with pytest.raises(ConfigError, match=message):
        LayerSkipLM(str(run[0].path), **arguments)
    assert parse_draft("2:3") == (2, 3)

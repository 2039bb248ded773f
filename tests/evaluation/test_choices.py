"""Choices by likelihood, against the training side's forward and by hand."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layerskip_jax.cli import main
from layerskip_jax.data.text import encode_prompt
from layerskip_jax.data.tokenizer import load_tokenizer
from layerskip_jax.decoding.weights import decoder_weights
from layerskip_jax.evaluation.choices import Question, read_questions, score_choices
from layerskip_jax.model.transformer import Transformer
from layerskip_jax.run_folder.paths import RunFolder
from layerskip_jax.schema import ConfigError, UserError
from tests.helpers import small_model

EXITS = (1, 2, 3)


def questions():
    """Returns random questions; their choices have up to three tokens, in few shapes."""
    random = np.random.default_rng(0)
    found = []
    for answer, length, sizes in ((0, 4, (2, 2)), (1, 4, (2, 2)), (1, 4, (1, 2)), (0, 7, (3, 3))):
        for _ in range(3):
            prompt = random.integers(1, 64, length).tolist()
            choices = [random.integers(1, 64, size).tolist() for size in sizes]
            found.append(Question([prompt] * 2, choices, answer))
    return found


def plain_log_p(model, prompt, choice):
    """Returns log p of a choice's tokens at every exit `[L, T]`, and all of them `[L, T, V]`."""
    ids = jnp.array([prompt + choice])
    inputs = model.row_inputs(jnp.arange(ids.shape[1])[None], jnp.ones_like(ids))
    _, states = model.scan_layers(model.embed(ids), inputs, lambda c, _, x: (c, x), None)
    log_p = jax.nn.log_softmax(model.final_norm(states) @ model.head_weight)[:, 0]
    part = np.asarray(log_p[:, len(prompt) - 1 : -1])
    return part[:, np.arange(len(choice)), choice], part


@pytest.mark.parametrize("score, reduce", [("sum", np.sum), ("mean", np.mean)])
def test_accuracy_at_exits_and_under_policies_is_that_of_plain_forwards(score, reduce):
    model = Transformer(small_model(), jax.random.key(3))
    asked = questions()
    found = score_choices(
        decoder_weights(model), model.config, asked, exits=EXITS,
        policies=("patience", "entropy"), score=score,
    )  # fmt: skip
    plain = [
        [plain_log_p(model, *pair) for pair in zip(q.prompts, q.choices, strict=True)]
        for q in asked
    ]

    def right(exit_of):
        """Returns the accuracy, and the mean layers, where `exit_of` gives each token's exit."""
        hits, ran = 0, []
        for question, choices in zip(asked, plain, strict=True):
            scores = []
            for chosen, all_log_p in choices:
                exits = [exit_of(all_log_p[:, t]) for t in range(chosen.shape[1])]
                scores.append(reduce([chosen[e - 1, t] for t, e in enumerate(exits)]))
                ran += exits
            hits += int(np.argmax(scores)) == question.answer
        return hits / len(asked), np.mean(ran)

    for entry in found["exits"]:
        layers = entry["layers"]
        assert (entry["accuracy"], layers) == right(lambda _, layers=layers: layers)
    assert len({entry["accuracy"] for entry in found["exits"]}) > 1  # the exits differ here

    def two_in_a_row(log_p):
        tokens = log_p.argmax(-1)
        return next((e for e in EXITS[1:] if tokens[e - 1] == tokens[e - 2]), 4)

    def below(threshold):
        shares = lambda log_p: -(np.exp(log_p) * log_p).sum(-1) / np.log(64)  # noqa: E731
        return lambda log_p: next((e for e in EXITS if shares(log_p)[e - 1] < threshold), 4)

    curve = {point["threshold"]: point for point in found["policies"]["patience"]}
    accuracy, layers = right(two_in_a_row)
    assert curve[2]["accuracy"] == accuracy and curve[2]["layers"] == pytest.approx(layers)
    assert curve[1]["layers"] == 1
    assert curve[1]["accuracy"] == found["exits"][0]["accuracy"]
    ran = set()
    for point in found["policies"]["entropy"]:
        accuracy, layers = right(below(point["threshold"]))
        assert point["accuracy"] == accuracy and point["layers"] == pytest.approx(layers)
        ran.add(point["layers"])
    assert max(ran) == 4 and min(ran) < 4


def test_a_score_that_is_none_is_refused():
    model = Transformer(small_model(), jax.random.key(3))
    with pytest.raises(ConfigError, match="--choice-score='product'"):
        score_choices(
            decoder_weights(model), model.config, questions(), exits=(1,), policies=(),
            score="product",
        )  # fmt: skip


def write(path, *lines):
    path.write_text("".join(f"{x if isinstance(x, str) else json.dumps(x)}\n" for x in lines))
    return path


GOOD = {"prompt": "Document 3. word1 ", "choices": ["word2", "word3 word4"], "answer": "word2"}


def test_prompt_and_choice_are_tokenised_together(finished, tmp_path):
    tokenizer = load_tokenizer(finished / "tokenizer.json")
    file = write(tmp_path / "q.jsonl", GOOD, "", GOOD | {"prompt": "", "answer": 1})
    first, second = read_questions(file, tokenizer, end_token=0, context=64)
    # The space that ends the prompt goes with the choice.
    before = encode_prompt(tokenizer, "Document 3. word1")
    assert first.prompts == [before, before] and first.answer == 0
    for choice, text in zip(first.choices, GOOD["choices"], strict=True):
        assert before + choice == encode_prompt(tokenizer, GOOD["prompt"] + text)
    assert second.prompts == [[0], [0]] and second.answer == 1
    assert second.choices == [encode_prompt(tokenizer, text) for text in GOOD["choices"]]


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 2 is no JSON"),
        ([1], "line 2 must be"),
        ({"prompt": "a", "choices": ["b", "c"]}, "line 2 must be"),
        (GOOD | {"choices": "word"}, "line 2: prompt and choices must be text"),
        (GOOD | {"choices": ["a", 3]}, "line 2: prompt and choices must be text"),
        (GOOD | {"choices": ["word2"]}, "must be at least two, and differ"),
        (GOOD | {"choices": ["a", "a"]}, "must be at least two, and differ"),
        (
            GOOD | {"choices": ["a", ""], "prompt": "b", "answer": 0},
            "line 2: the choice .. has no",
        ),
        (GOOD | {"answer": 2}, r"answer=2 must be one of the choices, or its index in 0..1"),
        (GOOD | {"answer": True}, "answer=True must be"),
        (GOOD | {"answer": "word5"}, "answer='word5' must be"),
        (GOOD | {"prompt": "word " * 90}, "line 2: prompt and choice have .* the context holds 64"),
    ],
)
def test_a_bad_line_is_named_by_its_number(finished, tmp_path, line, message):
    tokenizer = load_tokenizer(finished / "tokenizer.json")
    with pytest.raises(UserError, match=message):
        read_questions(write(tmp_path / "q.jsonl", GOOD, line), tokenizer, end_token=0, context=64)


def test_a_file_must_be_there_and_hold_a_question(finished, tmp_path):
    tokenizer = load_tokenizer(finished / "tokenizer.json")
    for file, message in ((tmp_path / "none", "cannot be read"), (write(tmp_path / "q"), "holds")):
        with pytest.raises(UserError, match=message):
            read_questions(file, tokenizer, end_token=0, context=64)


def test_the_verb_prints_and_draws_the_curves(finished, tmp_path, capsys):
    workdir, figures = tmp_path / "run", tmp_path / "figures.json"
    shutil.copytree(finished, workdir)
    file = write(tmp_path / "q.jsonl", GOOD, GOOD | {"answer": 1})
    arguments = ["evaluate", f"--workdir={workdir}", f"--choices={file}"]
    assert main([*arguments, f"--json={figures}", "--choice-score=mean"]) == 0
    found = json.loads(figures.read_text())
    assert (found["questions"], found["step"], found["score"]) == (2, 12, "mean")
    # The same question with either answer: half is right, whatever the model says.
    assert {entry["accuracy"] for entry in found["exits"]} == {0.5}
    assert found["policies"].keys() == {"entropy", "margin", "saturation", "patience"}
    assert "2 questions by the mean of log-probabilities" in capsys.readouterr().out
    drawn = RunFolder(workdir).choices_figure.read_text()
    assert all(f">{name}<" in drawn for name in [*found["policies"], "mean layers run"])


@pytest.mark.parametrize(
    "options, message",
    [
        (["--choice-score=sum"], "--choice-score says nothing without --choices"),
        (["--choices=q.jsonl", "--batches=3"], "--batches says nothing with --choices"),
        (["--choices=q.jsonl", "--data=there"], "--data says nothing with --choices"),
    ],
)
def test_options_that_do_not_go_together_are_refused(finished, capsys, options, message):
    assert main(["evaluate", f"--workdir={finished}", *options]) == 2
    assert message in capsys.readouterr().err

"""Exact match of greedy completions, against decoding one prompt at a time."""

import collections
import json
import re

import pytest

from layerskip_jax.cli import main
from layerskip_jax.evaluation.completions import (
    Wanted,
    chosen_exits,
    exact_match,
    read_completions,
)
from layerskip_jax.language_model import load
from layerskip_jax.schema import ConfigError

PROMPTS = ["the quick", "fox", "over the lazy dog", "cat sat", "mat", "brown fox jumps", "on", "le"]
MOST = 6


@pytest.fixture(scope="module")
def model(run):
    """A random model, whose end token is one that it writes."""
    model = load(run[0].path)
    said = model.complete([model.encode(p) for p in PROMPTS], MOST, exit_layer=1)
    written = collections.Counter(t for tokens in said.generation.tokens for t in set(tokens[1:]))
    model.end_token = written.most_common(1)[0][0]
    return model


def greedy(model, prompt, layers):
    """Returns what is written after a prompt, None where it does not end in time."""
    said = model.complete([model.encode(prompt)], MOST, exit_layer=layers)
    [tokens], [text] = said.generation.tokens, said.texts
    return text if tokens[-1] == model.end_token and text else None


def test_a_completion_is_right_if_it_is_the_very_text_and_ends_there(model):
    ended = {p: text for p in PROMPTS if (text := greedy(model, p, 1))}
    assert ended
    wanted = [Wanted(model.encode(p), text, MOST) for p, text in ended.items()]
    [found] = exact_match(model, wanted, [1])
    assert found == {"layers": 1, "right": len(ended), "exact_match": 1.0}
    # Another letter, a letter less, and another exit's completion.
    for wrong in ([one._replace(text=one.text + "z") for one in wanted],
                  [one._replace(text=one.text[:-1]) for one in wanted]):  # fmt: skip
        [found] = exact_match(model, [*wanted, *wrong], [1])
        assert (found["right"], found["exact_match"]) == (len(ended), 0.5)
    last = {p: greedy(model, p, None) for p in ended}
    assert last != ended
    _, of_last = exact_match(model, wanted, [1, 3])
    assert of_last["right"] == sum(ended[p] == last[p] for p in ended)


def test_a_text_that_does_not_end_in_time_is_wrong(model):
    [prompt, *_] = [p for p in PROMPTS if greedy(model, p, 1) is None]
    said = model.complete([model.encode(prompt)], 16, exit_layer=1)
    assert model.end_token not in said.generation.tokens[0][:2]
    text = model.tokenizer.decode(said.generation.tokens[0][:2])
    [found] = exact_match(model, [Wanted(model.encode(prompt), text, 3)], [1])
    assert found["right"] == 0


def test_the_exits_are_a_quarter_a_half_and_all_layers():
    assert chosen_exits(8, None) == (2, 4, 8)
    assert chosen_exits(2, None) == (1, 2)
    assert chosen_exits(8, (3, 1)) == (3, 1)
    with pytest.raises(ConfigError, match="names no exit"):
        chosen_exits(8, ())


def test_prompts_are_read_as_generate_reads_them(model, tmp_path):
    file = tmp_path / "c.jsonl"
    lines = [{"q": "the cat", "a": " sat", "other": 1}, {"q": "fox", "a": "es"}]
    file.write_text("\ufeff" + "\n\n".join(map(json.dumps, lines)), encoding="utf-8")
    first, second = read_completions(
        file, model.tokenizer, context=64, prompt_field="q", completion_field="a"
    )
    assert first.prompt == model.encode("the cat") and first.text == " sat"
    whole = model.tokenizer.encode("the cat sat").ids
    assert first.tokens == len(whole) - len(first.prompt) + 1
    assert second.prompt == model.encode("fox") and second.text == "es"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "x"}', r"line 2 has no field 'completion' \(its fields: 'prompt'\)"),
        ('{"prompt": "x", "completion": 3}', "line 2 has 3 in its field 'completion'"),
        ('{"prompt": "", "completion": "x"}', "line 2 has no text in its field 'prompt'"),
        ("[]", "line 2 is no JSON object"),
        ("{", "line 2 is no JSON"),
        (json.dumps({"prompt": "the " * 70, "completion": "x"}), "line 2: prompt and completion "),
        ("", "holds no completion"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_scored(run, tmp_path, capsys, line, message):
    file = tmp_path / "c.jsonl"
    file.write_text(f"\n{line}\n")
    assert main(["evaluate", f"--workdir={run[0].path}", f"--completions={file}"]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_options_that_say_nothing_are_refused(run, tmp_path, capsys):
    file = tmp_path / "c.jsonl"
    file.write_text('{"prompt": "fox", "completion": " jumps"}\n')
    workdir = f"--workdir={run[0].path}"
    for more in ("--batches=1", "--data=x", "--choices=x", "--choice-score=sum"):
        assert main(["evaluate", workdir, f"--completions={file}", more]) == 2
        assert "says nothing with --completions" in capsys.readouterr().err
    for more in ("--exits=1", "--prompt-field=x", "--completion-field=x"):
        assert main(["evaluate", workdir, more]) == 2
        assert "says nothing without --completions" in capsys.readouterr().err
    assert main(["evaluate", workdir, f"--completions={file}", "--exits=4"]) == 2
    assert "--exits=4 must be at most 3" in capsys.readouterr().err
    assert main(["evaluate", workdir, f"--completions={tmp_path}/none"]) == 2
    assert "none cannot be read" in capsys.readouterr().err


def test_the_verb_prints_and_writes_what_it_found(run, tmp_path, capsys):
    file, figures = tmp_path / "c.jsonl", tmp_path / "f.json"
    file.write_text('{"q": "fox", "a": " jumps"}\n{"q": "the", "a": " cat"}\n')
    arguments = [
        "evaluate", f"--workdir={run[0].path}", f"--completions={file}", f"--json={figures}",
        "--prompt-field=q", "--completion-field=a",
    ]  # fmt: skip
    assert main(arguments) == 0
    assert "exact match" in capsys.readouterr().out
    found = json.loads(figures.read_text())
    assert found["completions"] == 2
    assert [e["layers"] for e in found["exits"]] == [1, 3]
    assert all(e["exact_match"] == e["right"] / 2 for e in found["exits"])

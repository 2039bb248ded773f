"""The whole way in one go, as the quickstart takes it, on a smaller corpus and model."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess

import pytest
import torch
import transformers

import layerskip_jax
from layerskip_jax.cli import main
from layerskip_jax.generation.generator import Generator, StreamEvent
from layerskip_jax.language_model import LanguageModel
from layerskip_jax.run_folder.paths import RunFolder
from layerskip_jax.schema import ConfigError
from layerskip_jax.training.restore import load_run


@pytest.mark.slow
def test_every_result_is_there(quickstart):
    top, _ = quickstart
    folder = RunFolder(top / "model")
    evaluation = json.loads((top / "model" / "evaluation.json").read_text())
    assert [entry["layers"] for entry in evaluation["exits"]] == [1, 2, 3, 4]
    entropy = json.loads(folder.data_file.read_text())["unigram_entropy_nats"]
    assert evaluation["exits"][-1]["loss"] < entropy
    speculation = json.loads(folder.speculation_file.read_text())
    assert speculation["prompts"] == 32
    assert all(pair["identical"] for pair in [*speculation["pairs"], speculation["best"]])
    rows = folder.speculation_file.with_suffix(".csv").read_text().splitlines()
    assert len(rows) == 1 + len(speculation["pairs"]) + 1
    assert "<svg" in folder.speculation_file.with_suffix(".svg").read_text()
    page = folder.report_file.read_text()
    assert page.count("<svg") >= 8
    needed = json.loads(folder.layers_needed_file.read_text())
    assert needed["layers"] == 4 and [entry["model"] for entry in needed["beside"]] == ["plain"]
    assert 'id="figure-layers_needed"' in page
    assert "plain: 5 steps, no dropout, no exits" in page


@pytest.mark.slow
def test_the_second_time_is_free(quickstart, capsys):
    top, command = quickstart
    watched = [p for p in (top / "export").rglob("*") if p.is_file()]
    watched += [RunFolder(top / "model").speculation_file, top / "data" / "manifest.json"]
    before = [p.stat().st_mtime_ns for p in watched]
    assert main(command) == 0
    assert [p.stat().st_mtime_ns for p in watched] == before
    assert capsys.readouterr().out.count("# done before") == 5


@pytest.mark.slow
def test_the_exported_model_says_the_same_in_transformers(quickstart):
    top, _ = quickstart
    run = load_run(top / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(top / "export")
    model = transformers.AutoModelForCausalLM.from_pretrained(top / "export")
    prompt = tokenizer("def get_payload(self):")["input_ids"]
    ours = Generator(run.model).generate([prompt], 24).tokens[0]
    with torch.no_grad():
        theirs = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=24, eos_token_id=None
        )
    assert theirs[0, len(prompt) :].tolist() == ours
    # transformers drafts with the first layers of the same folder, to the same tokens.
    for exit_layer in (1, 2):
        with torch.no_grad():
            theirs = model.generate(
                torch.tensor([prompt]), do_sample=False, max_new_tokens=24, eos_token_id=None,
                assistant_early_exit=exit_layer,
            )  # fmt: skip
        assert theirs[0, len(prompt) :].tolist() == ours


@pytest.mark.slow
def test_the_api_on_the_trained_model(quickstart, capsys, monkeypatch):
    """Text in, text out: one prompt or several, drafted or not, streamed or not."""
    top, _ = quickstart
    model = layerskip_jax.load(top / "model")
    prompts = ["def get_payload(self):", "import"]
    plain = model.generate(prompts, 24)
    assert len(plain.texts) == 2
    for draft in ("best", "auto", (1, 3)):
        assert model.generate(prompts, 24, draft=draft).texts == plain.texts
    for draft in ("best", (1, 3)):
        pieces = list(model.stream(prompts[0], 24, draft=draft))
        assert "".join(piece.text for piece in pieces if not piece.is_draft) == plain.texts[0]
    assert any(piece.is_draft and piece.text for piece in pieces)
    stop = plain.texts[0][3:6]
    stopped = model.generate(prompts[0], 24, stop=[stop]).texts[0]
    assert plain.texts[0].startswith(stopped)
    with pytest.raises(ConfigError, match="draft='never' must be"):
        model.generate("import", 4, draft="never")
    with pytest.raises(ConfigError, match="exit_layer=2 decodes with those layers alone"):
        model.generate("import", 4, draft="auto", exit_layer=2)
    assert model.generate(prompts, 24, exit_layer=1).texts != plain.texts

    command = ["generate", f"--workdir={top / 'model'}", "--prompt=import", "--max-new-tokens=24"]
    for more in ([], ["--draft=best"], ["--draft=auto"], ["--draft=1,3"]):
        capsys.readouterr()
        assert main([*command, *more, "--stream"]) == 0
        assert capsys.readouterr().out.rstrip("\n") == "import" + plain.texts[1].rstrip("\n")
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    capsys.readouterr()
    assert main([*command, "--draft=1,3", "--stream"]) == 0
    shown = capsys.readouterr().out
    assert "\x1b[2;36m" in shown, "no draft was shown as one"
    lines = ("import" + plain.texts[1]).split("\n")
    assert shown.endswith(lines[-1] + "\n")
    monkeypatch.delenv("FORCE_COLOR")
    assert main([*command, "--prompt=def", "--stream"]) == 2
    assert "one prompt at a time, not 2" in capsys.readouterr().err


@pytest.mark.slow
def test_a_second_model_drafts_if_its_tokens_are_the_same(quickstart, capsys, tmp_path):
    """The plain twin drafts for the model; another tokenizer is refused by its first difference."""
    top, _ = quickstart
    prompts = ["def get_payload(self):", "import"]
    model = layerskip_jax.load(top / "model", draft_model=top / "plain")
    plain = model.generate(prompts, 24)
    for options in ({}, {"stop_below": 0.1}):
        drafted = model.generate(prompts, 24, draft=3, **options)
        assert drafted.texts == plain.texts
        assert drafted.generation.drafting.drafted > 0
    pieces = list(model.stream(prompts[1], 24, draft=3))
    assert "".join(piece.text for piece in pieces if not piece.is_draft) == plain.texts[1]
    with pytest.raises(ConfigError, match="draft=0 must be"):
        model.generate("import", 4, draft=0)
    with pytest.raises(ConfigError, match="exit_layer=2 decodes with those layers alone"):
        model.generate("import", 4, draft=3, exit_layer=2)
    with pytest.raises(ConfigError, match="was loaded without one"):
        layerskip_jax.load(top / "model").generate("import", 4, draft=3)

    command = ["generate", f"--workdir={top / 'model'}", "--prompt=import", "--max-new-tokens=24"]
    second = f"--draft-model={top / 'plain'}"
    capsys.readouterr()
    assert main([*command, second, "--draft=3", "--stream"]) == 0
    assert capsys.readouterr().out.rstrip("\n") == "import" + plain.texts[1].rstrip("\n")
    for wrong, message in (
        ([second], "such as --draft=5"),
        ([second, "--draft=auto"], "such as --draft=5"),
        ([second, "--draft=1,3"], "such as --draft=5"),
        ([second, "--exit=2"], "such as --draft=5"),
        (["--draft=3"], "name it with --draft-model"),
        ([f"--draft-model={top / 'none'}", "--draft=3"], "none is no folder"),
    ):
        assert main([*command, *wrong]) == 2
        assert message in capsys.readouterr().err

    other = shutil.copytree(top / "plain", tmp_path / "other")
    shutil.rmtree(other / "checkpoints")  # tokens are compared before any weight is read
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    texts = {token_id: text for text, token_id in vocabulary.items()}
    vocabulary |= {texts[300]: 301, texts[301]: 300}
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match=re.escape(f"token 300 is {texts[300]!r} to the model")):
        layerskip_jax.load(top / "model", draft_model=other)
    config = json.loads((other / "config.json").read_text())
    size = config["model"]["vocab_size"]
    config["model"]["vocab_size"] = size + 1
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=f"of {size + 1} tokens and the model one of {size};"):
        layerskip_jax.load(top / "model", draft_model=other)


@pytest.mark.slow
def test_best_is_never_slower_than_plain(quickstart, tmp_path):
    """Where the sweep measured nothing faster, `best` decodes plainly, and generate says so."""
    top, _ = quickstart
    run = shutil.copytree(top / "model", tmp_path / "model")
    file = RunFolder(run).speculation_file
    found = json.loads(file.read_text())
    for speedup, drafts in ((1.3, True), (0.9, False)):
        found["best"]["speedup"] = speedup
        file.write_text(json.dumps(found))
        generation = layerskip_jax.load(run).generate("import", 8, draft="best").generation
        assert (generation.drafting is not None) == drafts
    command = ["generate", f"--workdir={run}", "--prompt=import", "--max-new-tokens=8"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main([*command, "--draft=best"]) == 0
    assert "decoded plainly, which the sweep found fastest" in printed.getvalue()


@pytest.mark.slow
def test_streamed_text_never_holds_half_a_character(quickstart):
    top, _ = quickstart
    model = layerskip_jax.load(top / "model")
    ids = model.tokenizer.encode("naïve – 日本語 😀").ids
    assert len(ids) > 12, "these characters should take several tokens each"

    class Replay(Generator):
        def __init__(self):
            """Needs no weights."""

        def stream(self, *arguments, **options):
            yield StreamEvent(True, ids[:3])
            for token in ids:
                yield StreamEvent(False, [token])

    replay = LanguageModel(Replay(), model.tokenizer, None, None)
    pieces = list(replay.stream("x", 24))
    assert all("\ufffd" not in piece.text for piece in pieces)
    assert "".join(piece.text for piece in pieces if not piece.is_draft) == "naïve – 日本語 😀"


@pytest.mark.slow
def test_the_commands_it_ends_with_run_as_they_are_pasted(quickstart):
    top, _ = quickstart
    printed = (top.parent / "printed.txt").read_text().partition("Go on with:\n\n# ")[2]
    generate, report, train = (block.partition("\n") for block in printed.split("\n\n# "))
    assert "browser" in report[0]
    assert train[0].startswith("train on your own text")
    # Pasted where the tests stand, by a user for whom jax and the browser are not set.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    environment["BROWSER"] = "echo opened %s"
    said = {}
    for name, (_, _, command), more in (
        ("generate", generate, ""),
        ("report", report, ""),
        ("train", train, " --config.training.steps=2"),
    ):
        done = subprocess.run(
            ["bash", "-c", command.rstrip() + more], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "TPU" not in done.stderr
        said[name] = done.stdout
    assert said["generate"].startswith("def main(")
    assert f"opened {(top / 'model' / 'report.html').as_uri()}" in said["report"]
    assert (top / "my-model" / "config.json").is_file()

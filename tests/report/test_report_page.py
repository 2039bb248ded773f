"""The page as a browser, a reader without sight and a careless user meet it."""

import dataclasses
import json
import re
from html.parser import HTMLParser

import pytest

from layerskip_jax.commands.report import main
from layerskip_jax.report.drawing import inline_svg
from layerskip_jax.report.page import FIGURES, build_page, save_figure, write_report
from layerskip_jax.report.run_record import read_run
from layerskip_jax.schema import UserError
from tests.report.synthetic import make_run, small_config

VOID = {"meta", "link", "br", "img", "hr", "input", "col"}


class Balanced(HTMLParser):
    """Collects ids, labels and text, and fails on a tag closed out of order."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.ids, self.labels, self.words = [], [], {}, []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag == "svg":
            figure = next(i for t, i in reversed(self.open) if t == "figure")
            self.labels[figure] = (attributes["role"], attributes["aria-label"])
        if tag not in VOID:
            self.open.append((tag, attributes.get("id")))

    def handle_startendtag(self, tag, attrs):
        attributes = dict(attrs)
        if "id" in attributes:
            self.ids.append(attributes["id"])

    def handle_endtag(self, tag):
        assert self.open and self.open.pop()[0] == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "first", small_config())


@pytest.fixture(scope="module")
def page(run_folder):
    return build_page(read_run(run_folder))


def test_page_holds_every_figure_with_a_label(page):
    labels = Balanced(page).labels
    assert set(labels) == {f"figure-{name}" for name in FIGURES}
    assert all(role == "img" and len(label) > 30 for role, label in labels.values())


def test_page_asks_for_nothing_from_outside(page):
    stripped = re.sub(r' xmlns(:xlink)?="[^"]*"', "", page)
    assert "http://" not in stripped and "https://" not in stripped
    assert "<script" not in page and "<link" not in page and "@import" not in page
    for target in re.findall(r'(?:href|src)="([^"]*)"', page):
        assert target.startswith(("#", "data:image/png;base64,")), target


def test_ids_are_unique_and_references_lead_somewhere(page):
    ids = Balanced(page).ids
    assert len(ids) == len(set(ids))
    references = re.findall(r'href="#([^"]+)"', page) + re.findall(r"url\(#([^)]+)\)", page)
    assert references and set(references) <= set(ids)


@pytest.mark.parametrize("name", ["drop_probability", "perplexity_by_exit"])
def test_a_figure_is_the_same_each_time(run_folder, page, name):
    assert inline_svg(FIGURES[name](read_run(run_folder)), name) in page


def test_page_stays_small(page):
    assert len(page) < 600_000


def test_page_prints_the_numbers(run_folder, page):
    text = " ".join(Balanced(page).words)
    run = read_run(run_folder)
    assert f"{run.final_perplexities()[8]:.1f}" in text
    assert "layer_dropout.p_max" in text and "unigram_entropy_nats" in text
    own, twin = run.depths()
    assert f"{own['settled']['mean']:.2f}" in text and f"{twin['settled']['mean']:.2f}" in text
    assert "16 prompts, 64 prompt tokens each, 128 new tokens each" in text


def test_optional_pieces_may_be_missing(tmp_path):
    folder = make_run(tmp_path / "a run", small_config(), upto=1)
    for name in (
        "evaluations.jsonl", "data.json", "speculation.json", "plain.json", "layers_needed.json",
    ):  # fmt: skip
        (folder / name).unlink()
    page = build_page(read_run(folder))
    parsed = Balanced(page)
    assert "figure-training_loss" in parsed.labels
    assert "figure-perplexity_by_exit" not in parsed.labels
    assert f"layerskip sweep --workdir=&#x27;{folder}&#x27;" in page
    assert "layerskip train --workdir=" in page
    assert "layerskip inspect --workdir=" in page


def test_sparse_pieces_do_not_crash(tmp_path):
    folder = make_run(tmp_path / "run", small_config(layers=1))
    (folder / "metrics.jsonl").write_text(
        json.dumps({"step": 3, "loss": float("nan"), "exit_loss": {"1": None}}) + "\n"
    )
    (folder / "evaluations.jsonl").write_text('{"step": 3, "exits": [{"layers": 1, "loss": 2.0}]}')
    (folder / "plain.json").write_text('{"exits": []}')
    pairs = [{"exit_layer": 1, "draft_length": 2}, {"exit_layer": 1}, "odd"]
    (folder / "speculation.json").write_text(json.dumps({"pairs": pairs, "best": None}))
    needed = {"tokens": 3, "layers": 2, "settled": {"mean": 1.5}, "beside": "odd"}
    (folder / "layers_needed.json").write_text(json.dumps(needed))
    page = build_page(read_run(folder))
    Balanced(page)
    assert "7.39" in page  # exp(2)


@pytest.mark.parametrize(
    "early_exit", [{"curriculum": "all"}, {"curriculum": "gradual"}, {"curriculum": "last"}]
)
def test_every_curriculum_has_its_schedules(tmp_path, early_exit):
    page = build_page(read_run(make_run(tmp_path / "run", small_config(4, 30, **early_exit))))
    labels = Balanced(page).labels
    assert "figure-drop_probability" in labels
    learns = early_exit["curriculum"] != "last"
    assert ("figure-exit_weights" in labels) == learns


def test_text_from_the_user_is_escaped(tmp_path):
    evil = '<b onclick="x">&$\\alpha$'
    config = small_config()
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=evil))
    folder = make_run(tmp_path / "<i>run", config)
    plain = json.loads((folder / "plain.json").read_text())
    (folder / "plain.json").write_text(json.dumps({**plain, "label": evil}))
    (folder / "data.json").write_text(json.dumps({evil: evil}))
    needed = json.loads((folder / "layers_needed.json").read_text())
    needed["beside"][0]["model"] = needed["classes"][0]["class"] = evil
    (folder / "layers_needed.json").write_text(json.dumps(needed))
    page = build_page(read_run(folder))
    parsed = Balanced(page)
    assert "<b " not in page and "<i>" not in page
    assert evil in parsed.words


def test_command_writes_the_page_and_nothing_else(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("layerskip_jax.report.page.build_page", lambda run: "<p>a page</p>")
    folder = make_run(tmp_path / "run", small_config())
    before = {path.name for path in folder.iterdir()}
    assert main([f"--workdir={folder}"]) == 0
    assert {path.name for path in folder.iterdir()} - before == {"report.html"}
    assert str(folder / "report.html") in capsys.readouterr().out
    other = tmp_path / "elsewhere.html"
    assert main([f"--workdir={folder}", f"--output={other}"]) == 0
    assert other.read_text() == (folder / "report.html").read_text() == "<p>a page</p>"


def test_user_errors_name_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr("layerskip_jax.report.page.build_page", lambda run: "<p>a page</p>")
    with pytest.raises(UserError, match="holds no run"):
        write_report(tmp_path)
    folder = make_run(tmp_path / "run", small_config())
    with pytest.raises(UserError, match="cannot be written"):
        write_report(folder, tmp_path / "missing" / "page.html")
    (folder / "speculation.json").write_text("{")
    with pytest.raises(UserError, match="speculation.json is not JSON"):
        write_report(folder)
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="layerskip train"):
        write_report(folder)


def test_save_figure(tmp_path):
    folder = make_run(tmp_path / "run", small_config())
    svg = save_figure(folder, "perplexity_by_exit", tmp_path / "figure.svg")
    assert "unigram baseline" in svg.read_text()
    png = save_figure(folder, "perplexity_by_exit", tmp_path / "figure.png")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figure.png", "figure.svg", "run"]
    with pytest.raises(UserError, match="Did you mean 'perplexity_by_exit'"):
        save_figure(folder, "perplexity_by_exits", tmp_path / "figure.svg")
    with pytest.raises(UserError, match="must end in"):
        save_figure(folder, "throughput", tmp_path / "figure.gif")
    (folder / "evaluations.jsonl").unlink()
    with pytest.raises(UserError, match="No evaluation"):
        save_figure(folder, "perplexity_by_exit", tmp_path / "figure.svg")

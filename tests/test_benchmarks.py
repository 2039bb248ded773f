"""The benchmarks run and report what they promise; no wall-clock time is asserted."""

import argparse
import dataclasses
import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.request import Request, urlopen

import jax
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import ablation  # noqa: E402
import attention  # noqa: E402
import decode  # noqa: E402
import feed  # noqa: E402
import frontier  # noqa: E402
import guards  # noqa: E402
import harness  # noqa: E402
import mount  # noqa: E402
import policies  # noqa: E402
import prepare as prepare_benchmark  # noqa: E402
import train_mfu  # noqa: E402
import train_step  # noqa: E402
import width_transfer  # noqa: E402

from layerskip_jax.config import RunConfig, TrainingConfig  # noqa: E402
from layerskip_jax.language_model import load  # noqa: E402
from layerskip_jax.model.transformer import Transformer  # noqa: E402
from layerskip_jax.run_folder.exit_policies import store_policy  # noqa: E402
from layerskip_jax.run_folder.paths import RunFolder  # noqa: E402
from layerskip_jax.schema import UserError  # noqa: E402
from layerskip_jax.training.setup import make_setup  # noqa: E402
from tests.helpers import run_with_full_effort, small_model  # noqa: E402


@pytest.fixture
def tiny(monkeypatch):
    """The settings of the step benchmark with the same variants on a small model."""
    full = train_step.settings("cpu")

    def settings(device, quick=False):
        assert device == "cpu"
        keep = {
            "layers": ["gather p_max=0.6", "mask p_max=0.6", "dont_drop"],
            "exits": ["dont_drop"],
            "layerskip": ["layerskip", "layerskip quarter tokens"],
        }
        return {
            name: train_step.Setting(
                full[name].about, small_model(remat="full"), 16, 12,
                {v: full[name].variants[v] for v in variants},
            )
            for name, variants in keep.items()
        }  # fmt: skip

    monkeypatch.setattr(train_step, "settings", settings)


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Runs a benchmark's main with these arguments; returns its figures, as the file has them."""

    def run(module, *arguments: str) -> dict:
        file = tmp_path / "figures.json"
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", f"--json={file}", *arguments])
        assert module.main() == 0
        return json.loads(file.read_text())

    return run


def test_every_benchmark_starts_from_any_folder(tmp_path):
    """By its path alone: in one process, as starting jax for each would take seconds."""
    no_benchmarks = ("harness", "prompts", "doctests", "tokenize_by")
    names = sorted(p.name for p in BENCHMARKS.glob("*.py") if p.stem not in no_benchmarks)
    assert names == [
        "ablation.py", "attention.py", "decode.py", "feed.py", "frontier.py", "guards.py",
        "mount.py", "policies.py", "prepare.py", "train_mfu.py", "train_step.py",
        "width_transfer.py",
    ]  # fmt: skip
    script = tmp_path / "all.py"
    script.write_text(
        "import contextlib, os, runpy, sys\n"
        f"folder, names = {str(BENCHMARKS)!r}, {names!r}\n"
        "sys.path[0] = folder  # as `python FILE` has it\n"
        "for name in names:\n"
        "    sys.argv = [name, '--help']\n"
        "    print(name)\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        runpy.run_path(os.path.join(folder, name), run_name='__main__')\n"
        "assert sys.path[0] == os.path.dirname(folder)  # and not what may be installed\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for text in done.stdout.split("usage: ")[1:]:
        assert "--quick" in text and "--json" in text
    assert done.stdout.count("usage: ") == len(names)


@pytest.fixture
def some_bench(tmp_path):
    """A benchmark of two things, and the file of its figures."""
    file = tmp_path / "figures.json"
    return harness.Bench(harness.parse(harness.parser("x"), [f"--json={file}"])), file


def test_figures_are_kept_and_printed_as_they_come(some_bench, capsys):
    bench, file = some_bench
    with pytest.raises(KeyboardInterrupt), bench:
        bench.expect(2)
        bench.begin("the first")
        bench.add({"small": 0.00123, "large": 12345.678, "count": 1000})
        assert json.loads(file.read_text()) == {"small": 0.00123, "large": 12345.678, "count": 1000}
        bench.begin("the second")
        raise KeyboardInterrupt
    assert json.loads(file.read_text())["small"] == 0.00123
    assert [path.name for path in file.parent.iterdir()] == [file.name]  # no temporary is left
    out, err = capsys.readouterr()
    assert out.splitlines()[1:] == ["small: 0.00123", "large: 12,345.678", "count: 1,000"]
    assert re.search(r"1/2 after \d+ s: the first\n2/2 after \d+ s: the second\n", err)
    assert f"{file} has the 3 figures so far" in err
    assert not any(ord(c) < 32 and c != "\n" for c in out + err)  # what a log file would hold


def test_a_terminal_gets_a_bar_and_a_file_beside_it_none_of_it(some_bench, monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    _, file = some_bench
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with harness.Bench(harness.parse(harness.parser("x"), [f"--json={file}"])) as bench:
        bench.expect(2)
        for what in ("the first", "the second"):
            bench.begin(what)
        bench.add({"figure": 2.0})
    drawn = sys.stderr.getvalue()
    assert "\x1b[" in drawn and "2/2" in drawn and "the second" in drawn
    out = capsys.readouterr().out
    assert out.endswith("figure: 2.000\n") and "\x1b" not in out


def test_options_that_would_fail_at_the_end_are_refused_at_once(tmp_path, capsys):
    parser = harness.parser("x", rounds=(6, 3))
    assert harness.parse(parser, []).rounds == 6
    assert harness.parse(parser, ["--quick"]).rounds == 3
    assert harness.parse(parser, ["--quick", "--rounds=2"]).rounds == 2
    for argument, message in {
        "--rounds=0": "--rounds=0: give 1 or more",
        f"--json={tmp_path}/none/x.json": f"make the folder {tmp_path}/none first",
    }.items():
        with pytest.raises(SystemExit):
            harness.parse(parser, [argument])
        assert message in capsys.readouterr().err


def test_a_quick_look_at_the_step_has_the_names_of_the_full_one():
    full, quick = (train_step.settings("cpu", quick=flag) for flag in (False, True))
    assert {name: list(s.variants) for name, s in full.items()} == {
        name: list(s.variants) for name, s in quick.items()
    }
    for name in full:
        rows = [s[name].batch_size * s[name].sequence_length for s in (full, quick)]
        assert rows[1] < rows[0] and quick[name].model.model_dim < full[name].model.model_dim
    assert train_step.settings("gpu", quick=True) == train_step.settings("gpu")


def test_a_quick_look_at_decoding_has_the_names_of_the_full_one():
    """They are made of the exits' shares of the layers, and nothing else of the model."""
    full, quick = (decode.random_model(False, quick=flag) for flag in (False, True))
    assert quick.model_dim < full.model_dim
    for shares in (4, 8):
        assert full.num_layers % shares == quick.num_layers % shares == 0


@pytest.mark.slow
def test_the_step_benchmark_writes_the_named_figures(tiny, bench, monkeypatch, capsys):
    monkeypatch.setattr(
        train_step, "fused_against_naive", lambda gpu, rounds: {"fused_over_naive_time": 1}
    )
    figures = bench(train_step, "--quick", "--rounds=2")
    for name in (
        "gather_pmax0.6_over_plain",
        "layerskip_over_plain",
        "layerskip_quarter_tokens_over_plain",
        "layerskip_memory_over_plain",
        "worst_measured_over_arithmetic",
        "dont_drop_over_plain",
        "fused_over_naive_time",
    ):
        assert figures[name] > 0
    assert figures["layers/plain/arithmetic"] == pytest.approx(1)
    assert figures["layers/mask p_max=0.6/arithmetic"] == pytest.approx(1)
    assert figures["layers/gather p_max=0.6/arithmetic"] < 1
    quotients = [v for k, v in figures.items() if k.endswith("/quotient")]
    assert figures["worst_measured_over_arithmetic"] == max(quotients)
    assert "gather p_max=0.6" in capsys.readouterr().out


def test_the_fused_loss_needs_a_tenth_of_the_naive_memory_at_full_scale():
    """Five exits, T 8192, D 2048, V 128k: compiled, not run."""
    fused, naive = (
        train_step.compile_loss(loss, 8, 1024, 2048, 131072, "bfloat16")
        for loss in (train_step.fused_loss, train_step.naive_loss)
    )
    ours, theirs = (p.memory_analysis().temp_size_in_bytes for p in (fused, naive))
    assert ours < theirs / 10


def _some_modules(folder: Path) -> Path:
    """Copies a hundred modules of the standard library into `folder`, and returns it."""
    folder.mkdir()
    for path in sorted(Path(json.__file__).parents[1].glob("*.py"))[:100]:
        (folder / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    return folder


@pytest.mark.slow
def test_every_way_to_run_fewer_layers_is_in_one_table(
    bench, finished, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(policies, "BATCHES", (2,))
    monkeypatch.setattr(policies, "STOP_BELOW", (0.5,))
    monkeypatch.setattr(policies, "DRAFT_MODEL_LENGTHS", (2,))
    run = RunFolder(shutil.copytree(finished, tmp_path / "run"))
    entry = {"policy": "margin", "kv": "propagate", "exits": [2], "threshold": 0.01, "step": 12}
    store_policy(run, entry)
    found = tmp_path / "found.json"
    found.write_text(json.dumps({**entry, "risk": 0.05}))
    ways, missing = policies.ways_of(load(run.path), (2,), [json.loads(found.read_text())])
    assert "margin, propagate, risk 0.05" in ways and not missing
    best = {"exit_layer": 1, "draft_length": 2, "speedup": 1.2}
    run.speculation_file.write_text(json.dumps({"best": best}))
    figures = bench(
        policies, f"--workdir={run.path}", f"--draft-model={run.path}", "--exits=2", "--rounds=1",
        "--quick", "--prompt-tokens=4", "--new-tokens=6", f"--svg={tmp_path / 'ways.svg'}",
    )  # fmt: skip
    ways = [
        "plain", "exit 2", "margin, propagate", "drafts 1,2", "drafts 1,2 stop below 0.5", "auto",
        "draft model, 2",
    ]  # fmt: skip
    exact = [way for way in ways if way.startswith(("plain", "draft", "auto"))]
    of = {way: {k.split("/")[2]: v for k, v in figures.items() if f"/{way}/" in k} for way in ways}
    for way in exact:
        assert of[way]["equal_tokens"] == 1
        assert of[way]["perplexity"] == of["plain"]["perplexity"] > 1
    assert of["plain"]["layers"] == 4 and of["exit 2"]["layers"] == 2
    assert 2 <= of["margin, propagate"]["layers"] <= 4
    assert of["plain"]["speed_over_plain"] == 1
    printed = capsys.readouterr().out
    assert "entropy, propagate is left out" in printed
    assert all(way in printed for way in ways)
    assert "<svg" in (tmp_path / "ways.svg").read_text()


def test_the_frontier_turns_a_dial_at_a_time_and_tabulates_what_it_does(
    tmp_path, capsys, monkeypatch
):
    some = ("the recipe", "all exits")
    monkeypatch.setattr(frontier, "DIALS", {name: frontier.DIALS[name] for name in some})
    workdir = tmp_path / "frontier"
    arguments = [
        "--quick",
        f"--workdir={workdir}",
        f"--source={_some_modules(tmp_path / 'corpus')}",
        "--config.training.steps=4",
        "--config.model.num_layers=4",
        "--config.model.model_dim=32",
        "--config.model.ffn_dim=64",
    ]
    assert frontier.main(arguments) == 0
    figures = json.loads((workdir / "quickstart.json").read_text())
    for dial in some:
        assert figures[f"{dial}/last_perplexity"] > 1
        for layers in (1, 2):  # an eighth of four layers is one of them
            assert figures[f"{dial}/perplexity_exit_{layers}"] > 1
            assert 0 <= figures[f"{dial}/accepted_exit_{layers}"] <= 1
    # the recipe has two early exits learn; with all on, each step scores three
    assert figures["all exits/flops_over_plain"] > figures["the recipe/flops_over_plain"] > 1
    assert (workdir / "quickstart.svg").read_text().lstrip().startswith("<?xml")
    assert "all exits" in capsys.readouterr().out
    done = [*workdir.glob("*/*/metrics.jsonl"), *workdir.glob("*/*/speculation.json")]
    stamps = {path: path.stat().st_mtime_ns for path in done}
    assert len(stamps) == 4
    assert frontier.main(arguments) == 0  # done runs are not run again
    assert {path: path.stat().st_mtime_ns for path in done} == stamps


@pytest.mark.slow
def test_the_sweep_of_widths_finds_the_best_rates_and_draws_them(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(width_transfer, "QUICK_STEPS", 4)
    workdir = tmp_path / "widths"
    arguments = [
        "--quick", "--optimizer=muon", f"--workdir={workdir}",
        f"--source={_some_modules(tmp_path / 'corpus')}",
    ]  # fmt: skip
    assert width_transfer.main(arguments) == 0
    figures = json.loads((workdir / "muon.json").read_text())
    low, high = (f"{rate:g}" for rate in width_transfer.QUICK_RATES)
    for way in width_transfer.WAYS:
        for width in width_transfer.QUICK_WIDTHS:
            by_rate = [figures[f"{way}/{width}/{rate}/last_loss"] for rate in (low, high)]
            best = figures[f"{way}/{width}/best_rate_of_last"]
            assert f"{best:g}" == (low, high)[int(np.argmin(by_rate))]
    narrow = [figures[f"{way}/64/{low}/middle_loss"] for way in width_transfer.WAYS]
    wide = [figures[f"{way}/128/{low}/middle_loss"] for way in width_transfer.WAYS]
    assert narrow[0] == narrow[1] and wide[0] != wide[1]
    carried = json.loads((workdir / f"muon/carried-128-{low}/config.json").read_text())
    assert carried["optimizer"]["width_transfer"] == 64
    assert "carried over" in capsys.readouterr().out
    assert (workdir / "muon.svg").read_text().lstrip().startswith("<?xml")


@pytest.mark.slow
def test_the_ablation_trains_five_variants_and_tabulates_them(tmp_path, capsys):
    corpus = _some_modules(tmp_path / "corpus")
    arguments = [
        f"--workdir={tmp_path / 'ablation'}",
        f"--source={corpus}",
        "--steps=6",
        "--config.model.num_layers=4",
        "--config.model.model_dim=32",
        "--config.training.evaluate_every=3",
        "--config.layer_dropout.row_groups=8",  # the tests have eight devices
        "--config.training.log_every=1",
    ]
    assert ablation.main(arguments) == 0
    folder = tmp_path / "ablation"
    figures = json.loads((folder / "ablation.json").read_text())
    assert figures["steps"] == 6
    assert figures["plain/middle_over_plain"] == 1
    for variant in ablation.VARIANTS:
        assert figures[f"{variant}/perplexity_exit_4"] > 1
    assert figures["exits/flops_over_plain"] > 1 > figures["dont_drop/flops_over_plain"]
    assert (folder / "ablation.svg").read_text().lstrip().startswith("<?xml")
    assert "both" in capsys.readouterr().out
    # done runs are not run again
    stamps = {p: p.stat().st_mtime_ns for p in folder.glob("*/metrics.jsonl")}
    assert len(stamps) == 5
    assert ablation.main(arguments) == 0
    assert {p: p.stat().st_mtime_ns for p in folder.glob("*/metrics.jsonl")} == stamps


def test_a_misspelt_variant_of_the_ablation_is_refused(capsys):
    from layerskip_jax.cli import main

    config = Path(ablation.CONFIG)
    assert main(["train", "--workdir=unused", f"--config={config}:bothh"]) == 2
    assert "'bothh' is none of plain, dropout, exits, both, dont_drop" in capsys.readouterr().err


def test_the_formula_of_the_speed_up_by_hand():
    # a = .8, G = 4: 3.3616 tokens for 5 drafts of a quarter each and three quarters of a pass
    assert decode.speedup_formula(0.8, 0.25, 0.0, 4) == pytest.approx(3.3616 / 2)
    # docs/method.md, section 4: the head at 21% of the weights, E = 4 of 16, a = .8
    best = max(decode.speedup_formula(0.8, 0.25, 0.21, length) for length in range(1, 9))
    assert best == pytest.approx(1.34, abs=0.005)
    assert decode.speedup_formula(1.0, 0.5, 0.0, 1) == pytest.approx(2 / 1.5)


@pytest.mark.slow
def test_the_decoding_benchmark_writes_the_named_figures(bench, monkeypatch):
    small = small_model(num_layers=8, max_sequence_length=128)
    monkeypatch.setattr(decode, "random_model", lambda gpu, quick: small)
    figures = bench(decode, "--rounds=1", "--new-tokens=8")
    for name in (
        "plain_over_bandwidth",
        "plain_over_transformers",
        "selfspec_over_plain",
        "selfspec_over_formula",
        "selfspec_over_assistant_early_exit",
        "auto_over_plain_untrained",
        "auto_over_best_pair",
    ):
        assert figures[name] > 0


@pytest.mark.slow
def test_drafted_tokens_part_from_plain_ones_in_bfloat16_at_near_ties_only():
    code = (
        "import json; from tests.test_benchmarks import _near_ties; print(json.dumps(_near_ties()))"
    )
    figures = json.loads(run_with_full_effort("-c", code))
    assert figures["float32/equal_sequences"] == 1
    assert figures["bfloat16/largest_margin_at_mismatch"] <= figures["noise"]
    assert 0 < figures["bfloat16/equal_sequences"] <= 1


def _near_ties():
    """Returns the benchmark's figures of exactness, and how far bfloat16 moves the margins."""
    config = small_model(num_layers=8, vocab_size=512, max_sequence_length=128)
    rounded = dataclasses.replace(config, dtype="bfloat16")
    prompts = np.random.default_rng(2).integers(0, 512, (64, 80)).tolist()
    in_float32, in_bfloat16 = (
        decode.margins(Transformer(c, jax.random.key(0)), prompts, prompts)
        for c in (config, rounded)
    )
    noise = float(np.abs(in_float32 - in_bfloat16).max())
    return decode.exactness(config, 48) | decode.exactness(rounded, 48) | {"noise": noise}


def test_the_benchmark_of_the_guards_writes_its_figures(tiny, bench, monkeypatch):
    monkeypatch.setattr(guards, "settings", train_step.settings)
    figures = bench(guards, "--rounds=2", "--host-steps=20")
    assert figures["step_seconds"] > 0 and figures["host_seconds_per_step"] > 0
    parts = figures["guarded_over_bare_step"] - 1 + figures["host_over_step"]
    assert figures["cost_of_guards_and_metrics"] == pytest.approx(parts)


def test_the_benchmark_of_the_feed_reads_as_a_run_does(bench, tmp_path, monkeypatch, capsys):
    texts = _some_modules(tmp_path / "texts")
    for name, value in {
        "SOURCE": str(texts), "LENGTHS": (32, 64), "THREADS": (1, 2), "SHARD_BYTES": 64 << 10,
        "LEAST_WINDOWS": 300, "SAMPLE": 64, "QUICK_SECONDS": 0.01,
    }.items():  # fmt: skip
        monkeypatch.setattr(feed, name, value)
    # Reading cold is for machines of one's own.
    monkeypatch.setattr(feed, "DROP_CACHES", tmp_path / "none" / "drop_caches")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    figures = bench(feed, "--quick", "--rounds=1", "--shards=60", f"--folder={tmp_path}")
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == before
    for length in (32, 64):
        rates = [figures[f"{length}/warm/{threads}_threads"] for threads in (1, 2)]
        asked = figures[f"{length}/v5p_host_asks"]
        assert figures[f"{length}/fed_over_asked"] == pytest.approx(max(rates) / asked)
        assert not any(key.startswith(f"{length}/cold") for key in figures)
        for part in ("order", "record", "record, uncompressed", "copy", "unpack"):
            assert figures[f"{length}/microseconds/{part}"] > 0
        assert figures[f"{length}/kilobytes_uncompressed"] >= figures[f"{length}/kilobytes"] > 0
        assert figures[f"{length}/wait_ms/at_demand"] > 0
    assert figures["shards/few_open/open"] <= figures["shards/few_open/may_be_open"] + 2 == 34
    assert figures["shards/ulimit/windows_per_second"] > 0
    assert "cold reading is left out" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["texts"]


def test_what_a_host_asks_for_is_its_flops_over_those_of_a_window():
    """Six a parameter and token, and attention: 1.57e9 without the embedding, 2,048 tokens."""
    parameters = 24 * (4 * 2048**2 + 3 * 2048 * 5504) + 2048 * 32_000
    plain = 6 * parameters * 2048 + 24 * 3 * 4 * 2048 * 2049 / 2 * 2048
    asked = feed.asked_for(2048)
    # The recipe drops a few layers and scores 1.8 exits more.
    assert asked == pytest.approx(4 * 459e12 / 2 / plain, rel=0.1)
    assert asked < 4 * 459e12 / 2 / (6 * parameters * 2048)


def few_windows(folder, *_):
    """Shards of five windows in place of those of the standard library."""
    folder.mkdir(parents=True)
    for shard in range(2):
        writer = ArrayRecordWriter(str(folder / f"train-{shard:05d}.array_record"), "group_size:1")
        for number in range(5):
            writer.write(bytes([shard, number]) * 4)
        writer.close()


def test_reading_takes_each_window_once(tmp_path, monkeypatch):
    few_windows(tmp_path / "data")
    taken, read_one = [], mount.Shards.__getitem__
    monkeypatch.setattr(
        mount.Shards, "__getitem__", lambda self, at: taken.append(at) or read_one(self, at)
    )
    figures = mount.read(tmp_path / "data", threads=3, seconds=60, seed=0)
    assert sorted(taken) == list(range(10)) != taken
    assert 0 < figures["wait_ms_median"] <= figures["wait_ms_99_percent"]


def test_the_benchmark_of_mounts_measures_a_folder(bench, tmp_path):
    few_windows(tmp_path / "data")
    figures = bench(mount, "--quick", f"--data={tmp_path / 'data'}")
    assert len(figures) == 6 and all(figure > 0 for figure in figures.values())
    with pytest.raises(UserError, match="--data=.*has no train-"):
        bench(mount, f"--data={tmp_path}")


def test_without_a_way_to_mount_the_disk_is_measured_alone(bench, monkeypatch, capsys):
    monkeypatch.setattr(mount, "write_windows", few_windows)
    monkeypatch.setattr(mount.shutil, "which", lambda _: None)
    figures = bench(mount, "--quick")
    assert {name.split("/")[1] for name in figures} == {"disk"}
    assert "mounts are left out: there is no rclone here" in capsys.readouterr().out


def test_the_stand_in_for_a_bucket_answers_in_parts(tmp_path):
    (tmp_path / "file").write_bytes(bytes(range(100)))
    answers = {}
    # In a thread, as a process of its own takes seconds to start.
    with mount.bucket_server(tmp_path, latency=0) as server, ThreadPoolExecutor(1) as pool:
        pool.submit(server.serve_forever, 0.01)
        address = f"http://127.0.0.1:{server.server_address[1]}"
        for span in ("bytes=2-4", "bytes=98-", "bytes=98-1000", ""):
            headers = {"Range": span} if span else {}
            with urlopen(Request(f"{address}/file", headers=headers)) as answer:
                answers[span] = answer.status, answer.headers["Content-Range"], answer.read()
        with urlopen(address) as answer:
            assert b'href="file"' in answer.read()
        server.shutdown()
    end = (206, "bytes 98-99/100", bytes([98, 99]))
    assert answers["bytes=2-4"] == (206, "bytes 2-4/100", bytes([2, 3, 4]))
    assert answers["bytes=98-"] == answers["bytes=98-1000"] == end
    assert answers[""] == (200, None, bytes(range(100)))


@pytest.mark.slow
def test_the_mfu_benchmark_compares_with_transformers(bench, monkeypatch, capsys):
    full = train_mfu.setting(gpu=False)
    small = dataclasses.replace(full.model, num_layers=2, model_dim=64, ffn_dim=64, vocab_size=64)
    monkeypatch.setattr(
        train_mfu, "setting", lambda gpu: dataclasses.replace(full, model=small, sequence_length=16)
    )
    figures = bench(train_mfu, "--quick", "--rounds=2", "--peak-tflops=1")
    assert figures["attention"] == "xla"
    for remat in ("none", "full"):
        for name in (
            "layerskip_over_plain",
            "plain_over_transformers_speed",
            "layerskip_over_transformers_speed",
            "plain/mfu",
            "layerskip/seconds",
            "transformers/needed_flops_per_second",
        ):
            assert figures[f"{remat}/{name}"] > 0
    assert figures["plain_over_transformers_speed"] == figures["none/plain_over_transformers_speed"]
    assert "full/plain_over_transformers_speed" in capsys.readouterr().out


def test_attention_is_held_to_the_definition_at_every_window_and_timed(bench, monkeypatch, capsys):
    sizes = attention.Shape(512, (256,), (0, 30), 4, 2, 16, "float32")
    monkeypatch.setattr(attention, "shape", lambda gpu, quick: sizes)
    figures = bench(attention, "--setting=kernels", "--rounds=1")
    for mask in ("joined", "packed"):
        for window in (0, 30):
            name = f"kernels/{mask}/xla/S 256/window {window}"
            assert figures[f"kernels/{mask}/window {window}/auto"] == "xla"
            assert 0 < figures[f"{name}/error"] < 2e-6
            assert figures[f"{name}/forward_seconds"] > 0
        assert figures[f"kernels/{mask}/xla/S 256/window 0/both_over_full"] == 1
        assert figures[f"{name}/both_over_full"] > 0
    assert "packed/xla/S 256/window 30" in capsys.readouterr().out


@pytest.mark.parametrize("window, packed", [(29, True), (31, True), (0, True), (30, False)])
def test_the_error_of_attention_shows_a_key_too_many_or_too_few(window, packed):
    sizes = attention.Shape(256, (256,), (), 4, 2, 16, "float32")
    inputs = attention.draw(sizes, 256)
    expected = attention.reference(inputs, True, 30)
    case = attention.compile_case("x", "xla", packed, window, inputs, expected)
    assert case.error > 0.05


def test_every_kernel_that_a_device_has_is_measured_at_what_it_can_do():
    def of(platform, *how):
        return attention.available(platform, attention.shape(platform != "cpu", False), *how)

    assert of("gpu", True, 0) == ["triton", "xla", "cudnn"]  # the one of `auto` first
    assert set(of("gpu", True, 128)) == {"cudnn", "xla"}  # triton refuses windows
    assert of("gpu", False, 128) == ["cudnn", "xla"]
    assert of("tpu", True, 128) == ["splash", "xla"]
    assert of("cpu", True, 128) == ["xla"]


@pytest.mark.slow
def test_a_step_with_windows_is_set_against_one_without(bench, monkeypatch):
    full = attention.step_setting(gpu=False, quick=True)
    changes = {"max_sequence_length": 512, "model_dim": 64, "ffn_dim": 64, "num_layers": 4}
    small = dataclasses.replace(
        full, model=dataclasses.replace(full.model, **changes), sequence_length=512,
        variants={
            name: {"model": dataclasses.replace(full.variants[name]["model"], **changes)}
            for name in ("window", "window in 3 of 4")
        },
    )  # fmt: skip
    monkeypatch.setattr(attention, "step_setting", lambda gpu, quick: small)
    figures = bench(attention, "--setting=steps", "--rounds=1")
    assert figures["steps/window/attention"] == "xla"
    some, every = (figures[f"steps/{n}/arithmetic"] for n in ("window in 3 of 4", "window"))
    assert every < some < 1 == figures["steps/plain/arithmetic"]


def test_a_cpu_is_compared_at_the_shape_that_the_docs_name():
    setting = train_mfu.setting(gpu=False)
    model, rows = setting.model, (setting.batch_size, setting.sequence_length)
    assert (model.num_layers, model.model_dim, model.ffn_dim) == (8, 512, 1408)
    assert (model.num_heads, model.num_kv_heads, model.vocab_size) == (8, 8, 8192)
    assert (model.dtype, rows) == ("float32", (8, 256))
    assert train_mfu.remats(gpu=False) == ("none", "full")


def test_packed_windows_hold_several_documents():
    setting = train_mfu.setting(gpu=False)
    training = TrainingConfig(batch_size=setting.batch_size)
    setup = make_setup(RunConfig(model=setting.model, training=training), jax.devices()[:1])
    with jax.set_mesh(setup.mesh):
        batch = jax.device_get(train_mfu.packed_batch(setting, setup, 0))
    segments, positions = batch.segment_ids[0], batch.positions[0]
    starts = np.diff(segments, axis=1, prepend=0) != 0
    assert (starts.sum(axis=1) == train_mfu.DOCUMENTS).all()
    assert (positions[starts] == 0).all() and positions.max() < setting.sequence_length
    assert not batch.valid[0][np.diff(segments, axis=1, append=0) != 0].any()


def test_prepare_is_measured_beside_other_ways_on_the_same_text(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_benchmark, "FILE_BYTES", 60_000)
    source = tmp_path / "text"
    source.mkdir()
    for number in range(3):
        (source / f"{number}.c").write_text(f"int f{number}() {{ return {number}; }}\n" * 40)
    (source / "no text").write_bytes(b"\xff\xfe")
    figures = bench(
        prepare_benchmark, "--quick", f"--source={source}", "--size=0.0002", "--cores=2",
        "--vocab-size=300", "--ways=prepare,megatron",
    )  # fmt: skip
    assert figures["text_bytes"] >= 200_000
    assert figures["documents"] == pytest.approx(200_000 / (40 * 24), rel=0.1)
    for way in ("limit", "prepare", "megatron"):
        assert figures[f"{way}/tokens"] == figures["tokens"] > 0
        assert figures[f"{way}/tokens_per_second"] > 0 and figures[f"{way}/over_limit"] > 0
    assert figures["limit/over_limit"] == 1
    assert figures["prepare/disk_over_text"] > 0 and figures["prepare/processor_seconds"] > 0


def test_text_for_prepare_has_no_copies(tmp_path):
    source = tmp_path / "text"
    source.mkdir()
    (source / "a.py").write_text("first\nsecond\nthird\n")
    options = argparse.Namespace(source=str(source), size=1e-7, cores=1)
    size, documents = prepare_benchmark.write_text(options, tmp_path / "made")
    texts = list(prepare_benchmark._texts(tmp_path / "made"))
    assert len(texts) == documents == len(set(texts)) and size == sum(map(len, texts)) >= 100


def test_links_to_one_file_are_counted_once(tmp_path):
    (tmp_path / "a").write_bytes(b"0123456789")
    (tmp_path / "b").hardlink_to(tmp_path / "a")
    assert prepare_benchmark.disk_of(tmp_path) == 10
    memory = prepare_benchmark.tree_memory(os.getpid())
    assert memory > 1 << 20

"""The benchmarks run and report what they promise; no wall-clock time is asserted."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import ablation  # noqa: E402
import decode  # noqa: E402
import guards  # noqa: E402
import train_mfu  # noqa: E402
import train_step  # noqa: E402

from layerskip_jax.model.transformer import Transformer  # noqa: E402
from tests.helpers import small_model  # noqa: E402


@pytest.fixture
def tiny(monkeypatch):
    """The settings of the step benchmark with the same variants on a small model."""
    full = train_step.settings("cpu")

    def settings(device):
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


def test_the_step_benchmark_writes_the_named_figures(tiny, tmp_path, monkeypatch, capsys):
    file = tmp_path / "figures.json"
    arguments = ["train_step.py", "--rounds=2", f"--json={file}"]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(train_step, "fused_against_naive", lambda gpu: {"fused_over_naive_time": 1})
    assert train_step.main() == 0
    figures = json.loads(file.read_text())
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


@pytest.mark.slow
def test_the_ablation_trains_five_variants_and_tabulates_them(tmp_path, capsys):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    library = Path(json.__file__).parents[1]
    for path in sorted(library.glob("*.py"))[:100]:
        (corpus / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    arguments = [
        f"--workdir={tmp_path / 'ablation'}",
        f"--source={corpus}",
        "--steps=6",
        "--config.model.num_layers=4",
        "--config.model.model_dim=32",
        "--config.training.evaluate_every=3",
        "--config.layer_dropout.groups=8",  # the tests have eight devices
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
def test_the_decoding_benchmark_writes_the_named_figures(tmp_path, monkeypatch):
    file = tmp_path / "figures.json"
    monkeypatch.setattr(
        decode, "random_model", lambda gpu: small_model(num_layers=8, max_sequence_length=128)
    )
    arguments = ["decode.py", "--rounds=1", "--new-tokens=8", f"--json={file}"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert decode.main() == 0
    figures = json.loads(file.read_text())
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
    config = small_model(num_layers=8, vocab_size=512, max_sequence_length=128)
    exact = decode.exactness(config, 48)
    assert exact["float32/equal_sequences"] == 1
    rounded = dataclasses.replace(config, dtype="bfloat16")
    figures = decode.exactness(rounded, 48)
    prompts = np.random.default_rng(2).integers(0, 512, (64, 80)).tolist()
    in_float32, in_bfloat16 = (
        decode.margins(Transformer(c, jax.random.key(0)), prompts, prompts)
        for c in (config, rounded)
    )
    noise = np.abs(in_float32 - in_bfloat16).max()
    assert figures["bfloat16/largest_margin_at_mismatch"] <= noise
    assert 0 < figures["bfloat16/equal_sequences"] <= 1


def test_the_benchmark_of_the_guards_writes_its_figures(tiny, tmp_path, monkeypatch):
    file = tmp_path / "figures.json"
    arguments = ["guards.py", "--rounds=2", "--host-steps=20", f"--json={file}"]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(guards, "settings", train_step.settings)
    assert guards.main() == 0
    figures = json.loads(file.read_text())
    assert figures["step_seconds"] > 0 and figures["host_seconds_per_step"] > 0
    parts = figures["guarded_over_bare_step"] - 1 + figures["host_over_step"]
    assert figures["cost_of_guards_and_metrics"] == pytest.approx(parts)


def test_the_mfu_benchmark_compares_with_transformers(tmp_path, monkeypatch, capsys):
    file = tmp_path / "figures.json"
    arguments = ["train_mfu.py", "--rounds=2", "--peak-tflops=1", f"--json={file}"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert train_mfu.main() == 0
    figures = json.loads(file.read_text())
    assert figures["attention"] == "xla"
    for name in ("layerskip_over_plain", "plain_over_transformers_speed", "plain/mfu"):
        assert figures[name] > 0
    assert "transformers" in capsys.readouterr().out


def test_packed_windows_hold_several_documents():
    setting = train_mfu.setting(gpu=False)
    plain = train_step.compile_variant(setting, "plain", {})
    with jax.set_mesh(plain.setup.mesh):
        batch = jax.device_get(train_mfu.packed_batch(setting, plain.setup, 0))
    segments, positions = batch.segment_ids[0], batch.positions[0]
    starts = np.diff(segments, axis=1, prepend=0) != 0
    assert (starts.sum(axis=1) == train_mfu.DOCUMENTS).all()
    assert (positions[starts] == 0).all() and positions.max() < setting.sequence_length
    assert not batch.valid[0][np.diff(segments, axis=1, append=0) != 0].any()

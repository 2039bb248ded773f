import ast
import dataclasses
import json
import math
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from layerskip_jax.cli import VERBS, main
from layerskip_jax.commands import plan
from layerskip_jax.config import (
    ConfigError,
    RunConfig,
    TrainingConfig,
    UserError,
    as_variant,
    default_config,
    differences,
    load_config,
    recipe_names,
)
from layerskip_jax.early_exit_loss import EarlyExitConfig, exit_weights
from layerskip_jax.layer_dropout import LayerDropoutConfig, drop_probabilities
from layerskip_jax.run_folder.claim import check_workdir
from layerskip_jax.run_folder.paths import RunFolder, open_run
from layerskip_jax.schema import SMALLEST_FLOAT32, new_names

LARGEST = (2 - 2**-23) * 2.0**127  # of float32
# Old names of settings, and their new ones.
RENAMED = new_names(RunConfig)
CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = [CONFIGS / f"{name}.py" for name in recipe_names()]


# What recipes say of their settings, and what the settings say of it.
FIGURES = {
    r"p_max (\.\d+)": lambda c: c.layer_dropout.p_max,
    r"mean probability is (\.\d+)": lambda c: np.mean(
        [drop_probabilities(c.layer_dropout, c.model.num_layers, t, 99) for t in range(99)]
    ),
    r"e_scale (\.\d+|\d)": lambda c: c.early_exit.e_scale,
    r"R = (\d+)": lambda c: c.early_exit.rotation_interval,
    r"every (fifth) layer": lambda c: {5: "fifth"}[c.early_exit.rotation_interval],
    r"(two) neighbours that move up": lambda c: {2: "two"}[_early_exits(c).max()],
    r"(\d\.\d) early exits a step": lambda c: _early_exits(c).mean(),
    r"([\d.]+)k steps": lambda c: c.training.steps / 1000,
    r"run of (\d+) steps": lambda c: c.training.steps,
    r"(\d+ GPUs with \d+) (?:sequences|samples) each": lambda c: c.training.batch_size,
    r"([\d.]+)B tokens": lambda c: _tokens(c) / 1e9,
    r"(?:at|(?<!back )to|and) (\de-\d)": lambda c: c.optimizer.learning_rate,
    r"(\d+) layers of width": lambda c: c.model.num_layers,
    r"layers of width (\d+)": lambda c: c.model.model_dim,
    r"on a (quarter) of the tokens": lambda c: {0.25: "quarter"}[c.early_exit.exit_token_fraction],
}


def _early_exits(config):
    """Returns how many exits below the last layer have a weight, at each step of a rotation."""
    layers = config.model.num_layers
    weights = [exit_weights(config.early_exit, layers, t, 10**6) for t in range(layers)]
    return (np.array(weights)[:, :-1] > 0).sum(axis=1)


def _tokens(config):
    return config.training.steps * config.training.batch_size * config.model.max_sequence_length


@pytest.mark.parametrize(
    "path",
    [path for path in RECIPES if path.stem != "ablation"],  # which tells of five variants
    ids=lambda path: path.name,
)
def test_a_recipe_says_of_itself_what_is_so(path):
    text = " ".join(ast.get_docstring(ast.parse(path.read_text())).split())
    config = load_config([f"--config={path}"])
    assert "one early exit a step" not in text
    for pattern, figure in FIGURES.items():
        for said in re.findall(pattern, text):
            if " GPUs with " in said:
                said = str(math.prod(map(int, said.split(" GPUs with "))))
            actual = figure(config)
            if isinstance(actual, str):
                assert said == actual, pattern
                continue
            last_digit = 10.0 ** -len(said.partition("e")[0].partition(".")[2])
            last_digit *= 10.0 ** int(said.partition("e")[2] or 0)
            assert abs(float(said) - actual) < 0.51 * last_digit, f"{pattern}: {said}, not {actual}"


def test_the_figures_of_recipes_are_found():
    """Each pattern in one recipe at least, or its figure is not checked any more."""
    texts = [" ".join(ast.get_docstring(ast.parse(path.read_text())).split()) for path in RECIPES]
    assert not [p for p in FIGURES if not any(re.search(p, text) for text in texts)]


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.py"
    path.write_text(
        "from layerskip_jax.config import as_variant, default_config\n\n\n"
        "def get_config(variant=''):\n"
        "    config = default_config()\n"
        "    config.model.num_layers = 4\n"
        "    config.layer_dropout.p_max = 0.2\n"
        "    config.early_exit.curriculum = 'all'\n"
        "    return as_variant(config, variant)\n"
    )
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
@pytest.mark.parametrize("variant", ["", ":plain"])
def test_every_recipe_loads(path, variant):
    config = load_config([f"--config={path}{variant}"])
    # Exits before a model that is left as it is learn without dropout.
    plain = variant == ":plain" or config.training.trainable == "exits"
    assert (config.layer_dropout.p_max == 0) == plain
    if path.name != "dont_drop.py":  # layer dropout alone
        assert (config.early_exit.curriculum == "last") == plain


def test_a_recipe_imports_what_lies_beside_it_and_our_common(tmp_path, monkeypatch):
    """And forgets it: two folders may have a file of one name."""
    monkeypatch.setitem(sys.modules, "common", mine := types.ModuleType("common"))
    for name, layers in (("one", 3), ("two", 5)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "sizes.py").write_text(f"LAYERS = {layers}\n")
        (folder / "recipe.py").write_text(
            "from common import at_scale\nfrom sizes import LAYERS\n\n\n"
            "def get_config(variant=''):\n"
            "    config = at_scale('1.5B')\n"
            "    config.model.num_layers = LAYERS\n"
            "    return config\n"
        )
        config = load_config([f"--config={folder / 'recipe.py'}"])
        assert (config.model.num_layers, config.model.model_dim) == (layers, 2048)
    assert sys.modules["common"] is mine and "sizes" not in sys.modules
    assert str(tmp_path / "two") not in sys.path


def test_a_config_survives_json():
    config = RunConfig()
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_the_default_config_dict_is_the_default_dataclass():
    assert RunConfig.from_dict(default_config().to_dict()) == RunConfig()


def test_overrides_of_every_type(recipe):
    config = load_config(
        [
            f"--config={recipe}",
            "--config.model.model_dim=96",
            "--config.optimizer.learning_rate=1e-2",
            "--config.model.tie_embeddings=True",
            "--config.early_exit.curriculum=gradual",
            "--config.mesh.rules.embed=('data', 'fsdp')",
        ]
    )
    assert config.model.num_layers == 4
    assert (config.model.model_dim, config.model.head_dim) == (96, 8)
    assert config.optimizer.learning_rate == 0.01
    assert config.model.tie_embeddings is True
    assert config.early_exit.curriculum == "gradual"
    assert config.mesh.rules.embed == ("data", "fsdp")


@pytest.mark.parametrize(
    "argument, message",
    [
        (
            "--config.model.num_layer=8",
            r"config.model.num_layer is not a setting. Did you mean 'model.num_layers'\?",
        ),
        ("--config.modle.num_layers=8", "Did you mean 'model.num_layers'"),
        ("--config.model.num_layers=eight", "num_layers=eight: invalid literal for int"),
        ("--config.model.num_layers=0", "config.model.num_layers=0 must be at least 1"),
        ("--config.model.num_heads=7", "config.model.num_kv_heads=12 must divide num_heads=7"),
        ("--config.training.steps=-5", "config.training.steps=-5 must be at least 1"),
        ("--config.mesh.rules.embed=('fdsp',)", "'fdsp' is no mesh axis"),
        ("--config.early_exit.curriculum=rotate", "Did you mean 'rotational'"),
        (
            "--config.mesh.shape.fsdp=-1",  # beside the default data=-1
            r"config.mesh.shape.data=-1 and fsdp=-1 .* set --config.mesh.shape.data=1$",
        ),
        ("--config.model.rope_scaling.factor=0.5", r"^config.model.rope_scaling.factor=0.5 must"),
    ],
)
def test_a_bad_override_is_refused(recipe, argument, message):
    with pytest.raises(ConfigError, match=message):
        load_config([f"--config={recipe}", argument])


@pytest.mark.parametrize("value", [-1, -7, 0.5, "nonsense", ("nonsense",), (-1.0,)], ids=str)
def test_every_refusal_names_the_setting(value):
    """Whatever a dataclass refuses, its message begins with the whole name of a setting."""
    names, refused = _settings(RunConfig().to_dict()), 0
    for name in names:
        try:
            RunConfig.from_dict(_with(name, value))
        except ConfigError as error:
            named = re.match(r"config\.([a-z0-9_.]+)", str(error))
            assert named and named[1].rstrip(".") in names, f"{name}={value!r}: {error}"
            refused += 1
    assert refused >= 5


def _with(name, value):
    """Returns the values of a config in which one setting has a value."""
    for key in reversed(name.split(".")):
        value = {key: value}
    return value


def _settings_of(kind):
    """Returns the settings with such a default; those of a tuple with one item of it."""
    group, found = RunConfig().to_dict(), {}
    for name in _settings(group):
        value = group
        for key in name.split("."):
            value = value[key]
        if type(value) is kind:
            found[name] = value
    return found


# Numbers that Python alone computes with.
HOST_SECONDS = {"checkpoint.keep_every_hours", "guards.step_timeout"}
HOST_COUNTS = {
    "data.prefetch", "data.read_threads",
    "checkpoint.every_steps", "checkpoint.keep", "checkpoint.keep_every_steps",
    "guards.nonfinite_limit", "guards.roll_backs", "training.log_every", "training.evaluate_every",
    "training.evaluate_batches", "training.profile_step", "training.profile_steps",
    "training.gradient_accumulation", "training.rows_per_device", "model.head_dim",
    *(f"mesh.shape.{axis}" for axis in ("data", "fsdp", "tensor", "context", "slice")),
}  # fmt: skip


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e39, 1e-40, -1e-40, 10**400])
def test_no_number_vanishes_or_overflows_in_float32(value):
    """Of every setting; what passes the check is the number that devices compute with."""
    for name in _settings_of(float):
        if name in HOST_SECONDS and value == 1e-40:
            continue
        with pytest.raises(ConfigError, match=rf"^config\.{re.escape(name)}="):
            RunConfig.from_dict(_with(name, value))
    with pytest.raises(ConfigError, match=r"^config.data.weights\[1\]="):
        RunConfig.from_dict(_with("data.weights", (0.5, value)))


@pytest.mark.parametrize(
    "changes, message",
    [
        (((0, (1.0, 1.0)),), r"weight_changes\[0\]\[0\]=0 must be at least 1"),
        (((2.0, (1.0, 1.0)),), r"weight_changes\[0\]\[0\]=2.0 has type float"),
        (((9, (1.0, 1.0)), (9, (1.0, 2.0))), "must name later and later steps, each once"),
        (((9, (1.0, -1.0)),), r"weight_changes\[0\]\[1\]\[1\]=-1.0 must be at least 0"),
        (((9, (math.nan, 1.0)),), r"weight_changes\[0\]\[1\]\[0\]=nan must be a number"),
        (((9, 0.5, 0.5),), r"weight_changes\[0\]=\(9, 0.5, 0.5\) must have 2 entries"),
        ((9, (0.5, 0.5)), r"weight_changes\[0\]=9 must be a tuple"),
    ],
)
def test_a_schedule_of_weights_is_refused_by_the_entry_that_is_wrong(changes, message):
    with pytest.raises(ConfigError, match=rf"^config.data.*{message}"):
        RunConfig.from_dict(_with("data.weight_changes", changes))
    right = RunConfig.from_dict(_with("data.weight_changes", ((9, (1, 0)), (12, (0.5, 2)))))
    assert right.data.weight_changes == ((9, (1.0, 0.0)), (12, (0.5, 2.0)))
    assert RunConfig.from_dict(right.to_dict()) == right  # as a run's folder holds it


def test_no_whole_number_goes_beyond_int32():
    for name in _settings_of(int).keys() - HOST_COUNTS - {"seed"}:
        with pytest.raises(
            ConfigError, match=rf"^config\.{re.escape(name)}={2**31} must be at most"
        ):
            RunConfig.from_dict(_with(name, 2**31))


def test_seeds_are_those_that_draw_differently():
    for seed in (0, 2**31, 2**32 - 1):
        assert RunConfig.from_dict({"seed": seed}).seed == seed
    for seed in (-1, 2**32):  # which draws what 0 draws
        with pytest.raises(ConfigError, match=f"config.seed={seed} must be"):
            RunConfig.from_dict({"seed": seed})


@pytest.mark.parametrize(
    "name, values",
    [
        ("optimizer.learning_rate", (SMALLEST_FLOAT32, LARGEST)),
        ("optimizer.final_fraction", (0.0, SMALLEST_FLOAT32, 1.0)),
        ("early_exit.e_scale", (0.0, SMALLEST_FLOAT32, LARGEST)),
        ("early_exit.gradual_fraction", (SMALLEST_FLOAT32, 1.0)),
        ("layer_dropout.p_max", (0.0, SMALLEST_FLOAT32, 1 - 2**-24)),
        ("model.rope_theta", (1 + 2**-23, LARGEST)),
        ("guards.step_timeout", (0.0, 1e-40, 3.6e9)),
    ],
)
def test_the_ends_of_a_range_belong_to_it(name, values):
    for value in values:
        RunConfig.from_dict(_with(name, value))


def _settings(values, prefix=""):
    names = []
    for key, value in values.items():
        names += _settings(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]
    return names


def test_a_missing_recipe_names_the_nearest(recipe):
    with pytest.raises(ConfigError, match="no such file .* Did you mean '.*/recipe.py'"):
        load_config([f"--config={recipe.parent / 'receipe.py'}"])
    with pytest.raises(ConfigError, match="name one recipe"):
        load_config([])
    with pytest.raises(ConfigError, match="no variant 'plane'") as raised:
        load_config([f"--config={recipe}:plane"])
    assert "Traceback" not in str(raised.value)


def test_recipes_are_found_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert recipe_names() == [path.stem for path in RECIPES]
    by_name = load_config(["--config=llama2_7b_scratch:v5p", "--config.seed=3"])
    path = next(path for path in RECIPES if path.stem == "llama2_7b_scratch")
    assert by_name == load_config([f"--config={path}:v5p", "--config.seed=3"])
    assert (by_name.mesh.topology, by_name.seed) == ("v5p:4x4x4", 3)


def test_a_file_comes_before_the_recipe_of_its_name(tmp_path, monkeypatch, recipe):
    monkeypatch.chdir(tmp_path)
    recipe.rename("quickstart")
    assert load_config(["--config=quickstart"]).model.num_layers == 4


@pytest.mark.parametrize(
    "name, nearest",
    [
        ("quikstart", "quickstart"),
        ("configs/quikstart.py", "quickstart"),
        ("recip.py", "recipe.py"),
    ],
)
def test_an_unknown_recipe_names_the_nearest_and_how_to_list_them(
    name, nearest, tmp_path, monkeypatch, recipe
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"no recipe of that name. Did you mean '{nearest}'") as e:
        load_config([f"--config={name}:plain"])
    assert "`layerskip train --help` lists the recipes" in str(e.value)


def test_every_target_is_planned_from_any_folder(tmp_path, monkeypatch, capsys):
    def planned(config, topology):
        raise UserError(f"{topology} is planned")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "plan_step_apart", planned)
    assert main(["plan", "--all", "--only=v5p"]) == 2
    assert "v5p:4x4x4 is planned" in capsys.readouterr().err


def test_a_typo_inside_a_recipe_is_named(recipe):
    recipe.write_text(recipe.read_text().replace("num_layers", "num_layer"))
    with pytest.raises(ConfigError, match='Did you mean "num_layers"'):
        load_config([f"--config={recipe}"])


@pytest.mark.parametrize(
    "values, message",
    [
        ({"model": {"num_layer": 8}}, r"config.model.num_layer is not a setting. .*'num_layers'"),
        ({"model": 8}, "config.model=8 must be a group of settings"),
        (
            {"model": {"num_layers": "8"}},
            "config.model.num_layers='8' has type str; it must be int",
        ),
        ({"model": {"num_layers": True}}, "has type bool; it must be int"),
        ({"optimizer": {"beta1": "x"}}, "config.optimizer.beta1='x' has type str"),
        ({"mesh": {"rules": {"embed": "fsdp"}}}, "embed='fsdp' must be a tuple"),
    ],
)
def test_bad_values_in_a_file_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_dict(values)


def test_a_renamed_setting_is_refused_with_its_new_name(recipe):
    assert len(RENAMED) == 7
    for old, new in RENAMED.items():
        message = f"{re.escape(old)} is called {re.escape(new)} now"
        with pytest.raises(ConfigError, match=message):
            load_config([f"--config={recipe}", f"--{old}=1"])
        group, _, name = old.removeprefix("config.").partition(".")
        with pytest.raises(ConfigError, match=message):
            RunConfig.from_dict({group: {name: 1}})
    old_line = "    config.early_exit.scale = 1.0\n"
    recipe.write_text(recipe.read_text().replace("    return as", f"{old_line}    return as"))
    with pytest.raises(ConfigError, match="config.early_exit.scale is called .*e_scale now"):
        load_config([f"--config={recipe}"])


def test_a_run_from_before_the_renaming_is_read_and_goes_on(tmp_path):
    run = RunFolder(tmp_path)
    config = RunConfig(
        layer_dropout=LayerDropoutConfig(0.2, "linear", "exp", row_groups=4),
        early_exit=EarlyExitConfig("rotational", rotation_interval=3, e_scale=0.7),
        training=TrainingConfig(batch_size=8, gradient_accumulation=2),
    )
    values = config.to_dict()
    for old, new in RENAMED.items():
        group, _, name = old.removeprefix("config.").partition(".")
        values[group][name] = values[group].pop(new.rpartition(".")[2])
    run.config_file.write_text(json.dumps(values))
    run.data_file.write_text(json.dumps({"fingerprint": "same"}))
    assert open_run(tmp_path)[1] == config
    check_workdir(run, config, {"fingerprint": "same"})


def test_plain_turns_both_ideas_off():
    config = RunConfig.from_dict(as_variant(default_config(), "plain").to_dict())
    assert config.layer_dropout.p_max == 0
    assert config.early_exit.curriculum == "last"


def test_differences_name_the_keys():
    old = RunConfig()
    new = dataclasses.replace(old, seed=3, model=dataclasses.replace(old.model, num_layers=2))
    assert differences(old.to_dict(), new.to_dict()) == [
        "config.model.num_layers: 12 -> 2",
        "config.seed: 0 -> 3",
    ]


def test_an_unknown_verb_names_the_nearest_and_all_verbs(capsys):
    assert main(["trian"]) == 2
    error = capsys.readouterr().err
    assert "there is no verb 'trian'. Did you mean 'train'?" in error
    assert all(f"\n  {verb} " in error for verb in VERBS)


def test_a_bad_config_is_one_line_on_the_terminal(capsys, recipe, tmp_path):
    workdir = tmp_path / "run"
    code = main(["train", f"--config={recipe}", f"--workdir={workdir}", "--config.sed=1"])
    assert code == 2
    error = capsys.readouterr().err
    assert "layerskip train: config.sed is not a setting. Did you mean 'seed'?" in error
    assert "Traceback" not in error
    assert not workdir.exists()

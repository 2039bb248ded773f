import dataclasses
import json
import re
import sys
import types
from pathlib import Path

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
from layerskip_jax.early_exit_loss import EarlyExitConfig
from layerskip_jax.layer_dropout import LayerDropoutConfig
from layerskip_jax.run_folder.claim import check_workdir
from layerskip_jax.run_folder.paths import RunFolder, open_run
from layerskip_jax.schema import new_names

# Old names of settings, and their new ones.
RENAMED = new_names(RunConfig)
CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = [CONFIGS / f"{name}.py" for name in recipe_names()]


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
    plain = variant == ":plain"
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
        values = value
        for key in reversed(name.split(".")):
            values = {key: values}
        try:
            RunConfig.from_dict(values)
        except ConfigError as error:
            named = re.match(r"config\.([a-z0-9_.]+)", str(error))
            assert named and named[1].rstrip(".") in names, f"{name}={value!r}: {error}"
            refused += 1
    assert refused >= 5


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

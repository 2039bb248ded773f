"""The command line as a stranger meets it: what it lists, what it keeps quiet, how it installs."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from layerskip_jax.cli import VERBS, main
from layerskip_jax.commands import settings as settings_command
from layerskip_jax.config import ConfigError, RunConfig, recipe_names
from layerskip_jax.hardware.tpu_presence import may_have_tpu
from layerskip_jax.settings import _groups, setting_groups

ROOT = Path(__file__).parents[1]
SETTINGS = [setting for group in setting_groups() for setting in group.settings]
NUMBERS = [setting for setting in SETTINGS if type(setting.default) in (int, float)]
NOISE = re.compile("tpu|worker hostname|InitGoogle|host bounds", re.IGNORECASE)
needs_no_tpu = pytest.mark.skipif(may_have_tpu(), reason="this machine may have a TPU")


def run(*command, cwd=ROOT, **variables):
    """Runs a command without what the tests set for jax, and returns how it ended."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "TPU_"))}
    environment |= {"PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(
        [*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True
    )


@needs_no_tpu
def test_nothing_is_said_of_tpus_where_there_are_none():
    """The command line and the library; jax alone does complain, with libtpu installed."""
    script = """
import sys

import jax
from jax._src import xla_bridge

from layerskip_jax.cli import main
import layerskip_jax

if sys.argv[1] == "command":
    main(["settings", "seed"])
elif sys.argv[1] == "library":
    layerskip_jax.load
xla_bridge._discover_and_register_pjrt_plugins()
print(jax.config.jax_platforms, *sorted(xla_bridge._backend_factories), jax.devices()[0].platform)
"""
    said = {way: run(sys.executable, "-c", script, way) for way in ("jax", "command", "library")}
    assert NOISE.search(said["jax"].stderr), "libtpu has nothing to say here, so nothing is tested"
    for way in ("command", "library"):
        assert said[way].stderr == ""
        # Other platforms, such as a GPU's, are looked for as jax alone does.
        assert said[way].stdout.splitlines()[-1] == said["jax"].stdout.splitlines()[-1]


@needs_no_tpu
@pytest.mark.slow
def test_real_commands_say_nothing_of_tpus(prepared, tmp_path):
    small = [
        "--config.model.num_layers=2",
        "--config.model.model_dim=32",
        "--config.model.ffn_dim=32",
        "--config.model.dtype=float32",
        "--config.training.batch_size=8",
        "--config.training.steps=1",
    ]
    train = [
        "train", "--config=quickstart:plain", f"--workdir={tmp_path}", *small,
        f"--config.data.path={prepared}",
    ]  # fmt: skip
    plan = [
        "plan", "--config=quickstart:plain", "--topology=v5e:2x2", *small,
        "--config.model.vocab_size=64", "--sequence-length=128",
    ]  # fmt: skip
    for command in (
        [sys.executable, ROOT / "launch" / "local.py", "--processes=1", "--", *train],
        [sys.executable, "-m", "layerskip_jax", *plan],
    ):
        done = run(*command)
        assert done.returncode == 0, done.stderr
        lines = [line for line in done.stderr.splitlines() if NOISE.search(line)]
        # The plan names the options of the compiler, which have the chip's name in theirs.
        assert [line for line in lines if not line.startswith("compiler: xla_tpu_")] == []


@pytest.mark.parametrize(
    "files, variables, expected",
    [
        ({}, {}, False),
        ({}, {"TPU_SKIP_MDS_QUERY": "1", "TPU_LIBRARY_PATH": "libtpu.so"}, False),
        ({}, {"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({}, {"JAX_FORCE_TPU_INIT": "1"}, True),
        ({"dev/accel0": ""}, {}, True),
        ({"dev/accel/accel0": ""}, {}, False),  # an NPU
        ({"dev/vfio/0": ""}, {}, False),  # some other device, for a virtual machine
        ({"0/vendor": "0x1ae0\n", "0/device": "0x0063\n"}, {}, True),  # v5e
        ({"0/vendor": "0x1ae0\n", "0/device": "0x0042\n"}, {}, False),  # Google's network card
        ({"0/vendor": "0x10de\n", "0/device": "0x0063\n"}, {}, False),
        # A chip younger than this jax.
        ({"0/vendor": "0x1ae0\n", "0/device": "0x9999\n", "dev/vfio/0": ""}, {}, True),
    ],
)
def test_what_tells_a_machine_with_a_tpu(files, variables, expected, tmp_path):
    for name, text in files.items():
        path = tmp_path / (name if name.startswith("dev") else f"sys/bus/pci/devices/{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert may_have_tpu(variables, tmp_path) == expected


@needs_no_tpu
def test_a_tpu_that_is_asked_for_is_looked_for():
    script = """
import os

import jax
from jax._src import xla_bridge

from layerskip_jax.hardware.tpu_presence import leave_absent_tpu_alone

def still_asks():
    leave_absent_tpu_alone()
    return xla_bridge._backend_factories["tpu"].factory is before

before = xla_bridge._backend_factories["tpu"].factory
jax.config.update("jax_platforms", "tpu")
by_platform = still_asks()
jax.config.update("jax_platforms", None)
os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
by_variable = still_asks()
del os.environ["TPU_WORKER_HOSTNAMES"]
print(by_platform, by_variable, still_asks())
"""
    done = run(sys.executable, "-c", script)
    assert (done.stdout, done.stderr) == ("True True False\n", "")


@pytest.mark.parametrize("verb", VERBS)
def test_an_argument_that_is_no_text_is_named(verb, capsys):
    assert main([verb, "--source", os.fsdecode(b"a\xff.txt")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"layerskip {verb}: the argument 'a\\xff.txt' is not UTF-8 text; ")


def test_an_interrupted_verb_ends_with_one_line(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("layerskip_jax.commands.settings.main", interrupted)
    assert main(["settings"]) == 130
    assert capsys.readouterr().err == "layerskip settings: interrupted\n"


def test_a_closed_pipe_is_quiet():
    """As that of `layerskip settings | head -1`, once head has seen enough."""
    for arguments in (["settings"], ["settings", "--markdown"]):  # by rich, and by print
        reader, writer = os.pipe()
        os.close(reader)
        command = [sys.executable, "-m", "layerskip_jax", *arguments]
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE)
        os.close(writer)
        assert (done.returncode, done.stderr) == (1, b"")


def test_help_from_another_folder(tmp_path):
    done = run(sys.executable, "-m", "layerskip_jax", "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stderr == ""
    assert all(f"\n  {verb} " in done.stdout for verb in VERBS)


def test_every_setting_is_described_and_the_page_is_up_to_date(capsys):
    # `setting_groups` raises where a docstring lacks one.
    fields = _flat(RunConfig().to_dict())
    assert sorted(s.name for s in SETTINGS) == sorted(fields)
    assert all(setting.meaning for setting in SETTINGS)
    assert main(["settings", "--markdown"]) == 0
    printed = capsys.readouterr().out
    assert (ROOT / "docs" / "settings.md").read_text() == printed, (
        f"run {settings_command.MARKDOWN_COMMAND}"
    )


def _flat(values, prefix=""):
    names = []
    for key, value in values.items():
        names += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]
    return names


def test_a_setting_without_description_is_refused():
    @dataclasses.dataclass
    class Undescribed:
        """Settings.

        Attributes:
          first: at least 1.
        """

        first: int = 1
        second: int = 2

    with pytest.raises(LookupError, match="Undescribed's docstring has no attribute second"):
        _groups(Undescribed, {"first": 1, "second": 2}, "")


def set_alone(name, value):
    """Builds a run in which this setting alone differs from the defaults."""
    values = value
    for part in reversed(name.split(".")):
        values = {part: values}
    return RunConfig.from_dict(values)


@pytest.mark.parametrize("setting", NUMBERS, ids=lambda setting: setting.name)
def test_the_range_of_a_number_is_stated_and_true(setting):
    """What is just outside of it is refused, by name."""
    kind = type(setting.default)

    def beyond(end, way):
        end = kind(end)
        return end + way * (1 if kind is int else 1e-3 * (abs(end) or 1))

    outside = []
    if found := re.search(r"in ([\[(])(\S+), (\S+)([\])])", setting.meaning):
        opens, low, high, closes = found.groups()
        outside += [beyond(low, -1) if opens == "[" else kind(low)]
        outside += [beyond(high, 1) if closes == "]" else kind(high)]
    elif found := re.search(r"in (\d+)\.\.(\d+)", setting.meaning):
        outside += [beyond(found[1], -1), beyond(found[2], 1)]
    elif found := re.search(r"at least (\d\S*?)[,.:; ]", f"{setting.meaning} "):
        outside += [beyond(found[1], -1)]
        outside += [-2] if "-1 or at least" in setting.meaning else []
    elif found := re.search(r"above (\S+?)[,.; ]", f"{setting.meaning} "):
        limits = {s.name: s.default for s in SETTINGS}
        other = f"{setting.name.rpartition('.')[0]}.{found[1].strip('`')}"
        outside += [kind(limits[other] if other in limits else found[1])]
    assert outside, f"the docstring of {setting.name} states no range"
    for value in outside:
        with pytest.raises(ConfigError, match=re.escape(setting.name.rsplit(".", 1)[-1])):
            set_alone(setting.name, value)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("sweep --workdir=nowhere --prompts=0", "--prompts=0 must be at least 1"),
        (
            "sweep --workdir=nowhere --prompts=nothing.jsonl",
            "--prompts=nothing.jsonl cannot be read",
        ),
        ("sweep --workdir=nowhere --prompts=2 --prompt-file=a", "--prompt-file exclude each other"),
        ("sweep --workdir=nowhere --stop-below=0.5,1", "--stop-below=1.0 must be"),
        ("sweep --workdir=nowhere --new-tokens=1", "--new-tokens=1 must be at least 2"),
        ("sweep --workdir=nowhere --drafts=2,0", "--drafts=0 must be at least 1"),
        ("verify nowhere --tolerance=nan", "--tolerance=nan must be a number, finite"),
        ("verify nowhere --tokens=-1", "--tokens=-1 must be at least 1"),
    ],
)
def test_a_number_that_no_verb_can_use_is_refused_first(arguments, message, capsys):
    assert main(arguments.split()) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "setting", [s for s in SETTINGS if isinstance(s.default, str)], ids=lambda setting: setting.name
)
def test_all_choices_of_a_setting_are_named(setting):
    try:
        set_alone(setting.name, "no such choice")
    except ConfigError as error:
        choices = re.search(r"is not one of (.*?)\.$", str(error))[1].split(", ")
        for choice in choices:
            assert f"`{choice}`" in setting.meaning


def test_settings_are_found_by_group_name_and_word(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")

    def shown(*words):
        assert main(["settings", *words]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= 80
        # A setting stands at the left of its table; what goes on below it is further right.
        rows = {line.split()[0] for line in lines if re.match(" [a-z]", line)}
        return rows - {"setting"}

    assert shown() == {setting.name.rsplit(".", 1)[-1] for setting in SETTINGS}
    assert shown("config.mesh.shape") == {"data", "fsdp", "tensor", "context", "slice"}
    assert {"topology", "fsdp", "kv_heads"} <= shown("mesh")
    assert shown("layer_dropout.p_max") == {"p_max"}
    assert shown("EPSILON") == {"eps", "norm_eps"}
    assert main(["settings", "layer_droput"]) == 2
    assert "Did you mean 'layer_dropout'?" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["train", "plan"])
def test_help_lists_the_recipes_and_the_groups(verb, capsys):
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "`layerskip settings [GROUP|WORD]`" in text
    assert all(f"\n  {group.name} " in text for group in setting_groups() if group.name)
    assert set(recipe_names()) <= set(re.split(r"[,\s]+", text))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The package as a wheel, built from a copy so that nothing is left in the repository."""
    top = tmp_path_factory.mktemp("wheel")
    for name in ("layerskip_jax", "configs"):
        shutil.copytree(ROOT / name, top / "source" / name)
    for name in "pyproject.toml setup.py requirements.txt README.md LICENSE".split():
        shutil.copy(ROOT / name, top / "source" / name)
    built = run(
        sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index",
        f"--wheel-dir={top}", top / "source",
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    return next(top.glob("*.whl"))


@pytest.mark.slow
def test_a_wheel_holds_the_package_and_the_recipes(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "layerskip_jax").rglob("*.*")
        if path.suffix != ".pyc"
    }
    recipes = {f"layerskip_jax/configs/{name}.py" for name in (*recipe_names(), "common")}
    assert names == files | recipes


@pytest.mark.slow
def test_an_installed_wheel_runs_the_quickstart_from_another_folder(wheel, tmp_path):
    environment = tmp_path / "environment"
    made = run(sys.executable, "-m", "venv", "--without-pip", environment)
    assert made.returncode == 0, made.stderr
    python = environment / "bin" / "python"
    # What the package needs is found where these tests find it, and not installed again.
    site = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
    )
    (site / "needs.pth").write_text(sysconfig.get_path("purelib") + "\n")
    installed = run(
        sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel
    )
    assert installed.returncode == 0, installed.stderr
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def layerskip(*arguments):
        done = run(environment / "bin" / "layerskip", *arguments, cwd=elsewhere, PYTHONPATH="")
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert all(f"\n  {verb} " in layerskip("--help") for verb in VERBS)
    assert "p_max" in layerskip("settings", "layer_dropout")
    printed = layerskip(
        "quickstart",
        "--workdir=quick",
        f"--source={Path(sysconfig.get_path('stdlib')) / 'email'}",
        "--vocab-size=512",
        "--validation-fraction=0.2",
        "--steps=2",
        "--plain-steps=1",
    )
    assert "\n../environment/bin/layerskip report --workdir=quick/model --open" in printed
    assert (elsewhere / "quick" / "model" / "report.html").is_file()

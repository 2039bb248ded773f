"""Runs whose folder is on an object store: a real server of S3, on this machine."""

import sys

import fsspec
import pytest

from layerskip_jax.cli import main
from tests.stores import s3_store
from tests.training.test_train import RECIPE

train_module = sys.modules["layerskip_jax.training.train"]


@pytest.fixture(scope="module")
def store():
    with s3_store() as address:
        yield address


@pytest.fixture(scope="module")
def arguments(tmp_path_factory, prepared):
    recipe = tmp_path_factory.mktemp("recipe") / "small.py"
    recipe.write_text(RECIPE)
    return [f"--config={recipe}", f"--config.data.path={prepared}", "--config.mesh.shape.data=8"]


def names(address):
    filesystem, root = fsspec.core.url_to_fs(address)
    return [name.removeprefix(f"{root}/") for name in filesystem.find(root)]


def test_smoke(store, arguments, capsys):
    assert main(["train", f"--workdir={store}/smoke", *arguments]) == 0
    print(names(f"{store}/smoke"))

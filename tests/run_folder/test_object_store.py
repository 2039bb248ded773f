"""Paths on object stores, and the local side of what is written there."""

import importlib.util
import time
from pathlib import Path

import fsspec
import pytest

from layerskip_jax.cli import main
from layerskip_jax.data.manifest import read_manifest
from layerskip_jax.run_folder.object_store import (
    UPLOAD_SECONDS,
    Spool,
    as_path,
    is_remote,
    kvstore,
    move_folder,
)
from layerskip_jax.schema import UserError
from tests.stores import s3_store


@pytest.fixture(scope="module")
def store():
    with s3_store() as address:
        yield address


@pytest.fixture
def sent(monkeypatch):
    """The names of the objects that spools write, in their order."""
    names, kind = [], type(as_path("s3://runs"))
    write = kind.write_bytes

    def record(path, content):
        names.append(path.name)
        return write(path, content)

    monkeypatch.setattr(kind, "write_bytes", record)
    return names


def content(address):
    with fsspec.open(address, "r") as file:
        return file.read()


def test_a_path_on_a_disk_is_what_it_was(tmp_path):
    assert as_path(str(tmp_path)) == tmp_path
    assert as_path("runs/x") == Path("runs/x") and not is_remote("runs/x")
    assert kvstore(tmp_path) == f"file://{tmp_path}/"


def test_a_store_that_cannot_be_used_is_named_with_the_remedy(monkeypatch):
    with pytest.raises(UserError, match="ftp://host/run is on no known store"):
        as_path("ftp://host/run")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="gs://bucket/run needs .* `pip install gcsfs`"):
        as_path("gs://bucket/run")
    with pytest.raises(UserError, match="s3://bucket/run needs .* `pip install s3fs`"):
        as_path("s3://bucket/run")


@pytest.mark.slow
def test_a_store_that_does_not_answer_is_named(monkeypatch):
    with s3_store() as address:
        pass  # its port is free now
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "tests")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=f"{address}/run cannot be reached .*127.0.0.1:9"):
        as_path(f"{address}/run")


def test_what_has_no_place_on_a_store_is_refused(prepared, capsys):
    with pytest.raises(UserError, match="must be on a local or shared disk.* like s3://b/data"):
        read_manifest("s3://b/data")
    with pytest.raises(UserError, match="config.data.mixture.* must be on a local or shared disk"):
        read_manifest("gs://b/data")
    assert main(["export", "--workdir=x", "--output=s3://b/model"]) == 2
    assert "--output must be on a local or shared disk" in capsys.readouterr().err
    assert not Path("s3:").exists()


def test_what_changed_is_uploaded_whole_and_once(store, sent):
    spool = Spool(as_path(f"{store}/spool"), last="a")
    for name in ("a", "b", ".hidden", "logs/c"):
        file = spool.local / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(name)
    spool.upload()
    assert sent == ["b", "c", "a"]
    assert content(f"{store}/spool/logs/c") == "logs/c"
    with (spool.local / "b").open("a") as file:
        file.write(" grows")
    spool.upload()
    assert sent[3:] == ["b"]
    assert content(f"{store}/spool/b") == "b grows"


def test_a_new_spool_has_what_it_asks_for_and_sends_none_of_it_back(store, sent):
    first = Spool(as_path(f"{store}/asked"))
    for name in ("a", "b", "in/c"):
        (first.local / name).parent.mkdir(exist_ok=True)
        (first.local / name).write_text(name)
    first.close()
    assert sorted(sent) == ["a", "b", "c"]
    second = Spool(as_path(f"{store}/asked"))
    second.fetch(["a", "nothing", "in/", "nowhere/"])
    names = [p.relative_to(second.local) for p in second.local.rglob("*") if p.is_file()]
    assert sorted(map(str, names)) == ["a", "in/c"]
    (second.local / "a").write_text("a more")
    second.close()
    assert sent[3:] == ["a"]


def test_uploads_in_the_background_keep_their_distance(store, sent, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    spool = Spool(as_path(f"{store}/soon"))
    spool._worker = _AtOnce()

    def grow_and_ask(text, **options):
        (spool.local / "a").write_text(text)
        spool.upload_soon(**options)
        return content(f"{store}/soon/a")

    assert grow_and_ask("1") == "1"
    assert grow_and_ask("12") == "1"
    now[0] += UPLOAD_SECONDS
    assert grow_and_ask("123") == "123"
    assert grow_and_ask("1234", urgent=True) == "1234"
    # A checkpoint is being saved: the metrics of its step follow it at once.
    assert grow_and_ask("12345") == "12345"
    assert grow_and_ask("123456") == "12345"


class _AtOnce:
    """An executor that is done when it returns."""

    def submit(self, function):
        function()
        return self

    def running(self):
        return False

    def done(self):
        return True


def test_a_failed_upload_is_made_up_for_and_the_last_one_is_an_error(store, monkeypatch, caplog):
    spool = Spool(as_path(f"{store}/failing"))
    kind = type(spool.remote)
    (spool.local / "a").write_text("kept")

    def refuse(path, content):
        raise PermissionError("no")

    with monkeypatch.context() as patch:
        patch.setattr(kind, "write_bytes", refuse)
        spool.upload_soon()
        spool._pending.result()
        assert f"{store}/failing/a cannot be written (PermissionError: no)" in caplog.text
    spool.upload()
    assert content(f"{store}/failing/a") == "kept"

    (spool.local / "a").write_text("kept, too")
    monkeypatch.setattr(kind, "write_bytes", refuse)
    with pytest.raises(UserError, match=f"what is not uploaded lies in {spool.local}"):
        spool.close()
    local = spool.local
    del spool
    assert (local / "a").read_text() == "kept, too"


def test_a_spool_that_is_done_leaves_nothing_behind(store):
    spool = Spool(as_path(f"{store}/done"))
    (spool.local / "a").write_text("x")
    spool.close()
    local = spool.local
    del spool
    assert not local.exists()


def test_a_folder_is_moved_whole(store):
    spool = Spool(as_path(f"{store}/moved"))
    for name in ("5/a", "5/b/c", "55/d"):
        (spool.local / name).parent.mkdir(parents=True, exist_ok=True)
        (spool.local / name).write_text(name)
    spool.close()
    move_folder(spool.remote / "5", as_path(f"{store}/moved/aside/5-1"))
    filesystem, root = fsspec.core.url_to_fs(f"{store}/moved")
    names = [name.removeprefix(f"{root}/") for name in filesystem.find(root)]
    assert sorted(names) == ["55/d", "aside/5-1/a", "aside/5-1/b/c"]
    with pytest.raises(FileNotFoundError):
        move_folder(spool.remote / "5", as_path(f"{store}/moved/aside/5-2"))


def test_tensorstore_is_told_where_the_store_is(store, monkeypatch):
    spec = kvstore(as_path(f"{store}/run/checkpoints"))
    assert spec["bucket"] == "runs" and spec["path"] == "run/checkpoints/"
    assert spec["endpoint"].startswith("http://127.0.0.1:")
    assert spec["aws_region"] == "us-east-1"

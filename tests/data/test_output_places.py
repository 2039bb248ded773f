"""Prepared data on an object store: the same bytes as on a disk, and nothing that looks whole."""

import tempfile

import fsspec
import pytest

from layerskip_jax.commands import prepare as command
from layerskip_jax.data.assembly import Output
from layerskip_jax.data.manifest import read_manifest
from layerskip_jax.data.prepare import prepare
from layerskip_jax.data.runners import Processes
from layerskip_jax.run_folder.object_store import as_path
from layerskip_jax.schema import UserError
from tests.data.test_units import DiesAfter, contents, in_units
from tests.stores import gs_store, s3_store


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(s3_store, id="s3"),
        pytest.param(gs_store, id="gs", marks=pytest.mark.slow),
    ],
)
def store(request):
    with request.param() as address:
        yield address


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """Where this process and its workers put what nobody else needs."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory, corpus_folder):
    """What is prepared on a disk, copies looked for."""
    output = tmp_path_factory.mktemp("disk") / "data"
    prepare(in_units(corpus_folder, deduplicate=True), output)
    return output


def downloaded(address, folder):
    """Returns a copy on a disk of what lies on a store."""
    filesystem, root = fsspec.core.url_to_fs(address, use_listings_cache=False)
    for name in filesystem.find(root):
        file = folder / "copy" / name.removeprefix(f"{root}/")
        file.parent.mkdir(parents=True, exist_ok=True)
        filesystem.get_file(name, str(file))
    return folder / "copy"


def names_in(address):
    filesystem, root = fsspec.core.url_to_fs(address, use_listings_cache=False)
    return set(filesystem.find(root))


def test_the_same_bytes_as_on_a_disk(store, corpus_folder, on_disk, temporary, tmp_path):
    output = as_path(f"{store}/whole")
    request = in_units(corpus_folder, deduplicate=True)
    made = prepare(request, output, runner=Processes(2))
    assert made == read_manifest(on_disk)
    copy = downloaded(str(output), tmp_path)
    assert contents(copy) == contents(on_disk)
    assert read_manifest(copy) == made
    assert not names_in(f"{store}/.whole.units") and not list(temporary.iterdir())
    # Once more nothing is done, and another request is refused.
    assert prepare(request, output, runner=DiesAfter(0)) == made
    with pytest.raises(UserError, match="holds data prepared otherwise"):
        prepare(in_units(corpus_folder), output)
    with pytest.raises(UserError, match="--overwrite: a store cannot exchange .*take another"):
        prepare(request, output, overwrite=True)
    assert contents(copy) == contents(on_disk)


def test_a_rerun_on_a_store_makes_what_is_missing(
    store, corpus_folder, on_disk, temporary, tmp_path, monkeypatch
):
    output, request = as_path(f"{store}/rerun"), in_units(corpus_folder, deduplicate=True)
    scans = [DiesAfter(2), DiesAfter(1000)]
    with pytest.raises(KeyboardInterrupt):
        prepare(request, output, runner=scans[0])
    units = {name for name in names_in(f"{store}/.rerun.units") if "scan-" in name}
    assert len(units) == 2 and not names_in(str(output))

    # Interrupted while shards are copied to the output: it is no prepared data yet.
    take, taken = Output.take, []

    def stop(self, *what):
        take(self, *what)
        taken.append(what)
        if len(taken) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Output, "take", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(request, output, runner=scans[1])
    assert len(names_in(str(output))) == 3
    assert not set(scans[0].made) & set(scans[1].made)
    # What somebody else has put there, or beside it, is not taken for that.
    filesystem, _ = fsspec.core.url_to_fs(store)
    for name in ("rerun/letter.txt", "rerun-2/letter.txt", ".rerun.units-2/letter.txt"):
        filesystem.pipe_file(f"{store}/{name}", b"of somebody")
    with pytest.raises(UserError, match="/rerun exists and is no prepared data"):
        prepare(request, output)
    filesystem.rm_file(f"{store}/rerun/letter.txt")
    runner = DiesAfter(0)
    prepare(request, output, runner=runner)
    assert runner.made == []
    assert contents(downloaded(str(output), tmp_path)) == contents(on_disk)
    assert not names_in(f"{store}/.rerun.units") and not list(temporary.iterdir())
    assert names_in(f"{store}/rerun-2") and names_in(f"{store}/.rerun.units-2")


def test_a_damaged_unit_on_a_store_is_made_again(store, corpus_folder, tmp_path, caplog):
    output, request = as_path(f"{store}/damaged"), in_units(corpus_folder)
    runner = DiesAfter(3)
    with pytest.raises(KeyboardInterrupt):
        prepare(request, output, runner=runner)
    [shard, *_] = [n for n in names_in(f"{store}/.damaged.units/{runner.made[0]}") if "train" in n]
    fsspec.core.url_to_fs(store)[0].pipe_file(shard, b"cut off")
    again = DiesAfter(1000)
    prepare(request, output, runner=again)
    assert set(runner.made) & set(again.made) == {runner.made[0]}
    assert "is damaged, so its unit is made again" in caplog.text


def test_what_is_no_place_for_data_is_refused(store, corpus_folder, tmp_path, monkeypatch):
    filesystem, _ = fsspec.core.url_to_fs(store)
    filesystem.pipe_file(f"{store}/taken/letter.txt", b"of somebody")
    with pytest.raises(UserError, match="/taken exists and is no prepared data"):
        command.main([f"--output={store}/taken", f"--source={corpus_folder}"])
    assert len(names_in(f"{store}/taken")) == 1 and not names_in(f"{store}/.taken.units")
    with pytest.raises(UserError, match="ftp://x/data is on no known store"):
        command.main(["--output=ftp://x/data", f"--source={corpus_folder}"])
    # What a store says in the middle of it is named, with the output.
    monkeypatch.setattr(Output, "take", lambda *_: (_ for _ in ()).throw(RuntimeError("denied")))
    with pytest.raises(UserError, match=r"/denied cannot be .* \(RuntimeError: denied"):
        prepare(in_units(corpus_folder), as_path(f"{store}/denied"))


def test_the_command_puts_data_on_a_store(store, corpus_folder, tmp_path, capsys):
    line = [f"--output={store}/command", f"--source={corpus_folder}", "--sequence-length=16"]
    assert command.main([*line, "--vocab-size=300", "--validation-fraction=0.2"]) == 0
    assert f"{store}/command" in capsys.readouterr().out
    assert read_manifest(downloaded(f"{store}/command", tmp_path)).train.windows > 0

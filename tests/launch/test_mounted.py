"""launch/mounted.sh, run with programs that record how they mount, and what is mounted."""

import pytest

from tests.launch.scripts import run

# Mounting is a copy of the bucket, and a line in a file that findmnt reads.
MOUNT = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >> "{folder}/calls"
[[ ! -e "{folder}/down" ]] || exit 3
cp -r "{folder}/bucket/." "${{@: -1}}"
echo "${{@: -1}}" > "{folder}/mounts"
"""
PROGRAMS = {
    "gcsfuse": MOUNT,
    "mount-s3": MOUNT,
    "findmnt": """#!/usr/bin/env bash
[[ -e "{folder}/mounts" && $(< "{folder}/mounts") == "${{@: -1}}" ]] && echo fuse.gcsfuse
""",
    "fusermount3": """#!/usr/bin/env bash
echo "fusermount3 $*" >> "{folder}/calls"
rm -rf "{folder}/mounts" "${{@: -1}}"/*
""",
    # Nothing of this machine is changed, whatever the script would install.
    "sudo": '#!/usr/bin/env bash\ncat > /dev/null\necho "sudo $*" >> "{folder}/calls"\nexit 1\n',
    "curl": '#!/usr/bin/env bash\necho "curl ${{@: -1}}" >> "{folder}/calls"\n',
}


class Machine:
    """One with a bucket in reach."""

    def __init__(self, folder):
        self.folder, self.mount, self.bin = folder, folder / "data", folder / "bin"
        self.bin.mkdir()
        (folder / "bucket").mkdir()
        (folder / "bucket" / "manifest.json").write_text("{}")
        for name, text in PROGRAMS.items():
            (self.bin / name).write_text(text.format(folder=folder))
            (self.bin / name).chmod(0o755)

    def run(self, *options, command=("true",)):
        words = [f"--data-mount={self.mount}", *options, *(["--", *command] if command else [])]
        return run("mounted.sh", *words, fakes=self, TMPDIR=str(self.folder))

    def calls(self):
        file = self.folder / "calls"
        return file.read_text().splitlines() if file.exists() else []

    def state(self):
        return [*self.folder.glob("layerskip-data-*")]


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


GS, S3 = "--data-bucket=gs://my-bucket/corpora/web", "--data-bucket=s3://my-bucket/corpora/web/"


def test_gcsfuse_mounts_what_is_asked_for(machine):
    done = machine.run(GS, "--data-cache-gib=2", command=("ls", str(machine.mount)))
    assert (done.returncode, done.stdout) == (0, "manifest.json\n"), done.stderr
    (state,) = machine.state()
    assert machine.calls() == [
        "gcsfuse -o ro --implicit-dirs --only-dir=corpora/web --metadata-cache-ttl-secs=-1 "
        f"--kernel-list-cache-ttl-secs=-1 --cache-dir={state}/cache --file-cache-max-size-mb=2048 "
        "--file-cache-cache-file-for-range-read --file-cache-enable-parallel-downloads "
        f"my-bucket {machine.mount}"
    ]
    assert (state / "cache").is_dir() and state.stat().st_mode & 0o777 == 0o700


def test_mount_s3_mounts_what_is_asked_for(machine):
    assert machine.run(S3, "--data-cache-gib=2").returncode == 0
    (state,) = machine.state()
    assert machine.calls() == [
        "mount-s3 --read-only --metadata-ttl=indefinite --prefix=corpora/web/ "
        f"--cache={state}/cache --max-cache-size=2048 my-bucket {machine.mount}"
    ]


@pytest.mark.parametrize(
    "bucket", ["--data-bucket=gs://my-bucket", "--data-bucket=s3://my-bucket/"]
)
def test_without_prefix_and_cache_neither_is_named(machine, bucket):
    assert machine.run(bucket).returncode == 0
    (call,) = machine.calls()
    assert call.endswith(f" my-bucket {machine.mount}")
    assert "--only-dir" not in call and "--prefix" not in call and "cache-dir" not in call


def test_the_command_is_what_runs_and_its_code_is_what_is_returned(machine):
    words = ["sh", "-c", 'printf "%s|" "$@"; exit 75', "", "a b", "$HOME", "", "*"]
    done = machine.run(GS, command=words)
    assert (done.returncode, done.stdout) == (75, "a b|$HOME||*|")


def test_a_mount_of_before_stays(machine):
    assert machine.run(GS).returncode == machine.run(GS).returncode == 0
    assert len(machine.calls()) == 1


def test_a_mount_of_something_else_is_made_anew(machine):
    machine.run(GS)
    assert machine.run(GS, "--data-cache-gib=2").returncode == 0
    mounted, taken, again = machine.calls()
    assert taken == f"fusermount3 -uz {machine.mount}"
    assert "--cache-dir" in again and "--cache-dir" not in mounted


def test_a_dead_mount_is_made_anew(machine):
    machine.run(GS)
    for file in machine.mount.iterdir():
        file.unlink()
    machine.mount.rmdir()  # so that it cannot be listed, as behind a program that died
    assert machine.run(GS).returncode == 0
    assert [call.split()[0] for call in machine.calls()] == ["gcsfuse", "fusermount3", "gcsfuse"]


def test_a_mount_of_others_is_left_alone(machine):
    (machine.folder / "mounts").write_text(str(machine.mount))
    done = machine.run(GS)
    assert done.returncode == 2 and machine.calls() == []
    assert "is in use by another mount; give another --data-mount" in done.stderr
    assert machine.run("--unmount", command=()).returncode == 0
    assert machine.calls() == [] and (machine.folder / "mounts").exists()


def test_unmounting_takes_the_cache_away_and_may_be_repeated(machine):
    machine.run(GS, "--data-cache-gib=2")
    for _ in range(2):
        assert machine.run("--unmount", command=()).returncode == 0
    assert [call.split()[0] for call in machine.calls()] == ["gcsfuse", "fusermount3"]
    assert machine.state() == []


@pytest.mark.parametrize("bucket, program", [(GS, "gcsfuse"), (S3, "mount-s3")])
def test_a_program_that_is_not_installed_is_named(machine, bucket, program):
    (machine.bin / program).unlink()
    done = machine.run(bucket, command=("echo", "ran"))
    assert (done.returncode, done.stdout) == (2, "")
    assert f"there is no {program} on " in done.stderr and "install it" in done.stderr
    assert machine.calls() == []


def test_a_failed_installation_is_tried_again_by_the_launcher(machine):
    (machine.bin / "gcsfuse").unlink()
    done = machine.run(GS, "--install", command=("echo", "ran"))
    assert (done.returncode, done.stdout) == (1, "")
    assert "gcsfuse was not installed" in done.stderr
    assert any(
        call.startswith("curl https://packages.cloud.google.com") for call in machine.calls()
    )


def test_a_bucket_out_of_reach_is_tried_again_by_the_launcher(machine):
    (machine.folder / "down").touch()
    done = machine.run(GS, command=("echo", "ran"))
    assert (done.returncode, done.stdout) == (1, "")
    assert "gcsfuse ended with 3, and gs://my-bucket/corpora/web is not mounted" in done.stderr


def test_a_prefix_with_nothing_in_it_is_refused(machine):
    (machine.folder / "bucket" / "manifest.json").unlink()
    done = machine.run(GS, command=("echo", "ran"))
    assert (done.returncode, done.stdout) == (2, "")
    assert "there is nothing in gs://my-bucket/corpora/web" in done.stderr
    assert [call.split()[0] for call in machine.calls()] == ["gcsfuse", "fusermount3"]


def test_a_folder_that_cannot_be_made_is_refused(machine):
    machine.mount.write_text("a file")
    done = machine.run(GS)
    assert done.returncode == 2 and machine.calls() == []
    assert "cannot be made" in done.stderr and "give a --data-mount" in done.stderr

"""Submits `layerskip` to SLURM: one task a node with all of its GPUs, restarted by requeueing.

usage: launch/slurm.sh --nodes=N --gpus=N [options] -- train --config=... --workdir=... [...]

  --nodes=N          nodes; each runs one task
  --gpus=N           GPUs of each node; 0 for nodes of CPUs alone
  --time=LIMIT       time limit of each stay in the queue's machines, as of sbatch (1-00:00:00)
  --name=NAME        of the job (default: layerskip)
  --partition=NAME --account=NAME --qos=NAME    as of sbatch
  --constraint=LIST  features that the nodes must have, as of sbatch
  --python=PATH      that runs layerskip on the nodes (default: python3 on their PATH)
  --data-bucket=gs://BUCKET[/PREFIX] or s3://...    prepared data, mounted read-only on each node
                     by gcsfuse or mount-s3, which have to be installed there
  --data-mount=/PATH where: a folder that the user may make on each node, as /tmp/data
  --data-cache-gib=N a file cache in TMPDIR or /tmp of each node; as large as the data, or it may
                     slow the reading down (default: 0, none)
  --log=FILE         output, appended to; %j is the job (default: slurm-%j.out)
  --restarts=N       restarts after crashes within one allocation (default: 3)
  --grace=SECONDS    to save in: SIGTERM comes this long before the time limit (default: 300)
  --dry-run          print the sbatch command, run nothing

The workdir must be one folder for all nodes: NFS, Lustre, gs://... or s3://...
Exit code 75 of the run requeues the job under the same id, until the run is done; 2 (bad input)
ends it; anything else restarts it in the allocation, --restarts times. `scancel JOB` ends it
for good, `scancel --signal=TERM JOB` saves and requeues it.
launch/slurm.sbatch is what runs on the nodes; it explains the NCCL settings.
"""

from pathlib import Path

import bucket
from options import Options, refuse


def main() -> None:
    """Submits the job."""
    options = Options.parse(
        __doc__,
        "nodes gpus time name=layerskip partition account qos constraint python=python3 "
        "log=slurm-%j.out restarts=3 grace=300".split()
        + bucket.OPTIONS,
        lists="",
        flags="dry-run",
    )
    options.need("nodes gpus name python log")
    options.whole(1, "nodes")
    options.whole(0, "gpus restarts")
    options.whole(30, "grace")
    options.matching(
        "time",
        "[0-9]+(-[0-9]+)?(:[0-9]+){0,2}",
        "minutes, hours:minutes:seconds or days-hours, as of sbatch",
    )
    if options.grace > 65535:
        refuse(f"--grace={options.grace} must be at most 65535, the longest notice SLURM gives")
    bucket.check(options, "gs s3", "the nodes", mount="")
    folder = Path(__file__).resolve().parent
    mounted = [*options.given(" ".join(bucket.OPTIONS)), f"--mounted={folder / 'mounted.sh'}"]
    submit = [
        "sbatch",
        f"--job-name={options.name}",
        f"--nodes={options.nodes}",
        "--ntasks-per-node=1",
        *[f"--gpus-per-node={options.gpus}"] * bool(options.gpus),
        # The nodes whole: all cores to read data with, and all memory.
        "--exclusive",
        "--mem=0",
        # Back into the queue after a preemption or a node that fails, and by scontrol requeue.
        "--requeue",
        # To the tasks, not to the batch shell: each process hears it, and they save together.
        f"--signal=TERM@{options.grace}",
        # A requeued job would otherwise truncate its own log.
        "--open-mode=append",
        f"--output={options.log}",
        *options.given("time partition account qos constraint"),
        str(folder / "slurm.sbatch"),
        *options.given("python"),
        f"--restarts={options.restarts}",
        *(mounted if options.data_bucket else []),
        "--",
        *options.command,
    ]
    options.become(submit, "run it on a login node of the cluster")


if __name__ == "__main__":
    main()

r"""Runs `layerskip` on GPU nodes of Kubernetes as a JobSet: one pod a node, restarted as one.

usage: launch/kubernetes_gpu.sh --name=NAME --nodes=N --gpus=N --image=IMAGE [options] \
           -- train --config=... --workdir=gs://... [...]

  --name=NAME        of the JobSet
  --nodes=N          nodes, each with one pod
  --gpus=N           GPUs of each node
  --image=IMAGE      with layerskip_jax and jax[cuda12] or jax[cuda13] installed
  --python=PATH      in the image (default: python3)
  --namespace=NAME   (default: that of the kubectl context)
  --account=NAME     service account of the pods, as for access to buckets
  --queue=NAME       local queue of Kueue, which starts the pods all at once or not yet
  --pvc=CLAIM:/PATH  mount a volume claim (NFS, ReadWriteMany) there, to hold the workdir
  --data-bucket=gs://BUCKET[/PREFIX] or s3://...    prepared data, mounted read-only: on GKE by
                     the driver of Cloud Storage FUSE; s3:// by that of Mountpoint for Amazon S3
  --data-mount=/PATH where (default: /data)
  --data-cache-gib=N a file cache on each node's disk; as large as the data, or it may slow the
                     reading down (default: 0, none)
  --secret=NAME      secret whose keys become variables (keys of S3, of Weights & Biases)
  --env=NAME=VALUE   a variable of the processes; any number of times
  --limit=NAME=N     a further resource of each pod, such as rdma/ib=1; any number of times
  --node-selector=LABEL=VALUE     of nodes to run on; any number of times
  --restarts=N       restarts after crashes (default: 3)
  --grace=SECONDS    from SIGTERM to SIGKILL, to save in (default: 600)
  --dry-run          print the manifest, run nothing: kubectl create -f takes it as it is

--config is a file of the image, or of the volume. The workdir must be one folder for all pods:
gs://..., s3://..., or under the path of --pvc.
Exit code 75 of the run, and evictions, restart the JobSet always; 2 (bad input) fails it;
anything else restarts it --restarts times. `kubectl delete jobset NAME` saves, then ends.
"""

import bucket
import jobset
from options import Options


def main() -> None:
    """Creates the JobSet."""
    options = Options.parse(
        __doc__,
        "name nodes gpus image python namespace account queue pvc secret restarts=3 "
        "grace=600".split()
        + bucket.OPTIONS,
        lists="env limit node-selector",
        flags="dry-run",
    )
    options.need("name nodes gpus image")
    options.whole(1, "nodes gpus")
    bucket.check(options, "gs s3", "the drivers here")
    jobset.check(options)
    options.pairs("env limit node-selector")
    if not any(pair.startswith("NCCL_DEBUG=") for pair in options.env):
        options.env.insert(0, "NCCL_DEBUG=WARN")
    found = jobset.values(options)
    limit = dict(pair.split("=", 1) for pair in options.limit)
    # NCCL exchanges through /dev/shm between GPUs without a link; a pod's own is 64 MiB.
    found["volumes"].append({"name": "shm", "emptyDir": {"medium": "Memory"}})
    found["mounts"].append({"name": "shm", "mountPath": "/dev/shm"})
    found |= {
        "slices": 1,
        "pods": options.nodes,
        "coordinator": f"{options.name}-worker-0-0.{options.name}:8476",
        "limits": {"nvidia.com/gpu": str(options.gpus), **limit},
        # Memory that a network adapter reads itself has to be locked.
        "security": {"capabilities": {"add": ["IPC_LOCK"]}} if limit else None,
    }
    jobset.submit(options, "gpu", found)


if __name__ == "__main__":
    main()

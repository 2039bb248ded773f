r"""Runs `layerskip` on TPU slices of a GKE cluster: as a JobSet, or through xpk with --xpk.

usage: launch/gke_tpu.sh --name=NAME --accelerator=TYPE --topology=AxB[xC] --image=IMAGE \
           [options] -- train --config=... --workdir=gs://... [...]
       launch/gke_tpu.sh --xpk --name=NAME --cluster=CLUSTER --tpu-type=TYPE --image=IMAGE \
           [options] -- train --config=... --workdir=gs://... [...]

  --name=NAME        of the JobSet or workload
  --slices=N         slices, each a node pool of its own (default: 1)
  --image=IMAGE      with layerskip_jax and jax[tpu] installed
  --python=PATH      in the image (default: python3)
  --env=NAME=VALUE   a variable of the processes; any number of times
  --restarts=N       restarts after crashes (default: 3); with --xpk of all kinds (default: 100)
  --grace=SECONDS    from SIGTERM to SIGKILL, to save in (default: 600)
  --dry-run          print the manifest, or the xpk command, and run nothing
a JobSet also takes
  --accelerator=TYPE the nodes' cloud.google.com/gke-tpu-accelerator, as tpu-v6e-slice
  --topology=AxB[xC] chips of one slice, as 4x4
  --chips=N          chips of each host (default: 4)
  --spot             on spot nodes
  --reservation=NAME on nodes of this reservation
  --namespace=NAME   (default: that of the kubectl context)
  --account=NAME     service account of the pods, as for access to buckets
  --queue=NAME       local queue of Kueue, which starts the pods all at once or not yet
  --pvc=CLAIM:/PATH  mount a volume claim (NFS, ReadWriteMany) there, to hold the workdir
  --data-bucket=gs://BUCKET[/PREFIX]    prepared data, mounted read-only by GKE's driver of Cloud
                     Storage FUSE; the service account needs to read it (Workload Identity)
  --data-mount=/PATH where (default: /data)
  --data-cache-gib=N a file cache on each node's disk; as large as the data, or it may slow the
                     reading down (default: 0, none)
  --secret=NAME      secret whose keys become variables
  --node-selector=LABEL=VALUE     of nodes to run on; any number of times
and xpk
  --cluster=NAME     of xpk, which made it
  --tpu-type=TYPE    of one slice, as v6e-16
  --project=NAME --zone=NAME      (default: those of gcloud)

--config is a file of the image, or of the volume. The workdir must be one folder for all pods:
gs://..., s3://..., or under the path of --pvc.
Exit code 75 of the run, and evictions, restart the JobSet always; 2 (bad input) fails it;
anything else restarts it --restarts times. `kubectl delete jobset NAME` saves, then ends.
xpk counts every restart alike, so with it a run that is preempted --restarts times fails; it
mounts buckets by `xpk storage attach`.
"""

import math

import bucket
import jobset
from options import Options, quoted, refuse


def main() -> None:
    """Creates the JobSet or workload."""
    options = Options.parse(
        __doc__,
        "name slices=1 image python restarts grace=600 accelerator topology chips reservation "
        "namespace account queue pvc secret cluster tpu-type project zone".split()
        + bucket.OPTIONS,
        lists="env node-selector",
        flags="dry-run spot xpk",
    )
    options.need("name image")
    options.whole(1, "slices")
    options.pairs("env node-selector")
    (with_xpk if options.xpk else with_jobset)(options)


def with_xpk(options: Options) -> None:
    """Creates the workload."""
    options.need("cluster tpu-type")
    options.exclude(
        "not of xpk, but of a JobSet without --xpk",
        "accelerator topology chips spot reservation namespace account queue pvc secret "
        "node-selector data-bucket data-mount data-cache-gib",
    )
    options.restarts = options.restarts or "100"
    jobset.check(options)
    line = quoted(options.python or "python3", "-m", "layerskip_jax", *options.command)
    create = [
        *("xpk", "workload", "create", f"--workload={options.name}"),
        *options.given("cluster tpu-type"),
        f"--num-slices={options.slices}",
        f"--docker-image={options.image}",
        f"--max-restarts={options.restarts}",
        # Beside 42 and 127 to 255, which xpk restarts anyway: all but 2, bad input.
        "--restart-on-exit-codes=1,3-126",
        f"--termination-grace-period-seconds={options.grace}",
        *options.given("project zone env"),
        # A shell of xpk's reads it; exec, so that SIGTERM reaches the process and no shell between.
        f"--command=exec {line}",
    ]
    options.become(create, "install it by: pip install xpk")


def with_jobset(options: Options) -> None:
    """Creates the JobSet."""
    options.exclude("of xpk; it needs --xpk", "cluster tpu-type project zone")
    options.need("accelerator topology")
    options.chips, options.restarts = options.chips or "4", options.restarts or "3"
    options.whole(1, "chips")
    options.matching("topology", "[1-9][0-9]*(x[1-9][0-9]*){1,2}", "like 4x4 or 2x2x4")
    bucket.check(options, "gs", "TPUs of GKE")
    jobset.check(options)
    if options.spot and options.reservation:
        refuse(f"--spot and --reservation={options.reservation} exclude each other")
    slices, topology, chips = options.given("slices topology chips")
    total = math.prod(map(int, options.topology.split("x")))
    hosts, rest = divmod(total, options.chips)
    if rest:
        refuse(f"{topology} has {total} chips, which hosts with {chips} do not divide")
    if options.slices > 1 and hosts == 1:
        refuse(f"{slices}: GKE joins slices of several hosts only, and {topology} is one")
    spot = "true" if options.spot else ""
    labels = {
        "gke-tpu-accelerator": options.accelerator,
        "gke-tpu-topology": options.topology,
        "gke-spot": spot,
        "reservation-name": options.reservation,
    }
    labels = {f"cloud.google.com/{name}": value for name, value in labels.items() if value}
    found = jobset.values(options)
    found["pods"] = hosts
    found["node_selector"] = labels | found["node_selector"]
    found["limits"] = {"google.com/tpu": str(options.chips)}
    taint = {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": spot}
    found["tolerations"] = [{**taint, "effect": "NoSchedule"}] if spot else None
    jobset.submit(options, "tpu", found)


if __name__ == "__main__":
    main()

#!/usr/bin/env bash
# Runs `layerskip` on TPU slices of a GKE cluster: as a JobSet, or through xpk with --xpk.
#
# usage: launch/gke_tpu.sh --name=NAME --accelerator=TYPE --topology=AxB[xC] --image=IMAGE \
#            [options] -- train --config=... --workdir=gs://... [...]
#        launch/gke_tpu.sh --xpk --name=NAME --cluster=CLUSTER --tpu-type=TYPE --image=IMAGE \
#            [options] -- train --config=... --workdir=gs://... [...]
#
#   --name=NAME        of the JobSet or workload
#   --slices=N         slices, each a node pool of its own (default: 1)
#   --image=IMAGE      with layerskip_jax and jax[tpu] installed
#   --python=PATH      in the image (default: python3)
#   --env=NAME=VALUE   a variable of the processes; any number of times
#   --restarts=N       restarts after crashes (default: 3); with --xpk of all kinds (default: 100)
#   --grace=SECONDS    from SIGTERM to SIGKILL, to save in (default: 600)
#   --dry-run          print the manifest, or the xpk command, and run nothing
# a JobSet also takes
#   --accelerator=TYPE the nodes' cloud.google.com/gke-tpu-accelerator, as tpu-v6e-slice
#   --topology=AxB[xC] chips of one slice, as 4x4
#   --chips=N          chips of each host (default: 4)
#   --spot             on spot nodes
#   --reservation=NAME on nodes of this reservation
#   --namespace=NAME   (default: that of the kubectl context)
#   --account=NAME     service account of the pods, as for access to buckets
#   --queue=NAME       local queue of Kueue, which starts the pods all at once or not yet
#   --pvc=CLAIM:/PATH  mount a volume claim (NFS, ReadWriteMany) there, to hold the workdir
#   --secret=NAME      secret whose keys become variables
#   --node-selector=LABEL=VALUE     of nodes to run on; any number of times
# and xpk
#   --cluster=NAME     of xpk, which made it
#   --tpu-type=TYPE    of one slice, as v6e-16
#   --project=NAME --zone=NAME      (default: those of gcloud)
#
# --config is a file of the image, or of the volume. The workdir must be one folder for all pods:
# gs://..., s3://..., or under the path of --pvc.
# Exit code 75 of the run, and evictions, restart the JobSet always; 2 (bad input) fails it;
# anything else restarts it --restarts times. `kubectl delete jobset NAME` saves, then ends.
# xpk counts every restart alike, so with it a run that is preempted --restarts times fails.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=common.sh
source "$here/common.sh"
# shellcheck source=kubernetes.sh
source "$here/kubernetes.sh"

OPTIONS="name slices image python restarts grace accelerator topology chips reservation namespace
 account queue pvc secret cluster tpu-type project zone"
OPTIONS=${OPTIONS//$'\n'/}
LISTS="env node-selector"
FLAGS="dry-run spot xpk"
name='' slices=1 image='' python='' restarts='' grace=600 accelerator='' topology='' chips=''
reservation='' namespace='' account='' queue='' pvc='' secret='' cluster='' tpu_type=''
project='' zone='' dry_run='' spot='' xpk='' env=() node_selector=()
parse_arguments "$@"

need name image
whole 1 slices
pairs env ${env[@]+"${env[@]}"}
pairs node-selector ${node_selector[@]+"${node_selector[@]}"}

if [[ -n $xpk ]]; then
  need cluster tpu-type
  exclusive "not of xpk, but of a JobSet without --xpk" accelerator topology chips spot \
    reservation namespace account queue pvc secret node-selector
  restarts=${restarts:-100}
  check_kubernetes
  # A shell of xpk's reads it; exec, so that its SIGTERM reaches the process and no shell between.
  line="exec $(quoted "${python:-python3}" -m layerskip_jax "${COMMAND[@]}")"
  create=(
    xpk workload create
    "--workload=$name"
    "--cluster=$cluster"
    "--tpu-type=$tpu_type"
    "--num-slices=$slices"
    "--docker-image=$image"
    "--max-restarts=$restarts"
    # Beside 42 and 127 to 255, which xpk restarts anyway: all but 2, bad input.
    "--restart-on-exit-codes=1,3-126"
    "--termination-grace-period-seconds=$grace"
    ${project:+"--project=$project"}
    ${zone:+"--zone=$zone"}
    ${env[@]+"${env[@]/#/--env=}"}
    "--command=$line"
  )
  if [[ -n $dry_run ]]; then
    quoted "${create[@]}"
    echo
    exit 0
  fi
  command -v xpk > /dev/null || refuse "there is no xpk here; install it by: pip install xpk"
  exec "${create[@]}"
fi

exclusive "of xpk; it needs --xpk" cluster tpu-type project zone
need accelerator topology
chips=${chips:-4}
restarts=${restarts:-3}
whole 1 chips
matching topology '^[1-9][0-9]*(x[1-9][0-9]*){1,2}$' "like 4x4 or 2x2x4"
check_kubernetes
[[ -z $spot || -z $reservation ]] ||
  refuse "--spot and --reservation=$reservation exclude each other"
total=$((${topology//x/*}))
((total % chips == 0)) ||
  refuse "--topology=$topology has $total chips, which hosts with --chips=$chips do not divide"
hosts=$((total / chips))
((slices == 1 || hosts > 1)) ||
  refuse "--slices=$slices: GKE joins slices of several hosts only, and --topology=$topology is one"

submit jobset_tpu.yaml "name=$name" "slices=$slices" "hosts=$hosts" "chips=$chips" \
  "accelerator=$accelerator" "topology=$topology" "spot=$spot" "reservation=$reservation" \
  "image=$image" "python=$python" "namespace=$namespace" "account=$account" "queue=$queue" \
  "pvc=$pvc" "secret=$secret" "restarts=$restarts" "grace=$grace" \
  ${env[@]+"${env[@]/#/env=}"} ${node_selector[@]+"${node_selector[@]/#/node_selector=}"}

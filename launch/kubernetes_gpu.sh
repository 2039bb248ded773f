#!/usr/bin/env bash
# Runs `layerskip` on GPU nodes of Kubernetes as a JobSet: one pod a node, restarted as one.
#
# usage: launch/kubernetes_gpu.sh --name=NAME --nodes=N --gpus=N --image=IMAGE [options] \
#            -- train --config=... --workdir=gs://... [...]
#
#   --name=NAME        of the JobSet
#   --nodes=N          nodes, each with one pod
#   --gpus=N           GPUs of each node
#   --image=IMAGE      with layerskip_jax and jax[cuda12] or jax[cuda13] installed
#   --python=PATH      in the image (default: python3)
#   --namespace=NAME   (default: that of the kubectl context)
#   --account=NAME     service account of the pods, as for access to buckets
#   --queue=NAME       local queue of Kueue, which starts the pods all at once or not yet
#   --pvc=CLAIM:/PATH  mount a volume claim (NFS, ReadWriteMany) there, to hold the workdir
#   --secret=NAME      secret whose keys become variables (keys of S3, of Weights & Biases)
#   --env=NAME=VALUE   a variable of the processes; any number of times
#   --limit=NAME=N     a further resource of each pod, such as rdma/ib=1; any number of times
#   --node-selector=LABEL=VALUE     of nodes to run on; any number of times
#   --restarts=N       restarts after crashes (default: 3)
#   --grace=SECONDS    from SIGTERM to SIGKILL, to save in (default: 600)
#   --dry-run          print the manifest, run nothing: kubectl create -f takes it as it is
#
# --config is a file of the image, or of the volume. The workdir must be one folder for all pods:
# gs://..., s3://..., or under the path of --pvc.
# Exit code 75 of the run, and evictions, restart the JobSet always; 2 (bad input) fails it;
# anything else restarts it --restarts times. `kubectl delete jobset NAME` saves, then ends.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=common.sh
source "$here/common.sh"
# shellcheck source=kubernetes.sh
source "$here/kubernetes.sh"

OPTIONS="name nodes gpus image python namespace account queue pvc secret restarts grace"
LISTS="env limit node-selector"
FLAGS="dry-run"
name='' nodes='' gpus='' image='' python='' namespace='' account='' queue='' pvc='' secret=''
restarts=3 grace=600 dry_run='' env=() limit=() node_selector=()
parse_arguments "$@"
need name nodes gpus image
whole 1 nodes gpus
check_kubernetes
pairs env ${env[@]+"${env[@]}"}
pairs limit ${limit[@]+"${limit[@]}"}
pairs node-selector ${node_selector[@]+"${node_selector[@]}"}

submit jobset_gpu.yaml "name=$name" "nodes=$nodes" "gpus=$gpus" "image=$image" "python=$python" \
  "namespace=$namespace" "account=$account" "queue=$queue" "pvc=$pvc" "secret=$secret" \
  "restarts=$restarts" "grace=$grace" ${env[@]+"${env[@]/#/env=}"} \
  ${limit[@]+"${limit[@]/#/limit=}"} ${node_selector[@]+"${node_selector[@]/#/node_selector=}"}

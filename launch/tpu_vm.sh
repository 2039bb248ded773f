#!/usr/bin/env bash
# Runs `layerskip` on TPU VMs: requests a queued resource, installs, runs on all workers, and
# requests it anew when it was preempted.
#
# usage: launch/tpu_vm.sh --name=NAME --zone=ZONE --type=TYPE --runtime=VERSION [options] \
#            -- train --config=... --workdir=gs://... [...]
#
#   --name=NAME        of the queued resource; one that exists already is used
#   --zone=ZONE --project=NAME      (default project: that of gcloud)
#   --type=TYPE        accelerator of one slice, as v6e-16
#   --runtime=VERSION  of the TPU software, as v2-alpha-tpuv6e
#   --slices=N         slices, joined by the data centre's network (default: 1)
#   --spot             capacity that may be taken away
#   --reserved         capacity of a reservation
#   --network=NAME --subnetwork=NAME --account=EMAIL    as of gcloud; account: service account
#   --internal         no external addresses; ssh goes through Identity-Aware Proxy
#   --setup=COMMAND    run on each worker in the unpacked repository before each first start
#                      (default: makes .venv by uv, with this package and jax[tpu])
#   --python=PATH      that runs layerskip there (default: .venv/bin/python)
#   --env=NAME=VALUE   a variable of the processes; any number of times
#   --restarts=N       restarts after crashes (default: 3)
#   --poll=SECONDS     between looks at the state of the resource (default: 30)
#   --keep             leave the resource at the end; without it, it is deleted
#   --dry-run          print the commands in their order, run nothing
#
# The commit checked out here is what runs there. The workdir must be gs://..., s3://... or an
# absolute path that --setup mounts: workers share no disk, and theirs go with the resource.
# Exit code 75 of the run restarts it always; 2 (bad input) never; anything else --restarts times.
# Several workers at once need the key in ssh's agent: ssh-add ~/.ssh/google_compute_engine.
# A resource that was preempted is deleted and requested again, as often as it takes. Control-C
# leaves it as it is, and the same command goes on.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=common.sh
source "$here/common.sh"

OPTIONS="name zone project type runtime slices network subnetwork account setup python"
OPTIONS+=" restarts poll"
LISTS="env"
FLAGS="spot reserved internal keep dry-run"
name='' zone='' project='' type='' runtime='' slices=1 network='' subnetwork='' account=''
# uv, as the system's Python is older than what this package runs on.
setup='python3 -m pip install --quiet --user uv && '
setup+='python3 -m uv venv --quiet --python=3.12 .venv && '
setup+='python3 -m uv pip install --quiet --python=.venv/bin/python . "jax[tpu]"'
python=.venv/bin/python restarts=3 poll=30 spot='' reserved='' internal='' keep='' dry_run='' env=()
parse_arguments "$@"
need name zone type runtime setup python
whole 1 slices
whole 0 restarts poll
matching name '^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$' \
  "at most 40 small letters, digits and hyphens, the first a letter"
pairs env ${env[@]+"${env[@]}"}
[[ -z $spot || -z $reserved ]] || refuse "--spot and --reserved exclude each other"
folder=$(workdir)
if [[ -n $folder && $folder != *://* && $folder != /* ]]; then
  refuse "--workdir=$folder would lie on the disk of each worker and go with it; give gs://...," \
    "s3://..., or an absolute path that --setup mounts"
fi

tpus=(gcloud compute tpus queued-resources)
where=("--zone=$zone" ${project:+"--project=$project"})
# All at once: in batches, the first would wait for processes of the next for ever.
# --quiet: no questions, as about a first key for ssh.
everywhere=("${where[@]}" --node=all --worker=all --batch-size=all --quiet
  ${internal:+--tunnel-through-iap})
if ((slices > 1)); then
  nodes=("--node-count=$slices" "--node-prefix=$name")
else
  nodes=("--node-id=$name")
fi
create=("${tpus[@]}" create "$name" "${where[@]}" "--accelerator-type=$type"
  "--runtime-version=$runtime" "${nodes[@]}" ${spot:+--spot} ${reserved:+--reserved}
  ${network:+"--network=$network"} ${subnetwork:+"--subnetwork=$subnetwork"}
  ${account:+"--service-account=$account"} ${internal:+--internal-ips})
describe=("${tpus[@]}" describe "$name" "${where[@]}" "--format=value(state.state)")
# --force: with its nodes.
delete=("${tpus[@]}" delete "$name" "${where[@]}" --quiet --force)
archive=layerskip.tar.gz scratch=''
if [[ -z $dry_run ]]; then
  command -v gcloud > /dev/null || refuse "there is no gcloud here; install the Google Cloud CLI"
  scratch=$(mktemp -d)/
  trap 'rm -rf "$scratch"' EXIT
fi
pack=(git -C "${here%/*}" archive --format=tar.gz "--output=$scratch$archive" HEAD)
copy=("${tpus[@]}" scp "$scratch$archive" "$name:$archive" "${everywhere[@]}")
# A marker, since gcloud returns the code of one worker only, and one of its own for lost ones.
marker=layerskip-exit-code
install="rm -rf layerskip && mkdir layerskip && tar -xzf $archive -C layerskip"
install+=" && cd layerskip && $setup"
# The lock waits for a process of before whose connection was lost: it would hold the chips.
run="cd layerskip && $(quoted flock --timeout=600 ../layerskip.lock env ${env[@]+"${env[@]}"} \
  "$python" -m layerskip_jax "${COMMAND[@]}"); code=\$?; echo $marker \$code; exit \$code"
on_all() { "${tpus[@]}" ssh "$name" "${everywhere[@]}" "--command=$1"; }

if [[ -n $dry_run ]]; then
  for step in create pack copy; do
    words="${step}[@]"
    quoted "${!words}" && echo
  done
  for line in "$install" "$run"; do
    quoted "${tpus[@]}" ssh "$name" "${everywhere[@]}" "--command=$line" && echo
  done
  [[ -n $keep ]] || { quoted "${delete[@]}" && echo; }
  exit 0
fi
interrupted() {
  say "interrupted; $name is left as it is, and the same command goes on with it"
  exit "$RESTART"
}
trap interrupted INT TERM

# ABSENT is a resource that does not exist; UNKNOWN, that gcloud could not tell.
state() {
  if ! "${describe[@]}" 2> "${scratch}error"; then
    if grep --quiet NOT_FOUND "${scratch}error"; then echo ABSENT; else echo UNKNOWN; fi
  fi
}

# Returns once the resource is there; requests it if it is not.
obtain() {
  local now last=''
  while true; do
    now=$(state)
    [[ $now == "$last" ]] || say "$name is $now"
    last=$now
    [[ $now == UNKNOWN ]] || seen=1
    case $now in
      ACTIVE) return ;;
      ABSENT)
        # An error here, such as of the quota or of the arguments, is no preemption.
        "${create[@]}" || finish 1 "the resource was not requested"
        fresh=1
        ;;
      SUSPENDED) "${delete[@]}" || sleep "$poll" ;;
      UNKNOWN)
        cat "${scratch}error" >&2
        [[ -n $seen ]] || refuse "gcloud does not tell of $name in zone $zone, as it says above"
        sleep "$poll"
        ;;
      FAILED)
        "${tpus[@]}" describe "$name" "${where[@]}" >&2 || true
        finish 1 "the request failed, as said above"
        ;;
      *) sleep "$poll" ;;
    esac
  done
}

finish() {
  say "$2"
  if [[ -n $keep ]]; then
    say "$name is kept; to delete it: $(quoted "${delete[@]}")"
  elif [[ $(state) != ABSENT ]]; then
    "${delete[@]}" ||
      say "$name was not deleted and costs on; to delete it: $(quoted "${delete[@]}")"
  fi
  exit "$1"
}

fresh=1 seen='' crashes=0
while true; do
  obtain
  codes=''
  if [[ -z $fresh ]] || { "${pack[@]}" && "${copy[@]}" && on_all "$install"; }; then
    fresh=''
    on_all "$run" 2>&1 | tee "${scratch}log" || true
    codes=$(sed -n "s/^.*$marker \([0-9][0-9]*\)[[:space:]]*$/\1/p" "${scratch}log" |
      sort -nu | xargs)
  fi
  case " $codes " in
    " 0 ") finish 0 "the run is done" ;;
    *" $BAD_INPUT "*) finish "$BAD_INPUT" "bad input: not tried again" ;;
    *" $RESTART "*)
      say "exit code $RESTART: the run goes on"
      continue
      ;;
  esac
  # Workers that are taken away look like a crash until the state tells.
  sleep "$poll"
  now=$(state)
  if [[ $now != ACTIVE ]]; then
    say "$name is $now: it was taken away, and is requested again"
    continue
  fi
  crashes=$((crashes + 1))
  ((crashes <= restarts)) ||
    finish 1 "crash $crashes (exit codes: ${codes:-none}), and --restarts=$restarts: giving up"
  say "crashed (exit codes: ${codes:-none}): restarting, $crashes of $restarts"
done

# shellcheck shell=bash
# What the launch scripts for Kubernetes share: checks, and the manifest to kubectl. Sourced.
# shellcheck disable=SC2154  # the variables are options of the scripts

# How names may look in Kubernetes; pods append -worker-0-00000 to it, and have at most 63.
check_kubernetes() {
  matching name '^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$' \
    "at most 40 small letters, digits and hyphens, the first a letter"
  matching namespace '^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$' "the name of a namespace"
  whole 0 restarts
  whole 1 grace
  matching pvc '^[a-z0-9][-a-z0-9.]*:/.+' "CLAIM:/PATH, a volume claim and where to mount it"
  local folder
  folder=$(workdir)
  # Anything else is in the container, and gone with it at the first restart.
  if [[ -n $folder && $folder != *://* && ! (-n $pvc && $folder/ == "${pvc#*:}"/*) ]]; then
    refuse "--workdir=$folder would be lost with the pod; give gs://..., s3://..., or a folder" \
      "under the path of a --pvc=CLAIM:/PATH"
  fi
}

# submit TEMPLATE NAME=VALUE...: prints the manifest, or has kubectl create its JobSet.
submit() {
  local manifest
  manifest=$(python3 "$here/jobset.py" "$@" -- "${COMMAND[@]}" && printf x) || exit 1
  manifest=${manifest%x}
  if [[ -n $dry_run ]]; then
    printf '%s' "$manifest"
    return
  fi
  command -v kubectl > /dev/null ||
    refuse "there is no kubectl here; --dry-run prints the manifest for one elsewhere"
  # Not apply: over a JobSet of that name it would change nothing, or fail on what is immutable.
  printf '%s' "$manifest" | kubectl create --filename=-
  say "to follow it: kubectl get jobset $name${namespace:+ --namespace=$namespace}"
}

#!/usr/bin/env bash
# Mounts a bucket of prepared data on this machine, read-only, and becomes the command behind --.
#
# usage: launch/mounted.sh --data-bucket=gs://BUCKET[/PREFIX] --data-mount=/PATH \
#            [--data-cache-gib=N] [--install] -- COMMAND [...]
#        launch/mounted.sh --data-mount=/PATH --unmount
#
# gs:// by gcsfuse, s3:// by mount-s3, which have to be installed; --install installs gcsfuse by
# apt, with sudo. A mount of before stays, with its cache, where it is alive and as asked for;
# otherwise it is made anew. The cache is in TMPDIR (default: /tmp), and --unmount removes it.
# Ends with 2 where trying again would not help.
set -euo pipefail

say() { printf 'launch/mounted.sh: %s\n' "$*" >&2; }
refuse() {
  say "$*"
  exit 2
}

bucket='' mount='' gib=0 install='' unmount=''
while (($#)); do
  case $1 in
    --data-bucket=*) bucket=${1#*=} ;;
    --data-mount=*) mount=${1#*=} ;;
    --data-cache-gib=*) gib=${1#*=} ;;
    --install) install=yes ;;
    --unmount) unmount=yes ;;
    --)
      shift
      break
      ;;
    *) refuse "'$1' is no option" ;;
  esac
  shift
done
# Of this user and this mount: the cache, and how it was mounted.
state=${TMPDIR:-/tmp}/layerskip-data-$UID${mount//\//-}

# Also where the program behind it is dead, so that the folder itself cannot be asked.
is_mounted() { [[ $(findmnt --noheadings --output=FSTYPE --mountpoint "$mount") == fuse* ]]; }

take_away() {
  local program=fusermount
  if command -v fusermount3 > /dev/null; then program=fusermount3; fi
  # -z: what still reads from it may go on.
  "$program" -uz "$mount"
}

if [[ $unmount ]]; then
  if [[ -e $state ]]; then
    if is_mounted; then take_away; fi
    rm -rf "$state"
  fi
  exit
fi

path=${bucket#*://}
path=${path%/}
name=${path%%/*}
prefix=${path#"$name"}
prefix=${prefix#/}
case $bucket in
  gs://*)
    words=(gcsfuse -o ro --implicit-dirs)
    if [[ $prefix ]]; then words+=("--only-dir=$prefix"); fi
    # Prepared data is written once: what is known of a file stays known.
    words+=(--metadata-cache-ttl-secs=-1 --kernel-list-cache-ttl-secs=-1)
    if ((gib)); then
      words+=("--cache-dir=$state/cache" "--file-cache-max-size-mb=$((gib * 1024))")
      # Windows are read in no order: a whole file comes when the first of its windows is read.
      words+=(--file-cache-cache-file-for-range-read --file-cache-enable-parallel-downloads)
    fi
    ;;
  s3://*)
    words=(mount-s3 --read-only --metadata-ttl=indefinite)
    if [[ $prefix ]]; then words+=("--prefix=$prefix/"); fi
    if ((gib)); then words+=("--cache=$state/cache" "--max-cache-size=$((gib * 1024))"); fi
    ;;
  *) refuse "--data-bucket=$bucket must be gs://... or s3://..." ;;
esac
program=${words[0]}
words+=("$name" "$mount")

# gcsfuse from Google's own packages, as its documentation has it; for Debian and Ubuntu.
install_gcsfuse() {
  local codename key=/usr/share/keyrings/cloud.google.asc
  codename=$(. /etc/os-release && echo "$VERSION_CODENAME")
  # A machine that has just started is installing its own updates.
  local apt=(sudo -n apt-get --quiet --yes -o DPkg::Lock::Timeout=600)
  curl --fail --silent --show-error https://packages.cloud.google.com/apt/doc/apt-key.gpg |
    sudo -n tee "$key" > /dev/null &&
    echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$codename main" |
    sudo -n tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null &&
    "${apt[@]}" update && "${apt[@]}" install gcsfuse
}

is_the_same() {
  [[ -e $state/mounted && $(< "$state/mounted") == "${words[*]}" ]] && ls "$mount" > /dev/null 2>&1
}

mount_it() {
  if ! command -v "$program" > /dev/null; then
    [[ $install ]] || refuse "there is no $program on $(uname -n), which mounts $bucket; install it"
    say "installing $program"
    install_gcsfuse >&2 || {
      say "$program was not installed"
      exit 1
    }
  fi
  mkdir -p "$mount" 2> /dev/null ||
    { [[ $install ]] && sudo -n mkdir -p "$mount" && sudo -n chown "$UID" "$mount"; } ||
    refuse "$mount cannot be made on $(uname -n); give a --data-mount=/PATH that you may make"
  { mkdir -p "$state/cache" && chmod 700 "$state"; } ||
    refuse "the cache cannot be made; set TMPDIR to a folder for it"
  "${words[@]}" < /dev/null >&2 || {
    say "$program ended with $?, and $bucket is not mounted"
    exit 1
  }
  echo "${words[*]}" > "$state/mounted"
  if [[ ! $(find "$mount" -mindepth 1 -maxdepth 1 -print -quit) ]]; then
    take_away
    refuse "there is nothing in $bucket, or no such bucket or prefix"
  fi
}

if ! is_mounted; then
  mount_it
elif ! is_the_same; then
  [[ -e $state/mounted ]] || refuse "$mount is in use by another mount; give another --data-mount"
  take_away
  mount_it
fi
exec "$@"

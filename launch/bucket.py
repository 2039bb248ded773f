"""What the launch programs share about a bucket of prepared data, mounted where the run reads it.

The names of mount options are those of gcsfuse 2 and 3, of GKE's driver for it, and of the driver
for Mountpoint for Amazon S3, version 2 or newer. Prepared data is written once, so that what is
known of a file is kept for good.
"""

from __future__ import annotations

from options import Options, refuse

OPTIONS = "data-bucket data-mount data-cache-gib".split()
_NAME = "[a-z0-9][-a-z0-9._]{1,220}[a-z0-9]"
# No comma, colon or space: mount options are lists of these.
_PREFIX = r"(/(?!\.{1,2}(/|$))[-A-Za-z0-9_.@+]+)*/?"
_CACHE_MARGIN = 1


def check(options: Options, schemes: str, engine: str, mount: str = "/data") -> None:
    """Refuses what cannot be mounted, and fills in what was not given.

    Args:
      options: with those of `OPTIONS`.
      schemes: of the buckets that the engine mounts.
      engine: how an error calls it.
      mount: where, unless an option says so; nothing where it has to.
    """
    bucket = options.data_bucket
    if not bucket:
        options.exclude("nothing without a --data-bucket", "data-mount data-cache-gib")
        return
    named = "gs://BUCKET[/PREFIX] or s3://BUCKET[/PREFIX], of letters, digits and ._-@+"
    options.matching("data-bucket", f"(gs|s3)://{_NAME}{_PREFIX}", named)
    if bucket.partition("://")[0] not in schemes.split():
        refuse(
            f"--data-bucket={bucket}: {engine} mount {schemes}:// alone; copy the prepared data to "
            "a bucket of that kind"
        )
    options.data_mount = options.data_mount or mount
    options.need("data-mount")
    path = "an absolute path of letters, digits and ._-"
    options.matching("data-mount", r"(/(?!\.{1,2}(/|$))[-A-Za-z0-9_.]+)+", path)
    options.data_cache_gib = options.data_cache_gib or "0"
    options.whole(0, "data-cache-gib")
    if f"{options.workdir()}/".startswith(f"{options.data_mount}/"):
        refuse(
            f"--workdir={options.workdir()} is under --data-mount={options.data_mount}, which is "
            "read-only"
        )


def split(options: Options) -> tuple[str, str, str]:
    """Returns scheme, bucket and prefix, which may be empty."""
    scheme, _, path = options.data_bucket.partition("://")
    name, _, prefix = path.rstrip("/").partition("/")
    return scheme, name, prefix


def volume(options: Options) -> dict:
    """Returns what a JobSet and its volume need: `render`'s values, or nothing without a bucket.

    `volumes` and `mounts` are to be added to those of the pods. Of S3, `volume` and the names
    after it are those of launch/mountpoint.yaml.
    """
    if not options.data_bucket:
        return {"volumes": [], "mounts": [], "pod_metadata": None, "volume": None}
    scheme, name, prefix = split(options)
    mounts = [{"name": "data", "mountPath": options.data_mount, "readOnly": True}]
    found = _cloud_storage(options, name, prefix) if scheme == "gs" else _s3(options, name, prefix)
    return {"mounts": mounts, **found}


def _cloud_storage(options: Options, name: str, prefix: str) -> dict:
    gib = options.data_cache_gib
    words = ["implicit-dirs", f"only-dir={prefix}" * bool(prefix), "metadata-cache:ttl-secs:-1"]
    words += ["file-system:kernel-list-cache-ttl-secs:-1"]
    # What runs gcsfuse beside the container has a quarter of a core and 256 MiB otherwise. A limit
    # of its storage would be one of the whole pod, so the cache is limited by its volume.
    limits = {f"gke-gcsfuse/{what}-limit": "0" for what in ("cpu", "memory", "ephemeral-storage")}
    annotations = {"gke-gcsfuse/volumes": "true", **limits}
    volumes = []
    if gib:
        words += [f"file-cache:max-size-mb:{gib * 1024}"]
        # Windows are read in no order: a whole file comes when the first of its windows is read.
        words += ["file-cache:cache-file-for-range-read:true"]
        words += ["file-cache:enable-parallel-downloads:true"]
        size = f"{gib + _CACHE_MARGIN}Gi"
        annotations["gke-gcsfuse/ephemeral-storage-request"] = size
        # By this name the driver takes it as its cache.
        volumes = [{"name": "gke-gcsfuse-cache", "emptyDir": {"sizeLimit": size}}]
    attributes = {"bucketName": name, "mountOptions": ",".join(filter(None, words))}
    driver = {"driver": "gcsfuse.csi.storage.gke.io", "readOnly": True}
    data = {"name": "data", "csi": {**driver, "volumeAttributes": attributes}}
    metadata = {"annotations": annotations}
    return {"volumes": [data, *volumes], "pod_metadata": metadata, "volume": None}


def _s3(options: Options, name: str, prefix: str) -> dict:
    claim = f"{options.name}-data"
    attributes = {"bucketName": name}
    if options.account:
        # The rights of the pods' service account, not those of the driver's own.
        attributes["authenticationSource"] = "pod"
    if options.data_cache_gib:
        size = f"{options.data_cache_gib}Gi"
        attributes.update(cache="emptyDir", cacheEmptyDirSizeLimit=size)
    words = ["read-only", f"prefix {prefix}/" * bool(prefix), "metadata-ttl indefinite"]
    source = {"claimName": claim, "readOnly": True}
    return {
        "volumes": [{"name": "data", "persistentVolumeClaim": source}],
        "pod_metadata": None,
        # Volumes are the cluster's, claims the namespace's.
        "volume": "-".join(filter(None, [options.namespace, claim])),
        "claim": claim,
        "mount_options": [*filter(None, words)],
        "attributes": attributes,
    }

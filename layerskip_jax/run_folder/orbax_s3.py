"""Orbax's checkpoints on s3://, which orbax 0.12 itself keeps on disks and gs:// alone.

All that is missing is how it names a folder to tensorstore, which has a driver for S3. The three
functions replaced here are those that know of gs://; orbax offers no other place to say it.
"""

import functools
import importlib.metadata
from typing import Any

from etils import epath

from layerskip_jax.run_folder.object_store import kvstore
from layerskip_jax.schema import UserError


@functools.cache
def teach_orbax_s3() -> None:
    """Makes orbax hand folders on s3:// to tensorstore; all else stays as it was.

    Raises:
      UserError: this version of orbax is built otherwise.
    """
    try:
        from orbax.checkpoint._src.path import gcs_utils
        from orbax.checkpoint._src.serialization import tensorstore_utils

        uses_url = tensorstore_utils._use_gcs_driver
        normalize = tensorstore_utils._normalize_path
        store_of = gcs_utils.get_kvstore_for_gcs
    except (AttributeError, ImportError) as error:
        version = importlib.metadata.version("orbax-checkpoint")
        raise UserError(
            f"checkpoints on s3:// need orbax-checkpoint 0.12.8, not {version}; install that, or "
            "take a --workdir on gs:// or a shared disk"
        ) from error

    def is_url(directory: str) -> bool:
        return uses_url(directory) or directory.startswith("s3://")

    def normal(path: str) -> str:
        if not path.startswith("s3://"):
            return normalize(path)
        return f"s3:/{normalize(path.removeprefix('s3:/'))}"

    def store(path: str) -> dict[str, Any]:
        if not path.startswith("s3://"):
            return store_of(path)
        # As it was given: orbax names a file this way, too.
        return {**kvstore(epath.Path(path)), "path": path.split("/", 3)[3]}

    tensorstore_utils._use_gcs_driver = is_url
    tensorstore_utils._normalize_path = normal
    gcs_utils.get_kvstore_for_gcs = store

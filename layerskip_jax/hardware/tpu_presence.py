"""Whether this machine may have a TPU, and keeping libtpu quiet where it has none.

With libtpu installed, jax asks it for TPUs on every machine. Where there is none, libtpu waits for
servers that do not answer and writes warnings about hosts and worker names to standard error.
"""

import os
from collections.abc import Mapping
from pathlib import Path

# Set on TPU VMs, in GKE's pods with TPUs, or by who wants libtpu asked whatever the machine shows.
# TPU_LIBRARY_PATH and TPU_SKIP_MDS_QUERY say nothing: libtpu and jax set them everywhere.
_ASKS_FOR_TPU = (
    "JAX_FORCE_TPU_INIT",
    "TPU_ACCELERATOR_TYPE",
    "TPU_WORKER_HOSTNAMES",
    "TPU_PROCESS_ADDRESSES",
    "TPU_NAME",
)
_GOOGLE = "0x1ae0"  # PCI vendor; its network cards and disks bear it too


def may_have_tpu(environment: Mapping[str, str] = os.environ, root: Path = Path("/")) -> bool:
    """Returns False only where no TPU can be: no device file, no PCI device, no variable names one.

    Args:
      environment: the process's variables.
      root: the root of the file system that holds `dev` and `sys`.
    """
    from jax._src import hardware_utils

    if any(environment.get(name) for name in _ASKS_FOR_TPU):
        return True
    # TPUs up to v4 are files of this name; later ones are given to a process through VFIO.
    if any(root.glob("dev/accel[0-9]*")):
        return True
    pci = root / "sys/bus/pci/devices"
    devices = {
        vendor.with_name("device").read_text().strip()
        for vendor in pci.glob("*/vendor")
        if vendor.read_text().strip() == _GOOGLE
    }
    passed_through = any(root.glob("dev/vfio/[0-9]*"))
    return bool(devices) and (
        passed_through or not devices.isdisjoint(hardware_utils._TPU_PCI_DEVICE_IDS)
    )


def leave_absent_tpu_alone() -> None:
    """Keeps jax from asking libtpu for TPUs on a machine that has none.

    Nothing changes where a TPU may be, where jax was told its platforms (`JAX_PLATFORMS`), or
    where it has found its devices already. Other platforms are looked for as ever, and compiling
    for TPUs (`layerskip plan`) still works.
    """
    import jax
    from jax._src import xla_bridge

    if jax.config.jax_platforms or xla_bridge.backends_are_initialized() or may_have_tpu():
        return
    # jax can be told which platforms to use, and then fails where one of them is absent; only by
    # this can it be told which not to use. Failing quietly is what it does without a TPU anyway.
    xla_bridge.register_backend_factory("tpu", _no_tpu, priority=300, fail_quietly=True)


def _no_tpu():
    raise RuntimeError("this machine has no TPU")

"""Eight virtual CPU devices, and every public signature's shapes checked in every test."""

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
install_import_hook("layerskip_jax", "beartype.beartype")

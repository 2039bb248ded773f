"""LayerSkip in JAX: pretrain language models that can stop early, and decode with them."""

__version__ = "0.1.0"


def __getattr__(name: str):
    # Imported on first use: `import layerskip_jax` alone should not load jax.
    if name == "load":
        from layerskip_jax.hardware.tpu_presence import leave_absent_tpu_alone
        from layerskip_jax.language_model import load

        leave_absent_tpu_alone()
        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""LayerSkip in JAX: pretrain language models that can stop early, and decode with them."""

__version__ = "0.1.0"

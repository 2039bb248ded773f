"""`python -m layerskip_jax` is `layerskip`."""

import sys

from layerskip_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())

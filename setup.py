"""Which packages are installed; everything else is in pyproject.toml.

The recipes stay in `configs/` here and are installed inside the package, where they are found by
name from any folder; pyproject.toml cannot name one package elsewhere and find the others.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["layerskip_jax", "layerskip_jax.*"]),
        "layerskip_jax.configs",
    ],
    package_dir={"layerskip_jax.configs": "configs"},
)

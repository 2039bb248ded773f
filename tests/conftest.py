"""Eight virtual CPU devices, and every public signature's shapes checked in every test."""

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
install_import_hook("layerskip_jax", "beartype.beartype")


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """Forty small documents, prepared by the real command into windows of 12 tokens."""
    from layerskip_jax.commands import prepare  # the import hook must come first

    folder = tmp_path_factory.mktemp("prepared")
    texts = folder / "texts"
    texts.mkdir()
    for number in range(40):
        words = " ".join(f"word{(number * k) % 17}" for k in range(20 + number))
        (texts / f"{number:02d}.txt").write_text(f"Document {number}. {words}\n")
    output = folder / "data"
    arguments = ["--vocab-size=300", "--sequence-length=12", "--validation-fraction=0.2"]
    assert prepare.main([f"--source={texts}", f"--output={output}", *arguments]) == 0
    return output

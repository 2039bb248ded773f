"""The run and tokenizer that the tests of published folders have too."""

from tests.interop.conftest import make_run, run, tokenizer_file  # noqa: F401

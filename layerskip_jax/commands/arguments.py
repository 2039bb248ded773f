"""What the verbs share in reading their command lines."""

import argparse


def split_config_arguments(
    verb: str, description: str, argv: list[str]
) -> tuple[argparse.ArgumentParser, list[str], list[str]]:
    """Separates `--config...` arguments from the verb's own.

    Returns:
      A parser for the verb's own arguments, the config arguments as `--name=value`, the rest.
    """
    parser = argparse.ArgumentParser(
        prog=f"layerskip {verb}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    config, rest = [], []
    arguments = iter(argv)
    for argument in arguments:
        is_config = argument.split("=")[0] == "--config" or argument.startswith("--config.")
        if is_config and "=" not in argument:
            argument = f"{argument}={next(arguments, '')}"
        (config if is_config else rest).append(argument)
    return parser, config, rest

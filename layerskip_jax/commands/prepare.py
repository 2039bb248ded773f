"""layerskip prepare: turn text into packed windows to train on.

A source is `stdlib` (Python's own standard library without its tests), a folder, a file or a
glob of files, here or on a bucket (gs://, s3://, hf://), `@LIST` for a file that names a source a
line, or `tfds:NAME_OR_FOLDER[:SPLIT]` for a TFDS data set on this disk in array_record format. A
document is a file, a line of a .jsonl file, a row of a table or a TFDS example. Documents are split
into training and validation, tokenized by a byte-level BPE trained on the former, and packed. The
output appears when it is complete; prepared already, it is left as it is. What was interrupted goes
on by the same command.

With --prompt-field and --completion-field, or --messages-field for chats, only completions are
learned. Documents are not cut then; those that are longer than a window are left out.
"""

import argparse
import dataclasses
import shlex
from pathlib import Path

from tokenizers import Tokenizer

from layerskip_jax.commands.arguments import (
    add_fields,
    figures_file,
    given_fields,
    make_parser,
    write_figures,
)
from layerskip_jax.commands.tables import make_console, make_table
from layerskip_jax.data.beam_runner import BeamRunner
from layerskip_jax.data.manifest import Manifest, PrepareOptions
from layerskip_jax.data.prepare import prepare
from layerskip_jax.data.runners import Processes, Runner
from layerskip_jax.data.sources import searched_endings
from layerskip_jax.data.tokenizer import END_TOKENS, file_sha256, load_tokenizer
from layerskip_jax.interop.chat import ChatTemplate, chat_template
from layerskip_jax.interop.pretrained import end_token_ids, published_files
from layerskip_jax.run_folder.object_store import AnyPath, as_path, is_remote
from layerskip_jax.run_folder.paths import RunFolder, is_run, open_run
from layerskip_jax.schema import UserError, require_count


def main(argv: list[str]) -> int:
    """Runs the verb and returns its exit code."""
    parser = make_parser("prepare", __doc__)
    parser.epilog = f"files that are found in a folder: {searched_endings()}"
    add = parser.add_argument
    add("--output", required=True, help="folder to make, on a disk, gs:// or s3://")
    add_fields(parser, PrepareOptions, "tokenizer_sha256", "chat_template_sha256")
    add(
        "--tokenizer",
        help="existing tokenizer to use instead: a tokenizer.json, or a model's or run's folder",
    )
    add("--overwrite", action="store_true", help="replace prepared data in --output")
    add("--workers", type=int, default=0, help="processes on this machine (default: one a core)")
    add(
        "--runner", choices=("local", "beam"), default="local",
        help="who does the work: processes of this machine, or an engine by Apache Beam, whose "
        "workers all reach --output",
    )  # fmt: skip
    add(
        "--beam-options", default="", metavar="OPTIONS",
        help="of Beam, as its command lines take them: --beam-options='--runner=FlinkRunner ...'",
    )  # fmt: skip
    add(
        "--max-failed-units", type=int, default=0,
        help="units that may fail; they are named and left out (default: 0)",
    )  # fmt: skip
    add("--json", type=figures_file, help="also write the figures to this file")
    options = parser.parse_args(argv)
    require_count("--workers", options.workers, 0)
    require_count("--max-failed-units", options.max_failed_units, 0)
    runner, output = _runner(options), as_path(options.output)
    existing, chat = {}, None  # what an existing tokenizer decides
    if options.tokenizer is not None:
        model = Path(options.tokenizer)
        if is_remote(options.tokenizer):  # a run's, whose small files are downloaded
            run, _ = open_run(options.tokenizer.removesuffix("/tokenizer.json"))
            model = run.path
        options.tokenizer = model / "tokenizer.json" if model.is_dir() else model
        tokenizer = load_tokenizer(options.tokenizer)
        if options.messages_field:
            chat = _chat_template(model, tokenizer)
        usual = [tokenizer.token_to_id(token) for token in END_TOKENS]
        if not options.end_token and all(token is None for token in usual):
            options.end_token = _end_token_of_model(model, tokenizer)
        existing = {"vocab_size": 0, "tokenizer_sha256": file_sha256(options.tokenizer)}
        if chat is not None:
            existing["chat_template_sha256"] = chat.sha256
    request = PrepareOptions(**given_fields(options, PrepareOptions) | existing)
    manifest = prepare(
        request,
        output,
        tokenizer_file=options.tokenizer,
        chat_turns=None if chat is None else chat.turns,
        overwrite=options.overwrite,
        runner=runner,
        max_failed_units=options.max_failed_units,
    )
    _print(manifest, output)
    if options.json:
        write_figures(options.json, figures(manifest))
    return 0


def _runner(options: argparse.Namespace) -> Runner:
    """Returns who does the units.

    Raises:
      UserError: options of one runner are given to the other.
    """
    if options.runner == "beam":
        if options.workers:
            raise UserError(
                f"--workers={options.workers} is of this machine's processes; Beam takes its own, "
                "as --beam-options='--direct_num_workers=2'"
            )
        return BeamRunner(tuple(shlex.split(options.beam_options)))
    if options.beam_options:
        raise UserError(f"--beam-options={options.beam_options!r} needs --runner=beam")
    return Processes(options.workers)


def _end_token_of_model(folder: Path, tokenizer: Tokenizer) -> str:
    """Returns the end token that a model's folder names beside its tokenizer, or ""."""
    if is_run(folder):
        return RunFolder(folder).data()["end_token"]
    if not (folder / "config.json").is_file():
        return ""
    files = {"config.json": (folder / "config.json").read_bytes()}
    ids = end_token_ids(files, folder)
    return (tokenizer.id_to_token(ids[0]) or "") if ids else ""


def _chat_template(folder: Path, tokenizer: Tokenizer) -> ChatTemplate:
    """Returns the chat template of a model's folder, or of the model that a run began from.

    Raises:
      UserError: there is none.
    """
    run = RunFolder(folder) if is_run(folder) else None
    files = run.published_files() if run else published_files(folder)
    template = chat_template(files, run.published if run else folder, tokenizer)
    if template is None:
        raise UserError(
            f"--tokenizer={folder} has no chat template beside it, by which --messages-field could "
            "be written; name the folder of a model that was trained on chats"
        )
    return template


def figures(manifest: Manifest) -> dict:
    """Returns the counts of a manifest, flat and named."""
    result = {
        "vocab_size": manifest.vocab_size,
        "sequence_length": manifest.sequence_length,
        "unigram_entropy_nats": manifest.unigram_entropy_nats,
        "bytes_per_token": manifest.train.bytes_per_token,
        "skipped_files": manifest.skipped_files,
    }
    for name in ("train", "validation"):
        counts = dataclasses.asdict(manifest.split(name))
        del counts["shards"]
        result |= {f"{name}_{key}": value for key, value in counts.items()}
    return result


def _print(manifest: Manifest, output: AnyPath) -> None:
    headings = ("documents", "bytes", "tokens", "windows")
    if manifest.request.has_completions:
        headings = ("documents", "over_long", "bytes", "tokens", "targets", "windows")
    splits = {name: manifest.split(name) for name in ("train", "validation")}
    table = make_table(
        f"{output}: {', '.join(manifest.request.sources)}",
        ("", *(heading.replace("_", " ") for heading in headings)),
        [(name, *(f"{getattr(split, h):,}" for h in headings)) for name, split in splits.items()],
    )
    console = make_console()
    console.print(table)
    skipped = f"; {manifest.skipped_files} skipped" if manifest.skipped_files else ""
    if manifest.request.has_completions:
        skipped += f"; windows {manifest.train.filled(manifest.sequence_length):.1%} full"
    console.print(
        f"vocabulary {manifest.vocab_size:,}, windows of {manifest.sequence_length} tokens, "
        f"{manifest.train.bytes_per_token:.2f} bytes a token, "
        f"validation unigram entropy {manifest.unigram_entropy_nats:.3f} nats a token{skipped}",
    )

"""layerskip calibrate: the threshold of an exit policy that keeps its risk within bounds.

Texts are the first tokens of documents of the validation set, one text a document, as those are
the independent draws. Half of them, drawn at random, are calibrated on by Learn then Test, with
p-values by betting or by Hoeffding's inequality (`--bound`); with `--kv=propagate`, where each
threshold takes a pass, an eighth of that half only tells where to begin. The other half tells what
the threshold then does. The risk of a text is the share of its tokens
that differ from the whole model's given the same true tokens before (`--risk-of=tokens`), or the
mean loss its tokens gain, clipped to 0..1 nats (`--risk-of=loss`). What is found goes into the
run's folder as exit_policies.json, where `layerskip generate --exit-when=NAME` finds it.
"""

import numpy as np

from layerskip_jax.commands.arguments import (
    add_on_damaged,
    make_run_parser,
    numbers,
    prepared_data,
    write_figures,
)
from layerskip_jax.commands.tables import make_console, make_table
from layerskip_jax.data.documents import first_tokens
from layerskip_jax.data.manifest import read_manifest
from layerskip_jax.decoding.adaptive import SKIPPED_KV
from layerskip_jax.decoding.exit_policy import POLICIES, candidate_exits
from layerskip_jax.evaluation.calibration import (
    BOUNDS,
    DEFAULT_BOUND,
    PILOT,
    RISKS,
    PolicyTexts,
    calibrate,
    candidate_thresholds,
    require_enough,
    require_weights,
)
from layerskip_jax.generation.options import DEFAULT_KV
from layerskip_jax.language_model import load
from layerskip_jax.run_folder.exit_policies import read_policies, store_policy
from layerskip_jax.run_folder.paths import open_run
from layerskip_jax.schema import UserError, require_choice, require_count, require_range
from layerskip_jax.training.checkpoint import Checkpoints


def main(argv: list[str]) -> int:
    """Runs the verb and returns its exit code."""
    parser = make_run_parser("calibrate", __doc__)
    add = parser.add_argument
    add("--exit-when", required=True, help=f"the policy: {', '.join(POLICIES)}")
    add("--risk", type=float, default=0.05, help="the most risk, in (0, 1) (default: 0.05)")
    add("--confidence", type=float, default=0.95, help="that it is kept (default: 0.95)")
    add(
        "--kv", default=DEFAULT_KV,
        help=f"keys and values of skipped layers: {', '.join(SKIPPED_KV)} (default: {DEFAULT_KV})",
    )  # fmt: skip
    add("--exits", type=numbers, help="candidate exits (default: every L/8)")
    add("--risk-of", default="tokens", help="tokens that differ, or loss added (default: tokens)")
    add(
        "--bound", default=DEFAULT_BOUND,
        help=f"on the risk: {', '.join(BOUNDS)} (default: {DEFAULT_BOUND})",
    )  # fmt: skip
    add("--data", help="prepared data (default: what the run trained on)")
    add("--texts", type=int, help="documents to read, both halves together (default: all)")
    add("--tokens", type=int, help="the most tokens of each (default: 128, or the context)")
    add("--seed", type=int, default=0, help="of which half a text falls into (default: 0)")
    add_on_damaged(parser)
    options = parser.parse_args(argv)
    policy, kv, risk, confidence = (
        options.exit_when, options.kv, options.risk, options.confidence
    )  # fmt: skip
    require_choice("--exit-when", policy, POLICIES)
    require_choice("--kv", kv, SKIPPED_KV)
    require_choice("--risk-of", options.risk_of, RISKS)
    require_choice("--bound", options.bound, BOUNDS)
    require_count("--seed", options.seed, 0)
    require_range("--risk", risk, "(0, 1)")
    require_range("--confidence", confidence, "(0, 1)")
    folder, config = open_run(options.workdir)
    layers = config.model.num_layers
    exits = candidate_exits(layers, options.exits)
    # The last token of a text is only predicted, never read.
    most = config.model.max_sequence_length + 1
    tokens = min(128, most) if options.tokens is None else options.tokens
    require_count("--tokens", tokens, 2, most)
    read_policies(folder)  # one that is damaged is said now
    data = prepared_data(options.workdir, config.data.path, options.data)
    manifest, ours = read_manifest(data), folder.data()["tokenizer_sha256"]
    if manifest.tokenizer_sha256 != ours:
        raise UserError(
            f"{data} was prepared with another tokenizer than the run's; prepare it with "
            f"--tokenizer={folder.shown(folder.tokenizer_file)}"
        )
    manifest.check_tokens(config.model.vocab_size, data)
    texts = first_tokens(
        data, "validation", tokens, count=options.texts,
        on_damaged=options.on_damaged or config.data.on_damaged,
    )  # fmt: skip
    order = np.random.default_rng(options.seed).permutation(len(texts)).tolist()
    half = len(texts) // 2
    # Where each threshold takes a pass, some texts are well spent on leaving most of them out.
    pilot = half // PILOT if kv == "propagate" else 0
    require_enough(half - pilot, risk, confidence, options.bound)

    checkpoints = Checkpoints(folder.checkpoints)
    step = checkpoints.require_step(options.step)
    checkpoints.close()
    generator = load(options.workdir, step=step).generator
    require_weights(generator.weights, policy)

    def read(part: list[int]) -> PolicyTexts:
        return PolicyTexts(
            generator.weights, generator.config, [texts[index] for index in part],
            policy=policy, exits=exits, kv=kv, risk_of=options.risk_of,
        )  # fmt: skip

    found = calibrate(
        read,
        pilot=order[:pilot],
        calibration=order[pilot:half],
        held_out=order[half:],
        thresholds=candidate_thresholds(policy, len(exits)),
        risk=risk,
        confidence=confidence,
        bound=options.bound,
    )
    entry = {
        "policy": policy,
        "kv": kv,
        "exits": list(exits),
        "threshold": found["threshold"],
        "risk": risk,
        "risk_of": options.risk_of,
        "confidence": confidence,
        "bound": options.bound,
        "texts": half - pilot,
        "tokens": tokens,
        "layers": layers,
        "step": step,
        **found,
    }
    tested = entry.pop("tested")
    store_policy(folder, entry)
    folder.upload()
    _print(entry, tested)
    if options.json:
        write_figures(options.json, {**entry, "tested": tested})
    return 0


def _print(entry: dict, tested: list[dict]) -> None:
    most = 1 - entry["confidence"]
    rows = [
        (
            f"{step['threshold']:g}",
            f"{step['risk']:.4f}",
            f"{step['p_value']:.2e}",
            f"{step['layers']:.2f}",
            "yes" if step["p_value"] <= most else "no",
        )
        for step in tested
    ]
    chosen = [step["threshold"] == entry["threshold"] for step in tested]
    table = make_table(
        f"{entry['policy']} on {entry['texts']} texts, exits "
        f"{', '.join(map(str, entry['exits']))} of {entry['layers']} layers, K/V {entry['kv']}",
        ("threshold", "mean risk", "p-value", "layers run", "accepted"),
        rows,
        styles=["bold" if mine else None for mine in chosen],
        caption=f"Risk: {RISKS[entry['risk_of']]}. Accepted where the p-value is at most "
        f"{most:.3g}; the last one before the first that is not is taken.",
    )
    make_console().print(table)
    other, layers = entry["held_out"], entry["layers"]
    print(
        f"--exit-when={entry['policy']}:{entry['threshold']:g} keeps the risk within "
        f"{entry['risk']:g} with confidence {entry['confidence']:g}. On {other['texts']} texts "
        f"held out: risk {other['risk']:.4f}, {other['mean_layers']:.2f} of {layers} layers run, "
        f"{1 - other['mean_layers'] / layers:.1%} saved."
    )

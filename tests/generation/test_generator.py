import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layerskip_jax.decoding.cache import cache_slots
from layerskip_jax.generation.generator import Generator, bucket, prompt_bucket
from layerskip_jax.generation.loop import (
    Arm,
    Costs,
    Evidence,
    best_arm,
    expected_cost,
    promised_tokens,
)
from layerskip_jax.generation.options import Request
from layerskip_jax.generation.sweep import accepted_per_cycle, expected_cycles, sweep
from layerskip_jax.model.transformer import Transformer
from layerskip_jax.schema import ConfigError
from tests.helpers import small_model


@pytest.fixture(scope="module")
def model():
    return Transformer(small_model(max_sequence_length=40), jax.random.key(0))


@pytest.fixture(scope="module")
def generator(model):
    return Generator(model)


def _by_definition(model, prompt, new_tokens, exit_layer):
    """Greedy decoding that runs the whole sequence anew for each token, without a cache."""
    longest = len(prompt) + new_tokens

    @jax.jit
    def next_token(tokens, length):
        positions = jnp.arange(longest)[None]
        rows = model.row_inputs(positions, jnp.ones_like(positions))
        x = model.embed(tokens[None])
        for layer in range(exit_layer):
            x = jax.tree.map(lambda w, l=layer: w[l], model.layers)(x, *rows)
        return jnp.argmax(model.final_norm(x)[0, length - 1] @ model.head_weight)

    tokens = np.zeros(longest, np.int32)  # causal: what lies beyond changes nothing
    tokens[: len(prompt)] = prompt
    for length in range(len(prompt), longest):
        tokens[length] = next_token(tokens, length)
    return tokens[len(prompt) :].tolist()


@pytest.mark.parametrize("exit_layer", [2, 4])
def test_decoding_is_what_its_definition_says(model, generator, exit_layer):
    prompts = [[5], [7, 9, 11, 2, 60, 3, 3]]
    mode = {"mode": "early_exit", "exit_layer": 2} if exit_layer == 2 else {}
    expected = [_by_definition(model, prompt, 5, exit_layer) for prompt in prompts]
    assert generator.generate(prompts, 5, **mode).tokens == expected


def test_a_tied_head_decodes_alike():
    model = Transformer(small_model(tie_embeddings=True), jax.random.key(0))
    expected = _by_definition(model, [3, 1, 4], 6, 4)
    assert Generator(model).generate([[3, 1, 4]], 6).tokens == [expected]


def _made_in_shape(program, shape):
    """Returns the operations of a program that make arrays of such sizes, in any order."""
    operations = set()
    for sizes, operation in re.findall(r"= f32\[([\d,]+)\]\S* ([\w-]+)\(", program.as_text()):
        if sorted(size for size in map(int, sizes.split(",")) if size > 1) == sorted(shape):
            operations.add(operation)
    return operations


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize(
    "mode",
    [
        {},
        {"mode": "self_speculative", "exit_layer": 2, "draft_length": 2},
        {"mode": "self_speculative", "exit_layer": 2, "draft_length": 2, "stop_below": 0.5},
    ],
)
def test_no_cache_is_copied_and_one_head_decodes_by_definition(kv_heads, mode):
    model = Transformer(small_model(num_kv_heads=kv_heads), jax.random.key(0))
    generator = Generator(model)
    generation = generator.generate([[3, 1, 4]], 6, **mode)
    assert generation.tokens == [_by_definition(model, [3, 1, 4], 6, 4)]
    _, loop = generator._programs.values()
    of_cache = _made_in_shape(loop, [cache_slots(3 + 6), 8, *[2] * (kv_heads - 1)])
    assert "dynamic-update-slice" in of_cache and "copy" not in of_cache


@pytest.mark.parametrize("stop_below", [None, 0.5])
def test_no_cache_of_two_models_is_copied(stop_below):
    """The draft model's keys and values are 12 wide, which nothing else is."""
    model = Transformer(small_model(), jax.random.key(0))
    shape = {"num_layers": 2, "model_dim": 24, "num_heads": 2, "ffn_dim": 40}
    generator = Generator(model, draft_model=Transformer(small_model(**shape), jax.random.key(1)))
    generation = generator.generate(
        [[3, 1, 4]], 6, mode="draft_model", draft_length=2, stop_below=stop_below
    )
    assert generation.tokens == [_by_definition(model, [3, 1, 4], 6, 4)]
    *_, loop = generator._programs.values()
    for head_dim in (8, 12):
        of_cache = _made_in_shape(loop, [cache_slots(3 + 6), head_dim, 2])
        assert "dynamic-update-slice" in of_cache and "copy" not in of_cache


def test_bfloat16_runs():
    model = Transformer(small_model(dtype="bfloat16"), jax.random.key(0))
    generation = Generator(model).generate(
        [[3, 1, 4]], 6, mode="self_speculative", exit_layer=2, draft_length=2
    )
    assert len(generation.tokens[0]) == 6


@pytest.mark.parametrize("length, size", [(1, 16), (16, 16), (17, 32), (64, 64), (65, 100)])
def test_buckets(length, size):
    assert bucket(length, 100) == size


def test_one_compilation_serves_a_bucket(model, caplog):
    """Counted by jax's own log: prompts, lengths, limits and all of sampling are traced."""
    generator = Generator(model)
    drafts = {"mode": "self_speculative", "exit_layer": 2, "draft_length": 3}

    def run(prompt, new_tokens, **sampling):
        generator.generate([prompt], new_tokens, **sampling, **drafts)
        generator.generate([prompt] * 2, new_tokens, end_token=7, **sampling, **drafts)

    run([1], 3, temperature=1.0)
    assert generator.compilations == 4  # for batches of one and of two, prompts and a loop
    with jax.log_compiles(), caplog.at_level("WARNING"):
        run([1] * 16, 16, temperature=0.5, top_k=5)
        run([2] * 9, 1, temperature=2.0, top_p=0.5, seed=9)
    assert generator.compilations == 4
    assert not [r for r in caplog.records if r.message.startswith("Compiling")]
    with jax.log_compiles(), caplog.at_level("WARNING"):
        generator.generate([[1] * 17], 3, temperature=1.0, **drafts)
    assert generator.compilations == 5  # a cache of 64 holds longer prompts: the loop is there
    assert [r for r in caplog.records if r.message.startswith("Compiling")], "nothing is counted"


def test_one_program_reads_the_prompts_for_every_pair(model):
    generator, exact = Generator(model), Generator(model).generate([[5, 6]], 9).tokens
    for index, pair in enumerate([None, (1, 1), (2, 7), (3, 3)]):
        mode = {}
        if pair is not None:
            mode = {"mode": "self_speculative", "exit_layer": pair[0], "draft_length": pair[1]}
        assert generator.generate([[5, 6]], 9, **mode).tokens == exact
        assert generator.compilations == 2 + index


@pytest.mark.parametrize(
    "prompts, new_tokens, options, message",
    [
        ([], 4, {}, "prompts is empty"),
        ([[1], []], 4, {}, "prompt 1 is empty"),
        ([[1] * 37], 4, {}, "37 tokens and max_new_tokens=4 make 41, and the context is 40"),
        ([[1]], 0, {}, "max_new_tokens=0 must be at least 1"),
        ([[64]], 4, {}, r"token outside 0..63"),
        ([[1]], 4, {"end_token": 64}, "end_token=64"),
        ([[1]], 4, {"mode": "auto", "exit_layer": 2}, "exit_layer=2 has no meaning for"),
        ([[1]], 4, {"mode": "auto", "pairs": [(4, 1)]}, r"pair \(4, 1\) must be"),
        ([[1]], 4, {"pairs": [(1, 1)]}, "pairs have no meaning for mode='plain'"),
        ([[1]], 4, {"mode": "speculative"}, "Did you mean 'self_speculative'"),
        ([[1]], 4, {"exit_layer": 2}, "exit_layer=2 has no meaning for mode='plain'"),
        ([[1]], 4, {"draft_length": 2}, "draft_length=2 has no meaning for mode='plain'"),
        ([[1]], 4, {"mode": "early_exit"}, r"exit_layer=None must be in 1..3"),
        ([[1]], 4, {"mode": "early_exit", "exit_layer": 4}, r"exit_layer=4 must be in 1..3"),
        ([[1]], 4, {"mode": "self_speculative", "exit_layer": 0, "draft_length": 2}, "=0 must"),
        ([[1]], 4, {"mode": "self_speculative", "exit_layer": 1}, "draft_length=None must be"),
        (
            [[1]],
            4,
            {"mode": "self_speculative", "exit_layer": 1, "draft_length": 0},
            "draft_length=0 must be at least 1",
        ),
    ],
)
def test_bad_requests_are_refused_before_compiling(model, prompts, new_tokens, options, message):
    generator = Generator(model)
    with pytest.raises(ConfigError, match=message):
        generator.generate(prompts, new_tokens, **options)
    assert generator.compilations == 0


def test_a_model_of_one_layer_has_no_early_exit():
    generator = Generator(Transformer(small_model(num_layers=1), jax.random.key(0)))
    assert len(generator.generate([[1]], 2).tokens[0]) == 2
    with pytest.raises(ConfigError, match="a model of one layer has no early exit"):
        generator.generate([[1]], 2, mode="early_exit", exit_layer=1)


def test_accepted_drafts_of_a_cycle_by_hand():
    assert accepted_per_cycle([0.5, 0.8], 1) == 0.5
    assert accepted_per_cycle([0.5, 0.8], 2) == 0.5 + 0.4
    assert accepted_per_cycle([0.5, 0.8], 3) == pytest.approx(0.5 + 0.4 + 0.32)


def test_expected_cycles_by_hand():
    assert expected_cycles([0.5], 1, 1) == 1
    assert expected_cycles([0.5], 1, 2) == 1.5  # half of the first cycles make both
    assert expected_cycles([1.0], 3, 8) == 2
    assert expected_cycles([0.0], 3, 8) == 8


def test_a_pair_that_is_not_timed_lies_on_the_line_between(generator):
    result = sweep(
        generator, [[1, 2]], 8, exits=(1,), draft_lengths=(1, 2, 3), thresholds=(), repeats=1
    )
    first, between, last = (pair["seconds_per_cycle"] for pair in result["pairs"])
    assert [result["pairs"][i]["timed"] for i in (0, 2)] == [True, True]
    if not result["pairs"][1]["timed"]:
        assert between == pytest.approx((first + last) / 2)


def test_a_sweep_predicts_every_pair_and_measures_the_best(generator):
    result = sweep(
        generator, [[1, 2], [3]], 8, exits=(1, 2), draft_lengths=(1, 3), thresholds=(), repeats=1
    )
    pairs = result["pairs"]
    assert [(p["exit_layer"], p["draft_length"]) for p in pairs] == [(1, 1), (1, 3), (2, 1), (2, 3)]
    plain = result["plain_tokens_per_second"]
    for pair in pairs:
        assert pair["identical"] and not pair["verified"]
        assert pair["tokens_per_second"] == pytest.approx(pair["speedup"] * plain)
        assert len(pair["acceptance_by_position"]) == pair["draft_length"]
    best = result["best"]
    assert best["verified"] and best["identical"]
    assert best["speedup"] == pytest.approx(best["tokens_per_second"] / plain)
    assert best["predicted_speedup"] == max(pair["speedup"] for pair in pairs)
    with pytest.raises(ConfigError, match="no prompt"):
        sweep(generator, [], 8, exits=(1,), draft_lengths=(2,))


def test_the_acceptance_of_one_draft_length_predicts_another(generator):
    """Drafts are accepted as often whatever G is, which `sweep` relies on."""
    prompts = np.random.default_rng(0).integers(0, 64, (32, 4)).tolist()

    def rates(draft_length):
        return generator.generate(
            prompts, 30, mode="self_speculative", exit_layer=3, draft_length=draft_length
        ).drafting

    long, short = rates(4), rates(2)
    assert long.acceptance_by_position[0] > 0.1
    predicted = 1 + accepted_per_cycle(long.acceptance_by_position, 2)
    assert predicted == pytest.approx(short.tokens_per_cycle, rel=0.05)


def test_long_prompts_are_read_in_chunks(monkeypatch):
    model = Transformer(small_model(max_sequence_length=120), jax.random.key(0))
    prompts = [list(range(50)), [7] * 3, list(range(20, 53))]
    expected = Generator(model).generate(prompts, 5).tokens
    for module in ("decoding.autoregressive", "generation.generator"):
        monkeypatch.setattr(f"layerskip_jax.{module}.PREFILL_CHUNK", 16)
    assert prompt_bucket(50, 120) == 64 and prompt_bucket(120, 120) == 128
    assert Generator(model).generate(prompts, 5).tokens == expected


def test_stop_sequences_end_a_row_wherever_they_come(generator):
    prompts = [[5], [7, 9, 11], [2, 3]]
    whole = generator.generate(prompts, 20).tokens
    ways = ({}, {"mode": "self_speculative", "exit_layer": 2, "draft_length": 4})
    for row, start, length in [(0, 0, 1), (0, 3, 2), (1, 5, 3), (2, 7, 4), (1, 0, 4)]:
        stop = whole[row][start : start + length]

        def cut(tokens, stop=stop):
            ends = [
                i for i in range(len(stop), len(tokens) + 1) if tokens[i - len(stop) : i] == stop
            ]
            return tokens[: ends[0]] if ends else tokens

        for way in ways:
            generation = generator.generate(prompts, 20, stop=[stop, [63, 63, 63]], **way)
            assert generation.tokens == [cut(tokens) for tokens in whole]


def test_a_batch_that_does_not_fit_is_refused_before_compiling(model, monkeypatch):
    monkeypatch.setattr("layerskip_jax.generation.generator.device_memory", lambda: 10**5)
    generator = Generator(model)
    with pytest.raises(ConfigError, match="32 rows of .* give fewer prompts"):
        generator.generate([[1]] * 32, 4)
    assert generator.compilations == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "way",
    [
        {},
        {"mode": "self_speculative", "exit_layer": 2, "draft_length": 3},
        {"mode": "auto", "pairs": [(1, 2), (2, 4)]},
        {"mode": "auto", "pairs": [(1, 2), (2, 4)], "stop_below": 0.05},
    ],
)
def test_a_stream_gives_the_same_tokens_and_its_drafts(generator, way, temperature):
    expected = generator.generate([[5, 3]], 12, temperature=temperature, **way).tokens[0]
    events = list(generator.stream([5, 3], 12, temperature=temperature, **way))
    assert [token for event in events if not event.is_draft for token in event.tokens] == expected
    for event, after in zip(events, events[1:], strict=False):
        assert not (event.is_draft and after.is_draft)
    if way.get("draft_length"):
        assert all(len(event.tokens) == 3 for event in events if event.is_draft)
        assert any(event.is_draft for event in events)


def test_a_draft_head_of_few_tokens_changes_no_token(model):
    prompts = [[5], [7, 9, 11]]
    whole = Generator(model).generate(prompts, 12).tokens
    few = Generator(model, draft_tokens=range(0, 64, 3))
    drafted = few.generate(prompts, 12, mode="self_speculative", exit_layer=3, draft_length=3)
    assert drafted.tokens == whole
    with pytest.raises(ConfigError, match="some of the tokens 0..63"):
        Generator(model, draft_tokens=[64])


@pytest.mark.parametrize("stop_below", [None, 0.03])
def test_auto_gives_the_tokens_of_plain_decoding(model, stop_below):
    generator = Generator(model)
    prompts = [[5], [7, 9, 11]]
    for _ in range(3):  # what it has learnt changes how, not what
        generation = generator.generate(
            prompts, 20, mode="auto", pairs=[(1, 2), (3, 4)], stop_below=stop_below
        )
        assert generation.tokens == generator.generate(prompts, 20).tokens
        drafting = generation.drafting
        assert drafting.cycles + drafting.plain_cycles > 0
        assert drafting.accepted <= drafting.drafted
    assert generator.compilations == 3  # both loops begin where one program has read the prompts


ARMS = (Arm(4, 0), Arm(1, 2), Arm(1, 5))


def _evidence(**of_exit):
    """What is known of exit 1 after so much evidence that the prior is nothing beside it."""
    known = {"examined": 1e6, "kept": 0.0, "asked": 1e6, "sure": 1e6} | of_exit
    return Evidence(**{name: jnp.array([0, n, n], jnp.float32) for name, n in known.items()})


def test_the_best_arm_promises_the_most_tokens_for_its_cost():
    costs = Costs(*[jnp.array([1.0, 1.5, 2.4])] * 2)
    # At acceptance .9: 1, 2.71 / 1.5 = 1.81 and 4.69 / 2.4 = 1.95 tokens; at .6: 1.31 and 0.99.
    assert best_arm(ARMS, _evidence(kept=0.9e6), costs) == 2
    assert best_arm(ARMS, _evidence(kept=0.6e6), costs) == 1
    assert best_arm(ARMS, _evidence(kept=0.0), costs) == 0


def test_drafts_that_end_early_are_promised_and_cost_less():
    half = jnp.float32(0.5)
    assert promised_tokens(ARMS[2], jnp.float32(0.9), half) == pytest.approx(
        1 + 0.9 + 0.5 * 0.81 + 0.25 * 0.729 + 0.125 * 0.9**4 + 0.0625 * 0.9**5
    )
    one, two, three = jnp.float32([1, 2, 3])
    # 1 + .5 + .25 + .125 + .0625 = 1.9375 drafts: .9375 of 4 steps from 1 draft to 5.
    assert expected_cost(ARMS[2], one, three, half) == pytest.approx(1 + 2 * 0.9375 / 4)
    assert expected_cost(ARMS[1], one, two, half) == pytest.approx(1.5)
    assert expected_cost(ARMS[0], one, one, half) == 1
    # Where drafting goes on half of the time, long drafts are cheap, and it was unsure for a
    # reason: those it made were accepted.
    costs = Costs(jnp.array([1.0, 1.0, 1.0]), jnp.array([1.0, 1.5, 3.9]))
    assert best_arm(ARMS, _evidence(kept=0.9e6), costs) == 1
    assert best_arm(ARMS, _evidence(kept=0.9e6, sure=0.2e6), costs) == 1
    costs = Costs(jnp.array([1.0, 1.0, 1.0]), jnp.array([1.0, 1.5, 2.0]))
    assert best_arm(ARMS, _evidence(kept=0.9e6, sure=0.5e6), costs) == 2


def test_auto_learns_how_often_drafting_went_on(model):
    generator = Generator(model)
    options = {"mode": "auto", "pairs": [(3, 4)]}
    for stop_below in (None, 1e-6, 0.999):
        # Plain decoding promises less than any draft, so that drafts are made.
        job = generator._job(Request([[5, 3]], 20, **options, stop_below=stop_below))
        costs = Costs(np.array([1e9, 1], np.float32), np.array([1e9, 1], np.float32))
        generator._costs[1, job.arms, True, job.stop_below and job.stop_below.score] = costs
        generator.generate([[5, 3]], 20, **options, stop_below=stop_below)
        evidence = generator._evidence[job.evidence_key]
        assert evidence.examined[1] > 0 and evidence.asked[1] > 0
        went_on = evidence.sure[1] / evidence.asked[1]
        assert went_on == (0 if stop_below == 0.999 else 1)
        assert evidence.asked[0] == 0
    assert len(generator._evidence) == 3

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layerskip_jax.decoding.autoregressive import prefill
from layerskip_jax.decoding.cache import read_draft_head
from layerskip_jax.decoding.sampling import Sampling, matching, reject
from layerskip_jax.decoding.sequences import Limits, SequenceState
from layerskip_jax.decoding.weights import DecoderLayer, ExitClassifier, decoder_weights
from layerskip_jax.generation.generator import Generator
from layerskip_jax.model.transformer import Transformer
from layerskip_jax.schema import ConfigError
from layerskip_jax.self_speculation import (
    StopBelow,
    count_drafts,
    cycle,
    draft,
    verification_widths,
)
from tests.helpers import small_model

LAYERS = 4


def _model(late_layers: float = 1.0) -> Transformer:
    """A random model whose layers from the third on add `late_layers` of what they would.

    The smaller that is, the more often early exits agree with the last. A larger head makes
    ties between the best tokens unlikely.
    """
    model = Transformer(small_model(max_sequence_length=256), jax.random.key(1))
    scale = jnp.array([1.0, 1.0, late_layers, late_layers])
    for matrix in (model.layers.attention.o, model.layers.mlp.down):
        matrix[...] = 2 * matrix[...] * scale.reshape(-1, *[1] * (matrix[...].ndim - 1))
    model.head[...] = 3 * model.head[...]
    return model


def _prompts(count: int, longest: int = 14) -> list[list[int]]:
    random = np.random.default_rng(5)
    return [random.integers(0, 64, random.integers(1, longest)).tolist() for _ in range(count)]


@pytest.fixture(scope="module")
def generators():
    return {late: Generator(_model(late)) for late in (1.0, 0.2)}


def _speculative(generator, prompts, new_tokens, exit_layer, draft_length, **options):
    return generator.generate(
        prompts,
        new_tokens,
        mode="self_speculative",
        exit_layer=exit_layer,
        draft_length=draft_length,
        **options,
    )


@pytest.mark.parametrize(
    "drafts, verified, expected",
    [
        ([3, 4, 5], [3, 4, 5, 9], 3),
        ([3, 4, 5], [3, 4, 9, 5], 2),
        ([3, 4, 5], [9, 4, 5, 9], 0),  # agreement after a rejection does not count
    ],
)
def test_drafts_are_accepted_up_to_the_first_disagreement(drafts, verified, expected):
    assert matching(jnp.array([drafts]), jnp.array([verified])).tolist() == [expected]


@pytest.mark.parametrize(
    "accepted, count, drafts, drafted, kept, examined",
    [
        (0, 1, [5, 6, 7], 3, 0, [1, 0, 0]),  # rejected at once
        (2, 1, [5, 6, 7], 3, 2, [1, 1, 1]),
        (3, 1, [5, 6, 7], 3, 3, [1, 1, 1]),  # all kept
        (3, 8, [5, 6, 7], 2, 2, [1, 1, 0]),  # room for two more tokens only
        (0, 9, [5, 6, 7], 1, 0, [1, 0, 0]),  # room for one
        (3, 1, [5, 0, 7], 2, 2, [1, 1, 0]),  # nothing after the end token, 0, is of use
        (1, 1, [5, 0, 7], 2, 1, [1, 1, 0]),  # also where it is rejected
    ],
)
def test_counts_of_one_cycle_by_hand(accepted, count, drafts, drafted, kept, examined):
    limits = Limits(jnp.array([10]), jnp.array([[0]]))
    one = jnp.zeros(1, jnp.int32)
    recent = jnp.zeros((1, 0), jnp.int32)
    rows = SequenceState(one, one, jnp.zeros((1, 20), jnp.int32), recent, one + count, one > 0)
    counts = count_drafts(jnp.array([drafts]), jnp.array([accepted]), rows, limits)
    assert counts.cycles.tolist() == [1]
    assert counts.drafted.tolist() == [drafted]
    assert counts.accepted.tolist() == [kept]
    assert counts.examined.tolist() == [examined]
    assert counts.kept.sum() == kept
    idle = rows._replace(done=one == 0)
    idle = count_drafts(jnp.array([drafts]), jnp.array([accepted]), idle, limits)
    assert all((leaf == 0).all() for leaf in idle)


@pytest.mark.parametrize("exit_layer", [1, 2, 3])
@pytest.mark.parametrize("draft_length", [1, 2, 5])
def test_the_tokens_are_those_of_plain_decoding(generators, exit_layer, draft_length):
    """36 prompts of mixed lengths, on a model of low and one of high acceptance."""
    prompts = _prompts(36)
    seen = collections.Counter()
    for generator in generators.values():
        plain = generator.generate(prompts, 24)
        drafted = _speculative(generator, prompts, 24, exit_layer, draft_length)
        assert drafted.tokens == plain.tokens
        assert all(len(tokens) == 24 for tokens in plain.tokens)
        drafting = drafted.drafting
        assert drafting.tokens == 36 * 23
        # Each cycle yields its accepted drafts and one more, but for one cut by the limit.
        assert 0 <= drafting.accepted + drafting.cycles - drafting.tokens <= 36
        assert sum(drafting.kept) == drafting.accepted <= drafting.drafted
        seen[drafting.acceptance > 0.5] += 1
    if (exit_layer, draft_length) == (3, 1):
        assert seen[True], "no case of high acceptance was tried"


@pytest.mark.slow
@pytest.mark.parametrize("exit_layer", [1, 2, 3])
@pytest.mark.parametrize("draft_length", range(1, 9))
def test_every_pair_gives_the_tokens_of_plain_decoding(generators, exit_layer, draft_length):
    """Batches of 1 to 8, prompts of one token up, an end token anywhere, a single new token."""
    generator = generators[0.2]
    prompts = [[7], *_prompts(7)]
    whole = generator.generate(prompts, 16).tokens
    end = collections.Counter(token for row in whole for token in row).most_common(3)[-1][0]
    # Every pair compiles two of the four buckets, and the pairs in turn all of them.
    small = ((1,), (2,), (3, 4))[(exit_layer + draft_length) % 3]
    for batch in (*small, 5, 6, 7, 8):
        for new_tokens, end_token in ((16, None), (16, end), (1, None)):
            expected = [row[:new_tokens] for row in whole[:batch]]
            if end_token is not None:
                expected = [row[: row.index(end) + 1] if end in row else row for row in expected]
            drafted = _speculative(
                generator, prompts[:batch], new_tokens, exit_layer, draft_length,
                end_token=end_token,
            )  # fmt: skip
            assert drafted.tokens == expected


@pytest.mark.parametrize("new_tokens", [1, 2, 3, 7])
def test_the_limit_of_new_tokens_is_exact(generators, new_tokens):
    prompts = _prompts(3)
    generator = generators[0.2]
    whole = generator.generate(prompts, 16).tokens
    for draft_length in (1, 5):
        drafted = _speculative(generator, prompts, new_tokens, 2, draft_length)
        assert drafted.tokens == [tokens[:new_tokens] for tokens in whole]


def test_an_end_token_stops_a_row_wherever_it_comes(generators):
    prompts = _prompts(6)
    generator = generators[0.2]
    whole = generator.generate(prompts, 24).tokens
    places = set()
    for end_token in {token for tokens in whole for token in tokens}:
        expected = [
            tokens[: tokens.index(end_token) + 1] if end_token in tokens else tokens
            for tokens in whole
        ]
        places |= {len(tokens) for tokens in expected}
        assert generator.generate(prompts, 24, end_token=end_token).tokens == expected
        drafted = _speculative(generator, prompts, 24, 2, 5, end_token=end_token)
        assert drafted.tokens == expected
    assert len(places) > 8, "the end token should have come at many places"


def test_a_batch_gives_each_row_what_it_gets_alone(generators):
    generator, prompts = generators[0.2], _prompts(5)
    together = _speculative(generator, prompts, 16, 2, 5)
    alone = [_speculative(generator, [prompt], 16, 2, 5) for prompt in prompts]
    assert together.tokens == [generation.tokens[0] for generation in alone]
    assert together.drafting == functools.reduce(
        lambda a, b: a + b, (generation.drafting for generation in alone)
    )


def test_perfect_drafts_take_g_plus_one_tokens_a_cycle():
    model = _model(0.0)  # layers 3 and 4 add nothing: the exit after 2 is the whole model
    drafting = _speculative(Generator(model), [[1, 2, 3]], 21, 2, 4).drafting
    assert drafting.acceptance == 1
    assert (drafting.cycles, drafting.tokens_per_cycle) == (4, 5)
    assert drafting.acceptance_by_position == (1, 1, 1, 1)


def test_every_fed_token_passes_every_layer_once(monkeypatch):
    """Counts the positions each layer is traced over in one cycle."""
    model = _model()
    weights = decoder_weights(model)
    widths = collections.defaultdict(list)
    names = {id(layer.down): index for index, layer in enumerate(weights.layers)}
    project = DecoderLayer.project

    def counting(self, x, cos, sin, kv_heads):
        widths[names[id(self.down)]].append(x.shape[1])
        return project(self, x, cos, sin, kv_heads)

    monkeypatch.setattr(DecoderLayer, "project", counting)
    limits = Limits(jnp.array([8]), jnp.array([[-2]]))
    with jax.disable_jit():
        rows, cache = prefill(
            weights,
            jnp.array([[1, 2, 3]]),
            jnp.array([3]),
            limits,
            None,
            config=model.config,
            num_layers=4,
            capacity=8,
            lookahead=4,
        )
        cycle(
            weights,
            cache,
            rows,
            limits,
            None,
            exit_layer=2,
            draft_length=3,
            acceptance="same_noise",
        )
    # prefill over the prompt's 3, then one cycle: 4 tokens, singly below E, at once above
    assert widths[0] == widths[1] == [3, 1, 1, 1, 1]
    assert widths[2] == widths[3] == [3, 4]


def test_nothing_crosses_to_the_host_within_a_generation(generators):
    generator, prompts = generators[0.2], [[1, 2, 3]]
    _speculative(generator, prompts, 16, 2, 5)
    with jax.transfer_guard_host_to_device("disallow"):
        _speculative(generator, prompts, 16, 2, 5)


def test_counts_of_drafts_that_ended_early_by_hand():
    """Two rows drafted three of at most four; under rejection sampling one had a single own."""
    limits = Limits(jnp.array([10, 10]), jnp.array([[0]]))
    one = jnp.ones(2, jnp.int32)
    recent = jnp.zeros((2, 0), jnp.int32)
    rows = SequenceState(one, one, jnp.zeros((2, 20), jnp.int32), recent, one, one < 1)
    counts = count_drafts(
        jnp.array([[5, 6, 7, 0], [5, 6, 7, 0]]),
        jnp.array([2, 1]),
        rows,
        limits,
        jnp.int32(3),
        jnp.array([3, 1]),
    )
    assert counts.drafted.tolist() == [3, 1]
    assert counts.accepted.tolist() == [2, 1]
    assert counts.examined.tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert counts.kept.tolist() == [[1, 1, 0, 0], [1, 0, 0, 0]]
    assert counts.made.tolist() == [3, 3]


@pytest.mark.parametrize(
    "draft_length, widths",
    [(1, (2,)), (2, (2, 3)), (3, (2, 3, 4)), (5, (2, 3, 5, 6)), (8, (2, 3, 5, 9))],
)
def test_widths_of_verification(draft_length, widths):
    assert verification_widths(draft_length) == widths


def test_drafting_ends_after_the_first_draft_below_the_threshold_by_hand(generators):
    """The first layers alone give the probabilities; the drafts must end where these say."""
    model = _model(0.2)
    weights = decoder_weights(model)
    limits = Limits(jnp.full(6, 8), jnp.array([[-2]]))
    prompts = jnp.array([[1, 2, 3], [9, 8, 7], [4, 4, 4], [30, 1, 60], [5, 6, 7], [11, 12, 13]])
    rows, cache = prefill(
        weights, prompts, jnp.full(6, 3), limits, None,
        config=model.config, num_layers=4, capacity=8, lookahead=8,
    )  # fmt: skip
    pair = {"exit_layer": 2, "draft_length": 5, "acceptance": "rejection"}
    everything = draft(weights, cache, rows, None, **pair)[0]
    logits = read_draft_head(weights, everything.exit_cache[:, :5], 2)
    p = np.asarray(jax.nn.softmax(logits).max(axis=-1))
    for threshold in (p.min() / 2, float(np.median(p)), float(np.quantile(p, 0.8)), 0.999):
        own = [int(np.argmax(row < threshold)) + 1 if (row < threshold).any() else 5 for row in p]
        some = draft(weights, cache, rows, None, StopBelow(jnp.float32(threshold)), **pair)[0]
        made = int(some.made)
        assert made == max(own)
        assert some.tokens[:, :made].tolist() == everything.tokens[:, :made].tolist()
        np.testing.assert_allclose(
            some.exit_cache[:, : made + 1], everything.exit_cache[:, : made + 1], atol=1e-5
        )
        # Greedily what was drafted for others counts too, drawn by rejection only the own.
        assert some.lengths.tolist() == [made] * 6
        sampling = Sampling(
            np.float32(1), np.int32(64), np.float32(1), np.arange(6, dtype=np.uint32)
        )
        drawn = draft(weights, cache, rows, sampling, StopBelow(jnp.float32(threshold)), **pair)[0]
        assert int(drawn.made) == max(drawn.lengths.tolist())


@pytest.mark.parametrize("sampled", [{}, {"temperature": 0.9, "top_p": 0.9, "seed": 4}])
@pytest.mark.parametrize("exit_layer, draft_length", [(1, 1), (2, 3), (3, 6)])
def test_drafts_that_end_early_change_no_token(generators, exit_layer, draft_length, sampled):
    prompts, pair = _prompts(8), (exit_layer, draft_length)
    for generator in generators.values():
        plain = generator.generate(prompts, 20, **sampled).tokens
        whole = _speculative(generator, prompts, 20, *pair, **sampled).drafting
        end = collections.Counter(token for row in plain for token in row).most_common(3)[-1][0]
        ended = [row[: row.index(end) + 1] if end in row else row for row in plain]
        before, made = generator.compilations, []
        for threshold in (0.05, 0.3, 0.6, 0.99, "lead:0.51", "lead:0.6", "lead:0.99"):
            options = {"stop_below": threshold, **sampled}
            drafted = _speculative(generator, prompts, 20, *pair, **options)
            assert drafted.tokens == plain
            drafting = drafted.drafting
            assert drafting.tokens == 8 * 19
            assert 0 <= drafting.accepted + drafting.cycles - drafting.tokens <= 8
            assert sum(drafting.kept) == drafting.accepted <= drafting.drafted
            made.append(drafting.drafted / drafting.cycles)
            stopped = _speculative(generator, prompts, 20, *pair, end_token=end, **options)
            assert stopped.tokens == ended
        assert generator.compilations == before + 2, "a threshold must not be compiled for"
        for fewest, most in ((made[3], made[0]), (made[6], made[4])):
            assert fewest <= min(most, whole.drafted / whole.cycles)
            assert fewest == 1 or draft_length > 1
        for batch in (1, 3) if draft_length == 3 and not sampled else ():
            one = _speculative(generator, prompts[:batch], 20, *pair, stop_below=0.3, **sampled)
            assert one.tokens == plain[:batch]


@pytest.mark.parametrize("stop_below", [0.4, "lead:0.6"])
def test_by_rejection_a_row_draws_the_same_in_any_company_when_drafts_end_early(
    generators, stop_below
):
    """What is drafted on for others must not be taken, nor leave a trace in what is drawn."""
    generator, prompts = generators[0.2], _prompts(4)
    options = {"temperature": 1.0, "acceptance": "rejection", "stop_below": stop_below}
    together = _speculative(generator, prompts, 16, 2, 5, seed=3, **options)
    alone = [
        _speculative(generator, [prompt], 16, 2, 5, seed=3 + row, **options)
        for row, prompt in enumerate(prompts)
    ]
    assert together.tokens == [generation.tokens[0] for generation in alone]
    assert together.drafting == functools.reduce(
        lambda a, b: a + b, (generation.drafting for generation in alone)
    )


def test_rejection_takes_no_draft_that_was_not_made():
    """One draft of three was made: beyond it q is nothing, and the next token is p's own."""
    rows = 4000
    q, p = jnp.array([0.5, 0.5, 0.0]), jnp.array([0.2, 0.3, 0.5])
    sampling = Sampling(np.float32(1), np.int32(3), np.float32(1), np.arange(rows, dtype=np.uint32))
    drafts = jnp.zeros((rows, 3), jnp.int32)
    tokens, accepted = reject(
        drafts,
        jnp.broadcast_to(jnp.log(q), (rows, 3, 3)),
        jnp.broadcast_to(jnp.log(p), (rows, 4, 3)),
        jnp.broadcast_to(jnp.arange(4), (rows, 4)),
        sampling,
        jnp.ones(rows, jnp.int32),
    )
    assert set(accepted.tolist()) == {0, 1}
    assert abs(float(accepted.mean()) - 0.4) < 0.03  # p / q of the draft
    own = np.asarray(tokens[:, 1])[np.asarray(accepted) == 1]
    shares = np.bincount(own, minlength=3) / len(own)
    np.testing.assert_allclose(shares, p, atol=0.05)  # 1,600 draws: three deviations are 0.037


def test_the_trained_classifier_may_say_when_drafts_end():
    generator, prompts = Generator(_model(0.2)), _prompts(3)
    with pytest.raises(ConfigError, match="asks a classifier, and the model has none"):
        _speculative(generator, prompts, 16, 2, 4, stop_below="learned:0.5")
    plain = generator.generate(prompts, 16).tokens
    made = {}
    for bias in (-9.0, 9.0):  # unsure of everything, and sure
        classifier = ExitClassifier(jnp.zeros(generator.config.model_dim), jnp.float32(bias))
        generator.weights = generator.weights._replace(classifier=classifier)
        generator._programs.clear()
        drafted = _speculative(generator, prompts, 16, 2, 4, stop_below="learned:0.5")
        assert drafted.tokens == plain
        made[bias] = drafted.drafting
    assert made[-9.0].drafted <= made[-9.0].cycles
    assert made[9.0] == _speculative(generator, prompts, 16, 2, 4).drafting


@pytest.mark.parametrize(
    "value", [0.0, 1.0, -0.5, float("nan"), "much", "learned:2", "learned", "lead:1", "led:.6"]
)
def test_a_threshold_that_is_none_is_refused(generators, value):
    with pytest.raises(ConfigError, match="stop_below"):
        _speculative(generators[1.0], [[1]], 4, 2, 2, stop_below=value)


def test_a_threshold_goes_with_a_pair(generators):
    with pytest.raises(ConfigError, match="no meaning for mode='plain'"):
        generators[1.0].generate([[1]], 4, stop_below=0.5)


def test_a_stream_shows_the_drafts_that_were_made(generators):
    generator, prompt = generators[0.2], [3, 1, 4]
    options = {"mode": "self_speculative", "exit_layer": 2, "draft_length": 5, "stop_below": 0.99}
    events = list(generator.stream(prompt, 12, **options))
    tokens = [token for event in events if not event.is_draft for token in event.tokens]
    assert tokens == generator.generate([prompt], 12).tokens[0]
    assert {len(event.tokens) for event in events if event.is_draft} <= {1, 2}

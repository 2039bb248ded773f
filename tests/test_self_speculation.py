import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layerskip_jax.decoding.autoregressive import prefill
from layerskip_jax.decoding.sampling import matching
from layerskip_jax.decoding.sequences import Limits, SequenceState
from layerskip_jax.decoding.weights import DecoderLayer, decoder_weights
from layerskip_jax.generation.generator import Generator
from layerskip_jax.model.transformer import Transformer
from layerskip_jax.self_speculation import count_drafts, cycle
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

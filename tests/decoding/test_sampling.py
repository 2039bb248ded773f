import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from layerskip_jax.decoding.sampling import (
    Sampling,
    choose,
    draw,
    lead,
    likeliest,
    processed,
    reject,
)
from layerskip_jax.generation.generator import Generator
from layerskip_jax.model.transformer import Transformer
from layerskip_jax.schema import SMALLEST_FLOAT32, ConfigError, UserError
from tests.helpers import small_model

LARGEST = float(np.finfo(np.float32).max)
BELOW_ONE, ABOVE_ONE = (float(np.nextafter(np.float32(1), np.float32(n))) for n in (0, 2))
SETTINGS = [(1.0, None, 1.0), (0.7, 3, 1.0), (1.5, None, 0.8), (1.6, 4, 0.95)]


def _sampling(temperature=1.0, top_k=None, top_p=1.0, rows=1, vocab=64):
    return Sampling(
        jnp.float32(temperature),
        jnp.int32(top_k or vocab),
        jnp.float32(top_p),
        jnp.arange(rows, dtype=jnp.uint32),
    )


def _processed_by_sorting(logits, temperature, top_k, top_p):
    """The textbook way, in float64."""
    p = np.exp((logits - logits.max()) / temperature)
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    if top_k is not None:
        p[order[top_k:]] = 0
        p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= top_p]] = 0
    return p / p.sum()


def test_top_k_and_top_p_by_hand():
    logits = jnp.log(jnp.array([0.1, 0.4, 0.2, 0.3]))

    def kept(**options):
        return np.exp(processed(logits, _sampling(vocab=4, **options))).tolist()

    def close(*values):
        return pytest.approx(values, abs=1e-4)

    assert kept() == close(0.1, 0.4, 0.2, 0.3)
    assert kept(top_k=1) == [0, 1, 0, 0]
    assert kept(top_k=2) == close(0, 0.5714, 0, 0.4286)
    assert kept(top_p=0.65) == close(0, 0.5714, 0, 0.4286)
    assert kept(top_p=0.75) == close(0, 0.4444, 0.2222, 0.3333)
    assert kept(top_k=3, top_p=0.5) == close(0, 0.5714, 0, 0.4286)  # top_p of what top_k left
    assert kept(top_p=1e-9) == [0, 1, 0, 0]


@pytest.mark.parametrize("temperature, top_k, top_p", SETTINGS + [(0.3, 17, 0.95)])
def test_the_processed_distribution_is_that_of_sorting(temperature, top_k, top_p):
    logits = np.random.default_rng(0).normal(0, 3, (5, 64))
    expected = [_processed_by_sorting(row, temperature, top_k, top_p) for row in logits]
    log_p = processed(jnp.asarray(logits), _sampling(temperature, top_k, top_p))
    np.testing.assert_allclose(np.exp(log_p), expected, atol=1e-6)


def _exact_processed(logits, temperature, top_k, top_p):
    """The definition, in float64: tokens of equal logits stay or go together."""
    below = logits.astype(np.float64) - float(logits.max())
    p = np.exp(below / np.float64(np.float32(temperature)))
    p = np.where(logits >= np.sort(logits)[-top_k], p, 0)
    p /= p.sum()
    likelier = np.array([p[logits > logit].sum() for logit in logits])
    p = np.where((likelier < np.float64(np.float32(top_p))) | (top_p == 1), p, 0)
    return p / p.sum()


def _some_logits():
    random = np.random.default_rng(3)
    spread = random.normal(0, 3, 32)
    ties = np.round(random.normal(0, 2, 32))
    ties[ties == 0] *= random.choice([1, -1], (ties == 0).sum())  # zeros of both signs
    wide = np.concatenate([[1e30, -1e30, 90.0, -90.0], random.normal(0, 1, 28)])
    masked = np.where(np.arange(32) % 3 == 1, spread, -np.inf)  # as a smaller head's to draft from
    return np.stack([spread, 1e-3 * spread, ties, wide, masked]).astype(np.float32)


@pytest.mark.parametrize(
    "temperature",
    [SMALLEST_FLOAT32, 1e-30, 1e-3, BELOW_ONE, 1.0, ABOVE_ONE, 1e3, 1e9, 1e30, LARGEST],
)
def test_the_distribution_is_exact_at_every_end_of_every_range(temperature):
    logits, exact_at = _some_logits(), jax.jit(processed)
    for top_k, top_p in itertools.product(
        (1, 2, 31, 32), (SMALLEST_FLOAT32, 1e-9, 0.37, BELOW_ONE, 1.0)
    ):
        log_p = exact_at(logits, _sampling(temperature, top_k, top_p))
        exact = [_exact_processed(row, temperature, top_k, top_p) for row in logits]
        message = f"temperature={temperature}, top_k={top_k}, top_p={top_p}"
        np.testing.assert_allclose(np.exp(log_p), exact, rtol=2e-5, atol=2e-7, err_msg=message)


def test_the_lead_is_the_share_of_two():
    p = jnp.array([[0.5, 0.25, 0.15, 0.1], [0.4, 0.4, 0.1, 0.1], [1.0, 0.0, 0.0, 0.0]])
    for shift in (0, 7):  # of a logit only its distance from the others counts
        np.testing.assert_allclose(lead(jnp.log(p) + shift), [2 / 3, 1 / 2, 1.0], rtol=1e-6)


def test_the_likeliest_is_the_first_of_equals():
    assert likeliest(jnp.array([[1.0, 3.0, 3.0], [-jnp.inf, -2.0, -3.0]])).tolist() == [1, 1]


@pytest.mark.parametrize("bad", [[np.nan, 1, 2], [np.inf, 1, 2], [-np.inf] * 3])
def test_logits_that_are_not_finite_give_no_token(bad):
    logits = jnp.array([[bad, [3, 1, 2]]], jnp.float32)
    positions = jnp.array([[4, 5]])
    assert choose(logits, positions, None).tolist() == [[3, 0]]
    sampling = _sampling(SMALLEST_FLOAT32, vocab=3)
    assert choose(logits, positions, sampling).tolist() == [[3, 0]]


def test_a_generation_whose_logits_overflow_is_refused():
    model = Transformer(small_model(), jax.random.key(1))
    model.head[...] = model.head[...] * 1e38 * 8
    generator = Generator(model)
    message = "the logits of new token 1 are not finite.* in float32 the computation overflows"
    with pytest.raises(UserError, match=message):
        generator.generate([[1]], 8)
    with pytest.raises(UserError, match=message):
        next(generator.stream([1], 8))


def test_noise_belongs_to_row_and_position():
    log_p = jnp.zeros((2, 3, 64))
    positions = jnp.array([[4, 5, 6], [4, 5, 6]])
    sampling = _sampling(rows=2)
    drawn = draw(log_p, sampling, positions)
    assert (drawn[:, 1:] == draw(log_p[:, 1:], sampling, positions[:, 1:])).all()
    swapped = sampling._replace(seed=sampling.seed[::-1])
    assert (draw(log_p, swapped, positions) == drawn[::-1]).all()
    assert len(set(drawn.ravel().tolist())) > 3


def test_rejection_by_hand():
    """What q cannot exceed p in is kept, what p lacks is rejected, and the rest is left."""
    p = jnp.array([[[0.5, 0.5, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]])
    q = jnp.array([[[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]]])
    positions = jnp.array([[3, 4, 5]])
    tokens, accepted = reject(
        jnp.array([[0, 1]]), jnp.log(q), jnp.log(p), positions, _sampling(vocab=3)
    )
    assert accepted.tolist() == [1]
    assert tokens[0, :2].tolist() == [0, 2]  # p - q at the second is all on token 2
    tokens, accepted = reject(
        jnp.array([[1, 2]]),
        jnp.log(q.at[0, 1].set(jnp.array([0, 0, 1.0]))),
        jnp.log(p),
        positions,
        _sampling(vocab=3),
    )
    assert accepted.tolist() == [2]
    assert tokens.tolist() == [[1, 2, 1]]  # the last one from p


@pytest.fixture(scope="module")
def tiny():
    """A model of five tokens, whose exits are unlike its last layer but not absurd."""
    model = Transformer(
        small_model(vocab_size=5, max_sequence_length=16, num_layers=3), jax.random.key(3)
    )
    model.head[...] = 2 * model.head[...]
    return model


def _exact(model, prompt, temperature, top_k, top_p):
    """Returns the probability of each continuation by three tokens."""
    vocab = model.config.vocab_size
    triples = np.array(list(itertools.product(range(vocab), repeat=3)))
    sequences = np.concatenate([np.tile(prompt, (len(triples), 1)), triples], axis=1)[:, :-1]
    positions = jnp.broadcast_to(jnp.arange(sequences.shape[1]), sequences.shape)
    rows = model.row_inputs(positions, jnp.ones_like(positions))
    x = model.embed(jnp.asarray(sequences))
    for layer in range(model.config.num_layers):
        x = jax.tree.map(lambda w, l=layer: w[l], model.layers)(x, *rows)
    logits = np.asarray(model.final_norm(x)[:, -3:] @ model.head_weight, np.float64)
    steps = [
        [_processed_by_sorting(logits[i, s], temperature, top_k, top_p)[triples[i, s]]
         for s in range(3)]
        for i in range(len(triples))
    ]  # fmt: skip
    return np.prod(steps, axis=1)


@pytest.fixture(scope="module")
def tiny_generator(tiny):
    """Compiles once for each way to make and accept drafts; the settings are traced.

    The second model is the first layer of the three, drawn anew: it agrees now and then.
    """
    shape = dataclasses.replace(tiny.config, num_layers=1)
    return Generator(tiny, draft_model=Transformer(shape, jax.random.key(0)))


SELF, OTHER = {"mode": "self_speculative", "exit_layer": 1}, {"mode": "draft_model"}
DRAWN = [(SELF, how, way) for how in ("same_noise", "rejection") for way in SETTINGS]
DRAWN += [(OTHER, "rejection", way) for way in (SETTINGS[0], SETTINGS[-1])]


@pytest.mark.parametrize("drafter, acceptance, setting", DRAWN)
def test_drawn_triples_have_the_exact_distribution(
    tiny, tiny_generator, drafter, acceptance, setting
):
    """Chi-square over 20,480 continuations by three tokens.

    Drafted with one layer of three, or with another model.
    """
    temperature, top_k, top_p = setting
    prompt, draws = [2, 0, 4], 20_480
    counts = np.zeros((5, 5, 5), np.int64)
    accepted = 0
    for start in range(0, draws, 4096):
        generation = tiny_generator.generate(
            [prompt] * 4096,
            3,
            draft_length=2,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=start,
            acceptance=acceptance,
            **drafter,
        )
        np.add.at(counts, tuple(np.array(generation.tokens).T), 1)
        accepted += generation.drafting.acceptance / 5
    expected = _exact(tiny, prompt, temperature, top_k, top_p) * draws
    counts = counts.ravel()
    assert counts[expected == 0].sum() == 0, "a token that was cut off was drawn"
    common = expected >= 5
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    assert len(wanted) > 5
    assert scipy.stats.chisquare(observed, wanted, sum_check=False).pvalue > 1e-3
    assert 0.05 < accepted < 0.98, "drafts that are all right, or all wrong, prove little"


@pytest.mark.parametrize("exit_layer, draft_length", [(1, 1), (2, 3), (3, 5)])
@pytest.mark.parametrize("batch", [1, 5])
def test_same_noise_draws_the_very_tokens_of_plain_decoding(exit_layer, draft_length, batch):
    model = Transformer(small_model(max_sequence_length=64), jax.random.key(1))
    generator = Generator(model)
    prompts = [[5, 3, 9], [1], [7] * 9, [60, 2], [33]][:batch]
    seen = set()
    for seed in (0, 7):
        for temperature, top_k, top_p in SETTINGS:
            options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
            plain = generator.generate(prompts, 16, **options)
            drafted = generator.generate(
                prompts,
                16,
                mode="self_speculative",
                exit_layer=exit_layer,
                draft_length=draft_length,
                **options,
            )
            assert drafted.tokens == plain.tokens
            seen.add(tuple(plain.tokens[0]))
    assert len(seen) == 8, "each seed and setting should draw other tokens"
    assert generator.compilations == 3  # none of the values compiles anew


def test_a_row_draws_alike_alone():
    generator = Generator(Transformer(small_model(), jax.random.key(1)))
    together = generator.generate([[1], [2, 3], [4]], 8, temperature=1.0, seed=10)
    alone = [
        generator.generate([prompt], 8, temperature=1.0, seed=10 + row).tokens[0]
        for row, prompt in enumerate([[1], [2, 3], [4]])
    ]
    assert together.tokens == alone


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": 1.0, "top_k": 0}, "top_k=0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p=0.0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p=1.5"),
        ({"top_k": 5}, "no meaning for temperature=0"),
        ({"temperature": 1e-40}, "temperature=1e-40 must be at least 0 in float32 too"),
        ({"temperature": 1e39}, "temperature=1e.39 must be at least 0 in float32 .* it is inf"),
        ({"temperature": np.inf}, "temperature=inf must be a number, finite"),
        ({"temperature": np.nan}, "temperature=nan must be a number, finite"),
        ({"temperature": 1.0, "top_p": 1e-46}, r"top_p=1e-46 must be in \(0, 1\] in float32 too"),
        ({"temperature": 1.0, "top_p": 1.00000001}, r"top_p=1.00000001 must be in \(0, 1\]"),
        ({"temperature": 1.0, "top_p": np.nan}, "top_p=nan must be a number"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**32}, "seed=4294967296 must be at most 4294967295"),
        ({"acceptance": "rejectoin"}, "Did you mean 'rejection'"),
        ({"stop": [[]]}, "a stop sequence is empty"),
        ({"stop": [[64]]}, r"stop sequence \[64\] holds a token outside 0..63"),
    ],
)
def test_bad_settings_are_refused_before_compiling(options, message):
    generator = Generator(Transformer(small_model(), jax.random.key(0)))
    with pytest.raises(ConfigError, match=message):
        generator.generate([[1]], 4, **options)
    assert generator.compilations == 0

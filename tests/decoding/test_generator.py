import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layerskip_jax.decoding.tuning import measure
from layerskip_jax.generator import Generator, bucket
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
        rows = model.rows(positions, jnp.ones_like(positions))
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


def test_bfloat16_runs():
    model = Transformer(small_model(dtype="bfloat16"), jax.random.key(0))
    generation = Generator(model).generate(
        [[3, 1, 4]], 6, mode="self_speculative", exit_layer=2, draft_length=2
    )
    assert len(generation.tokens[0]) == 6


@pytest.mark.parametrize("length, size", [(1, 16), (16, 16), (17, 32), (64, 64), (65, 100)])
def test_buckets(length, size):
    assert bucket(length, 100) == size


def test_one_program_serves_a_bucket(model):
    generator = Generator(model)
    for prompt, new_tokens in (([1], 3), ([1] * 16, 16), ([2] * 9, 1)):
        generator.generate([prompt], new_tokens)
        generator.generate([prompt], new_tokens, end_token=7)
    assert generator.compilations == 1
    generator.generate([[1] * 17], 3)
    assert generator.compilations == 2


@pytest.mark.parametrize(
    "prompts, new_tokens, options, message",
    [
        ([], 4, {}, "prompts is empty"),
        ([[1], []], 4, {}, "prompt 1 is empty"),
        ([[1] * 37], 4, {}, "37 tokens and max_new_tokens=4 make 41, and the context is 40"),
        ([[1]], 0, {}, "max_new_tokens=0 must be at least 1"),
        ([[64]], 4, {}, r"token outside 0..63"),
        ([[1]], 4, {"end_token": 64}, "end_token=64"),
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


def test_measure_compares_every_pair_with_plain(generator):
    result = measure(generator, [[1, 2], [3]], 8, exits=(1, 2), draft_lengths=(2,), repeats=1)
    assert [(p["exit_layer"], p["draft_length"]) for p in result["pairs"]] == [(1, 2), (2, 2)]
    for pair in result["pairs"]:
        assert pair["identical"]
        assert pair["speedup"] == pair["tokens_per_second"] / result["plain_tokens_per_second"]
        assert pair["tokens"] == 14
        assert len(pair["acceptance_by_position"]) == 2
    assert result["best"] in result["pairs"]
    with pytest.raises(ConfigError, match="no prompt"):
        measure(generator, [], 8, exits=(1,), draft_lengths=(2,))

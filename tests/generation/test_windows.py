"""A window's cache holds the window: decoding is what its definition says, however long it goes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layerskip_jax.decoding import autoregressive
from layerskip_jax.decoding.cache import empty_cache, layer_slots
from layerskip_jax.distributed.mesh import MeshShape, make_mesh
from layerskip_jax.generation.generator import Generator
from layerskip_jax.model.transformer import Transformer
from tests.helpers import small_model

WINDOW, NEW = 9, 100
# Their rows read their last tokens in several pieces, and end in different ones.
PROMPTS = [list(range(3, 60)), [5, 9, 2], [7] * 20 + [1, 2], list(range(33))]
MODES = {
    "plain": {},
    "drafts": {"mode": "self_speculative", "exit_layer": 2, "draft_length": 5},
    "drafts that end early": {
        "mode": "self_speculative", "exit_layer": 2, "draft_length": 5, "stop_below": 0.02,
    },
    "waiting": {"mode": "adaptive", "exit_when": "margin:1", "kv": "deferred", "room": 3},
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    config = small_model(
        num_layers=4, max_sequence_length=192, sliding_window=WINDOW,
        full_attention_every=3, no_rope_every=2,
    )  # fmt: skip
    return Transformer(config, jax.random.key(0))


@pytest.fixture(scope="module")
def generator(model):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autoregressive, "PREFILL_CHUNK", 16)
        yield Generator(model)


@pytest.fixture(scope="module")
def expected(model):
    """Greedy tokens by the whole sequence, run anew for each token without a cache."""
    length = max(map(len, PROMPTS)) + NEW

    @jax.jit
    def next_token(tokens, at):
        positions = jnp.arange(length)[None]
        return jnp.argmax(model.logits(tokens[None], positions, jnp.ones_like(positions))[0, at])

    found = []
    for prompt in PROMPTS:
        tokens = np.zeros(length, np.int32)
        tokens[: len(prompt)] = prompt
        for at in range(len(prompt), len(prompt) + NEW):
            tokens[at] = next_token(tokens, at - 1)
        found.append(tokens[len(prompt) : len(prompt) + NEW].tolist())
    return found


def test_slots_by_hand():
    config = small_model(num_layers=4, sliding_window=100, full_attention_every=2)
    assert [layer_slots(config, layer, 1000, 20) for layer in range(3)] == [128, 1024, 128]
    assert layer_slots(config, 0, 90, 20) == 128
    cache = empty_cache(config, 2, 1, 1000, 20)
    assert (cache.is_cyclic(0), cache.is_cyclic(1)) == (True, False)


@pytest.mark.parametrize("mode", MODES)
def test_decoding_beyond_the_window_is_what_its_definition_says(generator, expected, mode):
    """In a batch of rows of different lengths."""
    assert generator.generate(PROMPTS, NEW, **MODES[mode]).tokens == expected


def test_a_mesh_decodes_alike(model, expected):
    """Rows over two devices, heads over two."""
    mesh = make_mesh(MeshShape(data=2, tensor=2), jax.devices()[:4])
    drafts = Generator(model, mesh=mesh).generate(PROMPTS, NEW, **MODES["drafts"])
    assert drafts.tokens == expected


def test_a_generation_holds_no_more_than_the_windows(generator):
    state = generator._programs
    caches = [program.out_info[1] for key, program in state.items() if key[0] == "read"]
    assert caches
    for cache in caches:
        slots = {layer.v.shape[-2] for layer in cache.layers}
        assert min(slots) == 64 < cache.cos.shape[0]

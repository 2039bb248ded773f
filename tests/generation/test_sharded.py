"""The same tokens on one device and on a mesh, with nothing gathered."""

import re

import jax
import pytest
from jax.sharding import PartitionSpec

from layerskip_jax.distributed.mesh import MeshShape, make_mesh
from layerskip_jax.generation.generator import Generator
from layerskip_jax.model.transformer import Transformer
from layerskip_jax.schema import ConfigError
from tests.helpers import small_model

PROMPTS = [[5, 3, 9], [1], [7] * 9, [60, 2]]
WAYS = [
    {},
    {"mode": "early_exit", "exit_layer": 2},
    {"mode": "self_speculative", "exit_layer": 2, "draft_length": 3},
    {"mode": "self_speculative", "exit_layer": 1, "draft_length": 1, "temperature": 1.2,
     "top_k": 20, "top_p": 0.9},
]  # fmt: skip


@pytest.fixture(scope="module")
def model():
    model = Transformer(
        small_model(num_heads=8, num_kv_heads=4, max_sequence_length=64), jax.random.key(1)
    )
    model.head[...] = 3 * model.head[...]
    return model


@pytest.mark.parametrize("data, tensor", [(4, 2), (2, 4)])
def test_a_mesh_gives_the_tokens_of_one_device(model, data, tensor):
    mesh = make_mesh(MeshShape(data=data, tensor=tensor))
    sharded, alone = Generator(model, mesh=mesh), Generator(model)
    for way in WAYS:
        expected = alone.generate(PROMPTS, 12, **way).tokens
        assert sharded.generate(PROMPTS, 12, **way).tokens == expected


def test_a_vocabulary_that_cannot_be_split_evenly_is_padded():
    model = Transformer(
        small_model(vocab_size=61, num_heads=8, num_kv_heads=4, tie_embeddings=True),
        jax.random.key(2),
    )
    generator = Generator(model, mesh=make_mesh(MeshShape(data=2, tensor=4)))
    assert generator.weights.embedding.shape == (64, 32)
    for way in WAYS:
        expected = Generator(model).generate(PROMPTS, 12, **way).tokens
        assert generator.generate(PROMPTS, 12, **way).tokens == expected


@pytest.mark.parametrize("way", WAYS[2:])
def test_rows_and_heads_stay_where_they_are(model, way):
    """Each device has its rows and heads in the cache; no logits and no rows go to others."""
    generator = Generator(model, mesh=make_mesh(MeshShape(data=2, tensor=4)))
    generator.generate(PROMPTS, 12, **way)
    read, loop = generator._programs.values()
    for program in (read, loop):
        assert not re.findall(
            r"= .*(?:all-gather|all-to-all|collective-permute)", program.as_text()
        )
    _, cache = read.output_shardings
    after = loop.output_shardings
    assert cache == after.cache
    assert {layer.k.spec for layer in cache.layers} == {PartitionSpec("data", "tensor")}
    assert after.sequences.tokens.spec == PartitionSpec("data")


def test_a_mesh_that_does_not_divide_the_model_is_refused():
    model = Transformer(small_model(), jax.random.key(0))
    with pytest.raises(ConfigError, match="num_kv_heads=2 is not divisible by the 8 devices"):
        Generator(model, mesh=make_mesh(MeshShape(data=1, tensor=8)))

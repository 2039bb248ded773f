"""The same tokens on one device and on a mesh, with nothing gathered."""

import re

import jax
import pytest
from jax.sharding import PartitionSpec

from layerskip_jax.distributed.mesh import MeshShape, make_mesh
from layerskip_jax.generation.generator import Generator
from layerskip_jax.model.exits import ExitsConfig
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


def test_a_mesh_holds_a_draft_model_too(model):
    shape = {"num_layers": 2, "model_dim": 16, "num_heads": 4, "num_kv_heads": 4, "ffn_dim": 32}
    drafter = Transformer(small_model(max_sequence_length=64, **shape), jax.random.key(3))
    mesh = make_mesh(MeshShape(data=2, tensor=4))
    generator = Generator(model, mesh=mesh, draft_model=drafter)
    expected = Generator(model).generate(PROMPTS, 12, temperature=1.2).tokens
    drafted = generator.generate(PROMPTS, 12, mode="draft_model", draft_length=3, temperature=1.2)
    assert drafted.tokens == expected
    assert 0 < drafted.drafting.acceptance < 1
    *_, loop = generator._programs.values()
    assert not re.findall(r"= .*(?:all-gather|all-to-all|collective-permute)", loop.as_text())
    caches = (loop.output_shardings.cache, loop.output_shardings.draft_cache)
    for cache in caches:
        assert {layer.k.spec for layer in cache.layers} == {PartitionSpec("data", "tensor")}
    alone = Transformer(small_model(max_sequence_length=64), jax.random.key(3))  # two heads
    with pytest.raises(ConfigError, match="the draft model: num_kv_heads=2 is not divisible by"):
        Generator(model, mesh=mesh, draft_model=alone)


def test_adapters_and_the_learned_exit_lie_on_every_device():
    exits = ExitsConfig((1, 2), rank=4, learned=True)
    model = Transformer(
        small_model(num_heads=8, num_kv_heads=4, max_sequence_length=64, exits=exits),
        jax.random.key(1),
    )
    for index, name in enumerate(("up", "weight")):
        parameter = getattr(model.exits, name)
        parameter[...] = jax.random.normal(jax.random.key(index), parameter.shape)
    sharded = Generator(model, mesh=make_mesh(MeshShape(tensor=2), jax.devices()[:2]))
    assert sharded.weights.adapters[2].up.values.sharding.is_fully_replicated
    assert sharded.weights.classifier.weight.sharding.is_fully_replicated
    adaptive = {"mode": "adaptive", "exit_when": "learned:0.5", "exits": (1, 2)}
    for way in (*WAYS[1:3], adaptive):
        expected = Generator(model).generate(PROMPTS, 12, **way)
        found = sharded.generate(PROMPTS, 12, **way)
        assert found.tokens == expected.tokens
        assert found.depth == expected.depth


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

"""Drafts by a second model: plain decoding's tokens, whatever that model is."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layerskip_jax.decoding.cache import cache_slots
from layerskip_jax.decoding.weights import ExitClassifier
from layerskip_jax.generation.generator import Generator
from layerskip_jax.model.transformer import Transformer
from layerskip_jax.schema import ConfigError, UserError
from tests.helpers import small_model

CONTEXT = 96
OTHER = {"num_layers": 1, "model_dim": 24, "ffn_dim": 40, "num_heads": 2, "num_kv_heads": 1}


def _model() -> Transformer:
    """A random model whose last layer adds a fifth of what it would, with few near ties."""
    model = Transformer(small_model(max_sequence_length=CONTEXT), jax.random.key(1))
    scale = jnp.array([2.0, 2.0, 2.0, 0.4])
    for matrix in (model.layers.attention.o, model.layers.mlp.down):
        matrix[...] = matrix[...] * scale.reshape(-1, *[1] * (matrix[...].ndim - 1))
    model.head[...] = 3 * model.head[...]
    return model


def _first_layers(model: Transformer, count: int) -> Transformer:
    """The first layers of a model as a model of their own, which agrees with it at times."""
    cut = Transformer(dataclasses.replace(model.config, num_layers=count), jax.random.key(0))
    cut.layers = jax.tree.map(lambda stacked: stacked[:count], model.layers)
    for name in ("embedding", "head"):
        getattr(cut, name)[...] = getattr(model, name)[...]
    return cut


def _other(**changes) -> Transformer:
    """A random model with nothing but the vocabulary in common."""
    shape = {"max_sequence_length": CONTEXT, **OTHER, **changes}
    return Transformer(small_model(**shape), jax.random.key(2))


def _prompts(count: int) -> list[list[int]]:
    random = np.random.default_rng(5)
    return [random.integers(0, 64, random.integers(1, 14)).tolist() for _ in range(count)]


@pytest.fixture(scope="module")
def generators():
    """By how good the drafts are: perfect, often right, and hopeless."""
    model = _model()
    drafters = {"itself": model, "first layers": _first_layers(model, 3), "other": _other()}
    return {name: Generator(model, draft_model=drafter) for name, drafter in drafters.items()}


def _drafted(generator, prompts, new_tokens, draft_length, **options):
    return generator.generate(
        prompts, new_tokens, mode="draft_model", draft_length=draft_length, **options
    )


def test_a_model_accepts_all_of_its_own_drafts_and_reads_what_it_counts(generators):
    """21 tokens: the first from the prompt, then four cycles of five; weights by hand."""
    generator = generators["itself"]
    generation = _drafted(generator, [[1, 2, 3]], 21, 4)
    drafting = generation.drafting
    assert drafting.acceptance == 1
    assert (drafting.cycles, drafting.tokens_per_cycle) == (4, 5)
    assert drafting.acceptance_by_position == (1, 1, 1, 1)
    layers, head = (
        sum(leaf.nbytes for leaf in jax.tree.leaves(part))
        for part in (generator.weights.layers, generator.weights.any_head)
    )
    # Four drafts by all layers and the head, the last of them fed, and one pass to verify.
    assert generation.weight_bytes == 4 * (4 * (layers + head) + layers + (layers + head))


@pytest.mark.parametrize("sampled", [{}, {"temperature": 0.9, "top_p": 0.9, "seed": 4}])
@pytest.mark.parametrize("drafter", ["first layers", "other"])
def test_the_tokens_are_those_of_plain_decoding(generators, drafter, sampled):
    """Eight mixed prompts and one, end tokens anywhere, and drafts that end early."""
    generator, prompts = generators[drafter], _prompts(8)
    plain = generator.generate(prompts, 20, **sampled).tokens
    ends = [t for t, _ in collections.Counter(sum(plain, [])).most_common(12)[2::3]]
    for options in ({}, {"stop_below": 0.05}, {"stop_below": 0.4}, {"stop_below": 0.99}):
        drafted = _drafted(generator, prompts, 20, 3, **options, **sampled)
        assert drafted.tokens == plain
        drafting = drafted.drafting
        assert drafting.tokens == 8 * 19
        assert 0 <= drafting.accepted + drafting.cycles - drafting.tokens <= 8
        assert sum(drafting.kept) == drafting.accepted <= drafting.drafted
        for end in ends:
            ended = [row[: row.index(end) + 1] if end in row else row for row in plain]
            stopped = _drafted(generator, prompts, 20, 3, end_token=end, **options, **sampled)
            assert stopped.tokens == ended
        if not options:
            at_least = {"first layers": 0.3, "other": 0}[drafter]
            assert at_least <= drafting.acceptance < 0.95
    assert _drafted(generator, prompts[:1], 20, 3, **sampled).tokens == plain[:1]


def test_a_row_counts_alike_in_any_company(generators):
    """Caches of both models stay at the same length, row by row, whatever others accept."""
    generator, prompts = generators["first layers"], _prompts(4)
    options = {"temperature": 1.0, "acceptance": "rejection"}
    together = _drafted(generator, prompts, 16, 6, seed=3, **options)
    alone = [
        _drafted(generator, [prompt], 16, 6, seed=3 + row, **options)
        for row, prompt in enumerate(prompts)
    ]
    assert together.tokens == [generation.tokens[0] for generation in alone]
    total = alone[0].drafting
    for generation in alone[1:]:
        total = total + generation.drafting
    assert together.drafting == total


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "stop_below": 0.4}])
def test_a_stream_gives_the_same_tokens_and_its_drafts(generators, options):
    generator, prompt = generators["first layers"], [3, 1, 4]
    events = list(generator.stream(prompt, 12, mode="draft_model", draft_length=3, **options))
    tokens = [token for event in events if not event.is_draft for token in event.tokens]
    sampled = {name: value for name, value in options.items() if name == "temperature"}
    assert tokens == generator.generate([prompt], 12, **sampled).tokens[0]
    lengths = {len(event.tokens) for event in events if event.is_draft}
    assert lengths == {3} if "stop_below" not in options else lengths <= {1, 2, 3} and lengths


def test_one_compilation_serves_a_bucket_and_nothing_crosses_to_the_host():
    generator = Generator(_model(), draft_model=_other())
    _drafted(generator, [[1]], 3, 2)
    assert generator.compilations == 3  # prompts by both models, and a loop
    with jax.transfer_guard_host_to_device("disallow"):
        _drafted(generator, [[2] * 16], 16, 2)
    _drafted(generator, [[3] * 9], 2, 2, end_token=5)
    assert generator.compilations == 3
    generator.generate([[1]], 3)
    assert generator.compilations == 4  # plain decoding's loop; its prompts are read as before
    _drafted(generator, [[1]], 3, 2, stop_below=0.5)
    _drafted(generator, [[1]], 3, 2, stop_below=0.7)
    assert generator.compilations == 5


def test_only_some_tokens_may_be_drafted(generators):
    prompts = _prompts(3)
    plain = generators["itself"].generate(prompts, 16)
    common = [t for t, _ in collections.Counter(sum(plain.tokens, [])).most_common(8)]
    generator = Generator(_model(), draft_model=_first_layers(_model(), 3), draft_tokens=common)
    drafted = _drafted(generator, prompts, 16, 3)
    assert drafted.tokens == plain.tokens
    assert 0 < drafted.drafting.acceptance < 1
    for event in generator.stream(prompts[0], 16, mode="draft_model", draft_length=3):
        assert not event.is_draft or set(event.tokens) <= set(common)


@pytest.mark.parametrize(
    "prompt, new_tokens, options, message",
    [
        ([1], 4, {}, "draft_length=None must be at least 1: say how many tokens the draft model"),
        ([1], 4, {"draft_length": 0}, "draft_length=0 must be at least 1"),
        ([1], 4, {"draft_length": 2, "exit_layer": 1}, "exit_layer=1 has no meaning for mode='dr"),
        ([1], 4, {"draft_length": 2, "pairs": [(1, 2)]}, "pairs have no meaning for mode='dra"),
        ([1], 4, {"draft_length": 2, "exit_when": "entropy:0.2"}, "exit_when='entropy:0.2' has no"),
        ([1], 4, {"draft_length": 2, "stop_below": "learned:0.5"}, "give a probability, such as"),
        ([1], 4, {"draft_length": 2, "stop_below": 1.5}, "stop_below=1.5"),
        ([1] * 10, 7, {"draft_length": 2}, "make 17 tokens, and the context of the draft model is"),
    ],
)
def test_bad_requests_are_refused_before_compiling(prompt, new_tokens, options, message):
    generator = Generator(_model(), draft_model=_other(max_sequence_length=16))
    with pytest.raises(ConfigError, match=message):
        generator.generate([prompt], new_tokens, mode="draft_model", **options)
    assert generator.compilations == 0


def test_a_draft_model_there_must_be_and_of_the_same_vocabulary():
    model = _model()
    with pytest.raises(ConfigError, match="needs a second model to draft with"):
        Generator(model).generate([[1]], 4, mode="draft_model", draft_length=2)
    with pytest.raises(ConfigError, match="a vocabulary of 65 tokens and the model one of 64"):
        Generator(model, draft_model=_other(vocab_size=65))
    broken = _other()
    broken.embedding[...] = broken.embedding[...].at[3, 3].set(jnp.nan)
    with pytest.raises(UserError, match="the draft model: the parameter embedding holds a number"):
        Generator(model, draft_model=broken)


def test_a_model_of_one_layer_may_be_drafted_for():
    model = Transformer(small_model(num_layers=1), jax.random.key(0))
    generator = Generator(model, draft_model=_other())
    plain = generator.generate([[1, 2]], 8).tokens
    assert _drafted(generator, [[1, 2]], 8, 2).tokens == plain


def test_memory_counts_both_caches_and_both_weights(monkeypatch):
    """A float32 key and value: 2 heads of 8 in 4 layers, and 1 head of 12 in one layer."""
    generator = Generator(_model(), draft_model=_other())
    slots = cache_slots(16 + 16 + 8)
    caches = 32 * slots * 4 * 2 * (4 * 2 * 8 + 1 * 1 * 12)
    weights = sum(
        leaf.nbytes for leaf in jax.tree.leaves((generator.weights, generator.draft_weights))
    )
    needed = caches + weights
    limit = [needed - 1]
    monkeypatch.setattr("layerskip_jax.generation.generator.device_memory", lambda: limit[0])
    with pytest.raises(ConfigError, match="32 rows of .* give fewer prompts"):
        _drafted(generator, [[1]] * 32, 4, 2)
    assert generator.compilations == 0
    assert len(generator.generate([[1]] * 32, 4).tokens) == 32  # one cache fits
    limit[0] = needed
    assert len(_drafted(generator, [[1]] * 32, 4, 2).tokens) == 32


def test_the_classifier_of_a_target_is_not_asked_about_another_models_drafts():
    generator = Generator(_model(), draft_model=_other())
    classifier = ExitClassifier(jnp.zeros(32), jnp.float32(0))
    generator.weights = generator.weights._replace(classifier=classifier)
    with pytest.raises(ConfigError, match="asks whether an exit is right"):
        _drafted(generator, [[1]], 4, 2, stop_below="learned:0.5")

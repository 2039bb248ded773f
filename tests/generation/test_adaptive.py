"""Adaptive depth against a reference that keeps no cache and runs one row after another."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layerskip_jax
from layerskip_jax.decoding.adaptive import Depth
from layerskip_jax.decoding.cache import empty_cache, run_layers
from layerskip_jax.decoding.exit_policy import POLICIES, parse_policy
from layerskip_jax.decoding.sampling import Sampling, choose
from layerskip_jax.decoding.weights import ExitAdapter, ExitClassifier, Matrix
from layerskip_jax.generation.generator import Generator
from layerskip_jax.generation.options import Request
from layerskip_jax.model.transformer import Transformer
from layerskip_jax.run_folder.exit_policies import store_policy
from layerskip_jax.run_folder.paths import RunFolder
from layerskip_jax.schema import ConfigError
from tests.helpers import small_model

LAYERS, CONTEXT, NEW = 5, 48, 14
EXITS = (1, 2, 4)
THAT_WAIT = {
    "mode": "adaptive", "exit_when": "patience:2", "kv": "deferred", "room": 3, "exits": EXITS,
}  # fmt: skip
PROMPTS = [[5], [7, 9, 11, 2, 60, 3, 3], [8, 8], [1, 2, 3], [40], [41, 3], [9, 9, 9, 9], [50, 6]]
# Each makes tokens of these prompts stop at several exits, early and late.
POLICIES_TRIED = ("entropy:0.9", "margin:0.05", "saturation:0.85", "patience:2", "learned:0.52")


@pytest.fixture(scope="module")
def model():
    return Transformer(
        small_model(max_sequence_length=CONTEXT, num_layers=LAYERS), jax.random.key(0)
    )


@pytest.fixture(scope="module")
def classifier(model):
    weight = jax.random.normal(jax.random.key(5), (model.config.model_dim,)) / 8
    return ExitClassifier(weight, jnp.float32(0))


@pytest.fixture(scope="module")
def generator(model, classifier):
    generator = Generator(model)
    generator.weights = generator.weights._replace(classifier=classifier)
    return generator


@pytest.fixture(scope="module")
def reference(model, classifier):
    return Reference(model, classifier)


class Reference:
    """The whole sequence anew for every token; tokens that stopped keep their states."""

    def __init__(self, model, classifier):
        self.model, self.classifier = model, classifier
        self.states = jax.jit(self._states)

    def _states(self, tokens, depths):
        """Returns the states before layer 0 and after each, `[L + 1, S, D]`."""
        positions = jnp.arange(len(tokens))[None]
        rows = self.model.row_inputs(positions, jnp.ones_like(positions))
        x = self.model.embed(tokens[None])
        found = [x[0]]
        for layer in range(LAYERS):
            after = jax.tree.map(lambda w, l=layer: w[l], self.model.layers)(x, *rows)
            x = jnp.where((layer < depths)[None, :, None], after, x)
            found.append(x[0])
        return jnp.stack(found)

    def scores(self, policy, states, exits):
        """Returns the score of each candidate exit and its logits, in plain numpy."""
        z = np.stack([np.asarray(self.model.final_norm(states[e])) for e in exits])
        logits = z @ np.asarray(self.model.head_weight)
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        if policy == "entropy":
            return -(p * np.log(p)).sum(-1) / np.log(p.shape[-1])
        if policy == "margin":
            ordered = np.sort(p, axis=-1)
            return ordered[:, -1] - ordered[:, -2]
        if policy == "saturation":
            x = np.asarray(states)[list(exits)]
            x = x / np.linalg.norm(x, axis=-1, keepdims=True)
            return np.concatenate([[-2], (x[1:] * x[:-1]).sum(-1)])
        if policy == "patience":
            best, streaks = logits.argmax(-1), [1]
            for now, before in zip(best[1:], best[:-1], strict=True):
                streaks.append(streaks[-1] + 1 if now == before else 1)
            return np.array(streaks)
        w, b = np.asarray(self.classifier.weight), float(self.classifier.bias)
        return 1 / (1 + np.exp(-(z @ w + b)))

    def generate(self, prompt, exit_when, exits, kv, *, end_token=None, seed=None, falling=False):
        """Returns the new tokens, and the layers that each ran; the prompt's are all L."""
        policy = parse_policy(exit_when)
        name, threshold = policy.name, policy.threshold
        tokens = np.zeros(CONTEXT, np.int32)
        tokens[: len(prompt)] = prompt
        depths = np.full(CONTEXT, LAYERS)
        new, stopped = [], []
        for length in range(len(prompt), len(prompt) + NEW):
            depth, at = LAYERS, length - 1
            states = self.states(tokens, depths)[:, at]
            if new:  # the first token is the prompt's, by all layers
                here = threshold
                if falling:
                    high = threshold if POLICIES[name].careful_high else 1 - threshold
                    high = np.clip(0.9 * high + 0.1 * np.exp(-4 * len(new) / NEW), 0, 1)
                    here = high if POLICIES[name].careful_high else 1 - high
                scores = self.scores(name, states, exits)
                sure = {"entropy": scores < here, "patience": scores >= here}.get(
                    name, scores > here
                )
                depth = exits[sure.argmax()] if sure.any() else LAYERS
                stopped.append(depth)
                if kv == "propagate":
                    depths[at] = depth
            z = self.model.final_norm(states[depth])
            logits = (z @ self.model.head_weight)[None, None]
            sampling = None
            if seed is not None:
                sampling = Sampling(
                    jnp.float32(0.8), jnp.int32(20), jnp.float32(1), jnp.array([seed], jnp.uint32)
                )
            token = int(choose(logits, jnp.array([[length]]), sampling)[0, 0])
            new.append(token)
            tokens[length] = token
            if token == end_token:
                break
        return new, stopped


@pytest.mark.parametrize("kv", ["propagate", "deferred"])
@pytest.mark.parametrize("exit_when", POLICIES_TRIED)
def test_every_policy_is_what_its_definition_says(generator, reference, exit_when, kv):
    """Token for token, for batches of one and of mixed prompts, with an end token somewhere."""
    options = {"mode": "adaptive", "exit_when": exit_when, "kv": kv, "exits": EXITS}
    if kv == "deferred":
        options["room"] = 3
    expected = [reference.generate(prompt, exit_when, EXITS, kv) for prompt in PROMPTS]
    whole = generator.generate(PROMPTS, NEW, **options)
    assert whole.tokens == [tokens for tokens, _ in expected]
    stopped = [depth for _, depths in expected for depth in depths]
    assert whole.depth.layers == (*EXITS, LAYERS)
    assert whole.depth.tokens == tuple(stopped.count(depth) for depth in (*EXITS, LAYERS))
    assert sum(n > 0 for n in whole.depth.tokens) >= 3, "tried on no variety"
    assert whole.depth.mean_layers == pytest.approx(np.mean(stopped))
    end = expected[1][0][NEW // 2]
    ended = [
        reference.generate(prompt, exit_when, EXITS, kv, end_token=end)[0] for prompt in PROMPTS
    ]
    assert generator.generate(PROMPTS, NEW, end_token=end, **options).tokens == ended
    if exit_when == "patience:2":  # the others differ in their score alone
        for rows in (1, 3):
            alone = generator.generate(PROMPTS[1 : 1 + rows], NEW, **options)
            assert alone.tokens == [tokens for tokens, _ in expected[1 : 1 + rows]]


@pytest.mark.parametrize("kv", ["propagate", "deferred"])
def test_few_exits_sampling_and_a_falling_threshold(generator, reference, kv):
    options = {"mode": "adaptive", "kv": kv, "exits": (2,)}
    sampled = generator.generate(
        PROMPTS[:3], NEW, exit_when="margin:0.05", temperature=0.8, top_k=20, seed=3, **options
    )
    for row, prompt in enumerate(PROMPTS[:3]):
        tokens, _ = reference.generate(prompt, "margin:0.05", (2,), kv, seed=3 + row)
        assert sampled.tokens[row] == tokens
    for exit_when in ("margin:0.04", "entropy:0.9"):
        falling = generator.generate(PROMPTS[:3], NEW, exit_when=exit_when, falling=True, **options)
        expected = [
            reference.generate(prompt, exit_when, (2,), kv, falling=True) for prompt in PROMPTS[:3]
        ]
        assert falling.tokens == [tokens for tokens, _ in expected]


@pytest.mark.parametrize("kv", ["propagate", "deferred"])
def test_the_most_careful_threshold_decodes_plainly(generator, kv):
    plain = generator.generate(PROMPTS, NEW).tokens
    options = {"mode": "adaptive", "exits": EXITS, "kv": kv}
    if kv == "deferred":
        options["room"] = 3
    for exit_when in ("entropy:0", "margin:1", "saturation:1", "learned:1"):
        careful = generator.generate(PROMPTS, NEW, exit_when=exit_when, **options)
        assert careful.tokens == plain
        assert careful.depth.tokens[-1] == len(PROMPTS) * (NEW - 1)


@pytest.mark.parametrize("room", [1, 3])
def test_deferred_keys_and_values_are_those_of_a_whole_pass(generator, room):
    """Of every position that ran a layer; what waits at the end has not run the last ones."""
    job, programs, costs, evidence = generator._ready(
        _request(PROMPTS, exit_when="margin:0.05", kv="deferred", room=room, exits=EXITS)
    )
    state, limits, sampling = generator._read_prompts(job, programs, job.limits, evidence)
    rest = generator._rest(job, costs, NEW - 3)
    state = programs.advance(generator.weights, state, limits, sampling, *rest)
    config, width = generator.config, job.prompts.shape[1] + NEW
    segments = Depth("margin", EXITS, "deferred", room, False).segments(LAYERS)
    waited = 0
    for row, prompt in enumerate(PROMPTS):
        length = int(state.sequences.position[row])  # tokens that were fed
        fed = [*prompt, *np.asarray(state.sequences.tokens[row])][:length]
        tokens = jnp.zeros((1, width), jnp.int32).at[0, :length].set(jnp.array(fed))
        cache = empty_cache(config, LAYERS, 1, width)
        _, whole = run_layers(
            generator.weights,
            cache,
            generator.weights.embedding[tokens],
            jnp.arange(width)[None],
            0,
            LAYERS,
        )
        waits = int(state.waiting.count[row])
        waited += waits
        for segment, (first, last) in enumerate(segments):
            # The newest `missing` of the fed tokens have not run this segment.
            missing = int((np.asarray(state.waiting.ran[row, :waits]) <= segment).sum())
            for layer in range(first, last):
                ours, theirs = state.cache.layers[layer], whole.layers[layer]
                there = slice(0, length - missing)
                heads = config.num_kv_heads
                mine = slice(row * heads, (row + 1) * heads)
                np.testing.assert_allclose(ours.k[mine, :, there], theirs.k[:, :, there], atol=1e-5)
                np.testing.assert_allclose(ours.v[mine, there], theirs.v[:, there], atol=1e-5)
    assert waited, "nothing waited, so nothing was tried"


def _request(prompts, **options):
    return Request(prompts, NEW, mode="adaptive", **options)


def test_one_program_serves_every_threshold(generator):
    options = {"mode": "adaptive", "exits": (3,), "kv": "propagate"}
    generator.generate(PROMPTS, NEW, exit_when="margin:0.05", **options)
    compiled = generator.compilations
    generator.generate(PROMPTS, NEW, exit_when="margin:0.3", **options)
    generator.generate(PROMPTS[:5], NEW - 2, exit_when="margin:0.3", end_token=4, **options)
    assert generator.compilations == compiled


def test_a_stream_gives_the_same_tokens(generator):
    streamed = [t for e in generator.stream(PROMPTS[1], NEW, **THAT_WAIT) for t in e.tokens]
    assert [streamed] == generator.generate(PROMPTS[1:2], NEW, **THAT_WAIT).tokens


def test_a_stop_asked_for_between_passes_leaves_what_waits_waiting(generator):
    whole = generator.generate(PROMPTS, NEW, **THAT_WAIT).tokens
    asked = generator.generate(PROMPTS, NEW, ended=lambda row, tokens: False, **THAT_WAIT)
    assert asked.tokens == whole


def test_an_adapter_is_read_at_its_exit(model):
    """An adapter that turns the likeliest token around changes what stops there, and only that."""
    generator = Generator(model)
    options = {"mode": "adaptive", "exit_when": "margin:0", "exits": (2,), "kv": "propagate"}
    before = generator.generate(PROMPTS, NEW, **options).tokens
    dim = model.config.model_dim
    negative = ExitAdapter(model.final_norm, Matrix(jnp.eye(dim)), Matrix(-2 * jnp.eye(dim)))
    generator.weights = generator.weights._replace(adapters={2: negative})
    generator._programs.clear()
    after = generator.generate(PROMPTS, NEW, **options)
    assert after.tokens != before
    assert [row[0] for row in after.tokens] == [row[0] for row in before]
    assert generator.generate(PROMPTS, NEW).tokens == Generator(model).generate(PROMPTS, NEW).tokens


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "exit_when=None has no threshold"),
        ({"exit_when": "margin"}, "exit_when='margin' has no threshold"),
        ({"exit_when": "margin:2"}, "the threshold of margin=2"),
        ({"exit_when": "margin:0.5", "exits": (5,)}, "exits=5"),
        ({"exit_when": "margin:0.5", "kv": "defer"}, "Did you mean 'deferred'"),
        ({"exit_when": "margin:0.5", "kv": "deferred", "room": 0}, "room=0 must be at least 1"),
        ({"exit_when": "margin:0.5", "kv": "propagate", "room": 2}, "room=2 has no meaning"),
        ({"exit_when": "patience:2", "falling": True}, "falling has no meaning"),
        ({"exit_when": "margin:0.5", "exit_layer": 2}, "exit_layer=2 has no meaning"),
        ({"exit_when": "learned:0.5"}, "learned:0.5.* asks a classifier"),
    ],
)
def test_wrong_requests_are_refused(model, options, message):
    with pytest.raises(ConfigError, match=message):
        Generator(model).generate([[1]], 4, mode="adaptive", **options)


def test_a_policy_is_refused_where_it_means_nothing(generator):
    with pytest.raises(ConfigError, match="exit_when='margin:0.5' has no meaning for mode='plain'"):
        generator.generate([[1]], 4, exit_when="margin:0.5")


def test_figures_add_up(generator):
    options = {"mode": "adaptive", "exit_when": "margin:0.05", "kv": "propagate", "exits": EXITS}
    run = generator.generate(PROMPTS, NEW, **options).depth
    twice = run + run
    assert twice.mean_layers == run.mean_layers
    assert twice.mean_layers_of_batch == run.mean_layers_of_batch
    assert twice.steps == 2 * (NEW - 1)
    assert run.mean_layers <= run.mean_layers_of_batch <= LAYERS
    assert dataclasses.replace(run, tokens=(0,) * 4).mean_layers != run.mean_layers


def test_a_name_alone_takes_the_calibrated_threshold(finished, tmp_path):
    run = RunFolder(shutil.copytree(finished, tmp_path / "run"))
    model = layerskip_jax.load(run.path)
    entry = {"policy": "margin", "kv": "deferred", "exits": [1, 2, 3], "threshold": 0.001}
    with pytest.raises(ConfigError, match="no threshold, and none was calibrated .*calibrate"):
        model.complete([[5, 6]], 6, exit_when="margin", kv="deferred")
    store_policy(run, {**entry, "step": 12})
    found = model.complete([[5, 6]], 6, exit_when="margin", kv="deferred")
    given = model.complete([[5, 6]], 6, exit_when="margin:0.001", kv="deferred")
    assert found.generation.tokens == given.generation.tokens
    assert found.generation.depth.mean_layers == given.generation.depth.mean_layers < 4
    with pytest.raises(ConfigError, match="kv=propagate"):
        model.complete([[5, 6]], 6, exit_when="margin")
    with pytest.raises(ConfigError, match="exits 2;"):
        model.complete([[5, 6]], 6, exit_when="margin", kv="deferred", exits=[2])
    with pytest.raises(ConfigError, match="decides how deep each token runs"):
        model.complete([[5, 6]], 6, exit_when="margin", draft="auto")
    store_policy(run, {**entry, "step": 10})
    with pytest.raises(ConfigError, match="calibrated for step 10"):
        model.complete([[5, 6]], 6, exit_when="margin", kv="deferred")

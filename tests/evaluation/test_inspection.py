"""What exits predict, the layers tokens need, and the verb that shows both."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from layerskip_jax.cli import main
from layerskip_jax.commands import inspect
from layerskip_jax.data.packing import Rows
from layerskip_jax.data.tokenizer import train_tokenizer
from layerskip_jax.decoding.weights import ExitAdapter, Matrix, decoder_weights
from layerskip_jax.evaluation.inspection import (
    CHUNK,
    CLASSES,
    LayersNeeded,
    changes_of_mind,
    classes_of_vocabulary,
    first_agreement,
    inspect_tokens,
    layers_needed,
    read_exits,
    saving,
    settled,
    token_class,
    token_texts,
)
from layerskip_jax.model.definition import ModelDefinition
from layerskip_jax.model.transformer import Transformer
from layerskip_jax.schema import ConfigError
from tests.helpers import random_batch, small_model


@pytest.fixture(scope="module")
def model():
    definition = ModelDefinition(small_model())
    return definition.model(definition.init(jax.random.key(0)))


@pytest.fixture(scope="module")
def weights(model):
    return decoder_weights(model)


def test_layers_needed_by_hand():
    choices = np.array([[7, 4], [5, 4], [7, 4], [5, 4], [5, 4], [5, 4]])
    assert first_agreement(choices).tolist() == [2, 1]
    assert settled(choices).tolist() == [4, 1]
    assert changes_of_mind(choices).tolist() == [3, 0]
    assert saving(23.45, 32) == pytest.approx(0.2671875)


@given(
    arrays.arrays(np.int32, st.tuples(st.integers(1, 6), st.just(5)), elements=st.integers(0, 2))
)
def test_layers_needed_as_they_are_defined(choices):
    layers = len(choices)
    for i, tokens in enumerate(choices.T.tolist()):
        agree = [e for e in range(1, layers + 1) if tokens[e - 1] == tokens[-1]]
        firm = [e for e in agree if set(tokens[e - 1 :]) == {tokens[-1]}]
        assert first_agreement(choices)[i] == min(agree)
        assert settled(choices)[i] == min(firm)
        assert 1 <= min(agree) <= min(firm) <= layers
        changes = sum(a != b for a, b in zip(tokens, tokens[1:], strict=False))
        assert changes_of_mind(choices)[i] == changes


def test_figures_by_hand():
    counts = LayersNeeded(3)
    word, space = CLASSES.index("word begin"), CLASSES.index("whitespace")
    counts.add(np.array([[1, 1], [2, 1], [1, 1]]), np.array([word, space]))
    counts.add(np.array([[1], [2], [3]]), np.array([word]))
    figures = counts.figures()
    assert (figures["layers"], figures["tokens"]) == (3, 3)
    assert figures["first_agreement"] == {
        "mean": pytest.approx(5 / 3), "saving": pytest.approx(4 / 9), "histogram": [2, 0, 1],
    }  # fmt: skip
    assert figures["settled"]["histogram"] == [1, 0, 2]
    assert figures["changes_of_mind"] == {"mean": pytest.approx(4 / 3), "histogram": [1, 0, 2]}
    assert figures["classes"] == [
        {"class": "word begin", "tokens": 2, "first_agreement": 2, "settled": 3,
         "changes_of_mind": 2},
        {"class": "whitespace", "tokens": 1, "first_agreement": 1, "settled": 1,
         "changes_of_mind": 0},
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="no token"):
        LayersNeeded(3).figures()


@pytest.mark.parametrize(
    "text, name",
    [
        (" ", "whitespace"), ("\n    ", "whitespace"), ("\t", "whitespace"),
        ("def", "keyword"), (" return", "keyword"), (" None", "keyword"),
        ("(", "punctuation"), (" ==", "punctuation"), ("):\n", "punctuation"),
        ("12", "number"), (" 0x", "number"), ("3.5", "number"),
        ("_", "identifier"), (" _name", "identifier"), ("getValue", "identifier"),
        ("utf8", "identifier"), (".join", "identifier"),
        (" word", "word begin"), (" Élan", "word begin"), (" 日本", "word begin"),
        ("ing", "word inside"), ("'s", "word inside"), ("Hello", "word inside"),
        ("\ufffd", "other"), ("", "other"),
    ],
)  # fmt: skip
def test_classes_of_tokens(text, name):
    assert token_class(text) == name


def test_tokens_are_read_as_they_stand_within_a_line():
    tokenizer = train_tokenizer(iter(["import this and import that"] * 9), 300)
    ids = tokenizer.encode("import that and this").ids
    texts = token_texts(tokenizer, ids)
    assert "".join(texts) == "import that and this" and texts[1].startswith(" ")
    classes = classes_of_vocabulary(tokenizer, 300)
    assert CLASSES[classes[tokenizer.token_to_id("<|endoftext|>")]] == "other"
    assert CLASSES[classes[ids[0]]] == "keyword"


def slow_choices(model, batch):
    """Every exit's logits by the training-side pass, all at once."""

    def visit(carry, _, x):
        head = model.head_weight[:, : model.config.vocab_size]
        return carry, jnp.einsum("bsd,dv->bsv", model.final_norm(x), head)

    batch = jax.tree.map(jnp.asarray, batch)
    rows = model.row_inputs(batch.positions, batch.segment_ids)
    return model.scan_layers(model.embed(batch.tokens), rows, visit, None)[1]


def test_layers_of_several_kinds_are_read_as_they_train():
    config = small_model(
        sliding_window=3, full_attention_every=2, no_rope_every=3, qk_norm="all",
        norm_position="after",
    )  # fmt: skip
    model, batch = Transformer(config, jax.random.key(0)), random_batch(3)
    seen = read_exits(
        decoder_weights(model), config, batch.tokens, batch.positions, batch.segment_ids, top=1
    )
    p = jax.nn.softmax(slow_choices(model, batch))
    np.testing.assert_allclose(seen.probabilities[..., 0], p.max(axis=-1), atol=1e-5)


def test_exits_of_packed_windows_are_those_of_the_training_side(model, weights):
    batch = random_batch(3, rows=CHUNK // 12 + 2)  # more than a chunk, and no whole number of them
    seen = read_exits(
        weights, model.config, batch.tokens, batch.positions, batch.segment_ids, top=5
    )
    p = jax.nn.softmax(slow_choices(model, batch))
    best, ids = jax.lax.top_k(p, 5)
    np.testing.assert_allclose(seen.probabilities, best, atol=1e-5)
    clear = np.asarray(best[..., 0] - best[..., 1]) > 1e-4
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(
        np.asarray(seen.tokens)[..., 0][clear], np.asarray(ids)[..., 0][clear]
    )
    one = read_exits(weights, model.config, batch.tokens, batch.positions, batch.segment_ids, top=1)
    np.testing.assert_array_equal(one.tokens[..., 0], seen.tokens[..., 0])
    classes = np.zeros(64, int)
    figures = layers_needed(weights, model.config, [Rows(*batch)], classes)
    choices = np.asarray(one.tokens)[:, batch.valid, 0]
    assert figures["tokens"] == batch.valid.sum()
    assert figures["settled"]["mean"] == pytest.approx(settled(choices).mean())


def test_an_adapter_changes_its_own_exit_alone(model, weights):
    random = np.random.default_rng(0)
    down = jnp.asarray(random.normal(size=(2, 32)), jnp.float32)
    up = jnp.asarray(random.normal(size=(32, 2)), jnp.float32)
    adapted = weights._replace(
        adapters={2: ExitAdapter(weights.final_norm, Matrix(down), Matrix(up))}
    )
    text = list(range(1, 20))
    before = inspect_tokens(weights, model.config, text).probabilities
    after = inspect_tokens(adapted, model.config, text).probabilities
    changed = [not np.array_equal(a, b) for a, b in zip(before, after, strict=True)]
    assert changed == [False, True, False, False]


def test_texts_that_cannot_be_read_are_named(model, weights):
    for tokens, message in (([], "no token"), ([64], "token 64"), ([1] * 2049, "2,049 tokens")):
        with pytest.raises(ConfigError, match=message):
            inspect_tokens(weights, model.config, tokens)


def test_columns_go_in_blocks_that_fit():
    assert list(inspect._blocks([3, 4, 5, 20, 2], 9)) == [(0, 2), (2, 3), (3, 4), (4, 5)]
    assert list(inspect._blocks([3], 9)) == [(0, 1)]


def test_prompts_in_the_terminal_and_as_a_page(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    page, figures = tmp_path / "page.html", tmp_path / "figures.json"
    arguments = ["inspect", f"--workdir={finished}", "--prompt=Document </script> 7"]
    assert main([*arguments, f"--output={page}", f"--json={figures}"]) == 0
    printed = capsys.readouterr().out
    [text] = json.loads(figures.read_text())
    layers, count = np.shape(text["predicted"])[:2]
    assert layers == 4 and count == len(text["tokens"])
    assert (
        printed.count("layer ") >= 2 and max(map(len, printed.split("Above")[0].split("\n"))) <= 60
    )
    # Every cell of the last layer equals it, so that each is marked.
    assert printed.count("= ") >= count
    assert page.read_text().count("</script>") == 2


def test_data_are_measured_and_kept(finished, prepared, tmp_path, capsys):
    kept = finished / "layers_needed.json"
    figures = tmp_path / "figures.json"
    wanted = ["inspect", f"--workdir={finished}", "--batches=2", f"--json={figures}"]
    assert main([*wanted, f"--data={prepared}", f"--beside={finished}"]) == 0
    found = json.loads(figures.read_text())
    assert found["layers"] == 4 and 0 < found["tokens"] <= 2 * inspect.ROWS * 12
    assert sum(found["settled"]["histogram"]) == found["tokens"]
    assert [entry["settled"] for entry in found["beside"]] == [found["settled"]]
    assert f"{found['settled']['mean']:.2f}" in capsys.readouterr().out
    assert not kept.exists()  # of data that were named, nothing is kept


@pytest.mark.parametrize(
    "options, message",
    [
        (["--prompt=a", "--data=x"], "--data=x"),
        (["--output=page.html"], "--output is the page of a prompt"),
        (["--prompt=a", "--output=page.pdf"], "must end in .html"),
        (["--batches=-1"], "--batches=-1"),
        (["--data=nowhere"], "holds no prepared data"),
    ],
)
def test_what_contradicts_itself_is_refused(finished, options, message, capsys):
    assert main(["inspect", f"--workdir={finished}", *options]) == 2
    assert message in capsys.readouterr().err

"""What a config or a checkpoint says, leaves out or says twice, against transformers itself."""

import dataclasses
import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import layerskip_jax
from layerskip_jax.commands.export import export
from layerskip_jax.commands.import_model import import_model
from layerskip_jax.data.manifest import Manifest, PrepareOptions, Split
from layerskip_jax.interop.huggingface import FAMILIES, from_hugging_face_config
from layerskip_jax.interop.pretrained import end_token_ids, open_pretrained
from layerskip_jax.model.rope import rope_frequencies
from layerskip_jax.schema import UserError
from tests.interop.helpers import END, LLAMA3, published

CLASSES = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "smollm3": transformers.SmolLM3Config,
    "olmo2": transformers.Olmo2Config,
}
SAID = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 8, "hidden_act": "silu",
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 5000.0,
    "tie_word_embeddings": True, "bos_token_id": 3, "eos_token_id": 4, "pad_token_id": 5,
}  # fmt: skip
WITHOUT = {"mistral": {"sliding_window": None}}


@pytest.fixture(scope="module")
def llama(tmp_path_factory, tokenizer_file):
    return published(tmp_path_factory.mktemp("llama"), tokenizer_file, "llama 2", torch.float32)


@pytest.fixture
def folder(llama, tmp_path):
    """A copy of a published Llama that a test may change."""
    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def set_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def set_tensors(folder, change):
    """Changes the dict of tensors in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def assert_same(family, settings):
    """Our shapes, kinds of layers and frequencies are those of the class of transformers."""
    ours = from_hugging_face_config({"model_type": family, **settings}, "there")
    theirs = CLASSES[family].from_dict(json.loads(json.dumps(settings)))
    names = {
        "vocab_size": "vocab_size", "hidden_size": "model_dim", "intermediate_size": "ffn_dim",
        "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads", "max_position_embeddings": "max_sequence_length",
        "rms_norm_eps": "norm_eps", "tie_word_embeddings": "tie_embeddings",
    }  # fmt: skip
    for name, field in names.items():
        assert getattr(ours, field) == getattr(theirs, name), name
    width = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert ours.head_dim == width
    kinds = [(kind.window, kind.rotary) for kind in ours.layer_kinds]
    assert kinds == list(zip(*kinds_there(theirs, family), strict=True))
    frequencies = LlamaRotaryEmbedding(theirs).inv_freq
    np.testing.assert_allclose(rope_frequencies(ours), frequencies, rtol=2e-5)


def kinds_there(theirs, family):
    """Returns the window of every layer there, 0 where it hides nothing, and where it rotates."""
    layers, window = theirs.num_hidden_layers, getattr(theirs, "sliding_window", None)
    types = ["sliding_attention"] * layers
    if family != "mistral":
        types = getattr(theirs, "layer_types", None) or ["full_attention"] * layers
    hides = window is not None and window < theirs.max_position_embeddings
    windows = [window if hides and kind == "sliding_attention" else 0 for kind in types]
    return windows, [bool(x) for x in getattr(theirs, "no_rope_layers", [1] * layers)[:layers]]


@pytest.mark.parametrize("family", CLASSES)
def test_every_default_is_that_of_the_class_in_transformers(family):
    """One by one, and all at once; a Mistral has a window unless it says that it has none."""
    theirs = CLASSES[family]()
    defaults = dict(FAMILIES[family].defaults)
    assert defaults.pop("rope_theta") == theirs.rope_parameters["rope_theta"]
    if family in ("qwen2", "qwen3"):
        assert defaults.pop("sliding_window") == 4096  # None there, for it is not used
    if family in ("llama", "olmo2"):  # which work these out at once
        assert defaults.pop("num_key_value_heads") is None
    if family == "smollm3":
        assert defaults.pop("no_rope_layers") is None
    if family != "qwen3":
        assert defaults.pop("head_dim") is None
    assert defaults == {name: getattr(theirs, name) for name in defaults}
    for name in SAID:
        without = {key: value for key, value in SAID.items() if key != name}
        if name != "max_position_embeddings" or family != "mistral":
            assert_same(family, without)
    assert_same(family, WITHOUT.get(family, {}))


class Recorder(dict):
    """A config.json that knows which of its keys were looked at."""

    def __init__(self, *args):
        super().__init__(*args)
        self.read = set()

    def get(self, name, default=None):
        self.read.add(name)
        return super().get(name, default)

    def __contains__(self, name):
        self.read.add(name)
        return super().__contains__(name)


def test_the_page_of_weights_lists_every_key_that_is_read():
    page = (Path(__file__).parents[2] / "docs" / "weights.md").read_text()
    table = page.split("| key of `config.json` |")[1].split("\n\n")[0]
    rows = [line.split("|")[1] for line in table.splitlines()[2:]]
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    read = {"bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype"}
    for family in CLASSES:
        settings = Recorder(SAID | {"model_type": family, "rope_scaling": SCALED})
        settings["use_sliding_window"] = family in ("qwen2", "qwen3")
        from_hugging_face_config(settings, "there")
        read |= settings.read
    assert listed == read


SOME_SLIDE = ["sliding_attention", "full_attention", "sliding_attention"]
SCALED = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    "settings",
    [
        {"head_dim": None},
        {"hidden_act": "swish"},
        {"rope_scaling": None, "rope_parameters": None},
        {"rope_scaling": {}, "rope_parameters": {"rope_type": "default", "rope_theta": 70.0}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default", "rope_theta": 70.0}},
        {"rope_scaling": LINEAR | {"rope_theta": 90.0}},
        {"rope_scaling": LINEAR | {"type": "default"}},
        {"rope_parameters": {"rope_theta": 90.0}},
        {"rope_parameters": {"rope_type": "default", "factor": 8.0}},
        {"rope_parameters": {k: v for k, v in SCALED.items() if not k.startswith("original")}},
        {"rope_scaling": SCALED},
        {"layer_types": ["full_attention", "attention", "full_attention"]},
        {"partial_rotary_factor": 1.0},
        {"attention_dropout": 0.5, "unheard_of": {"a": 1}},
    ],
    ids=str,
)
def test_what_is_null_or_said_twice_means_what_it_does_there(settings):
    family = "qwen2" if "layer_types" in settings else "llama"
    assert_same(family, SAID | settings)


@pytest.mark.parametrize(
    "family, settings",
    [
        ("llama", {"num_key_value_heads": None}),
        ("qwen2", {"num_key_value_heads": None}),
        ("mistral", {"sliding_window": 64}),  # as long as the context, so that it hides nothing
        ("mistral", {"attention_bias": True, "mlp_bias": True}),  # which the class does not read
        ("qwen2", {"use_sliding_window": False, "sliding_window": 16}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16}),  # from layer 28 on
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}),
        ("mistral", {"max_position_embeddings": 8192}),
        ("mistral", {"sliding_window": 16}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 16, "layer_types": SOME_SLIDE}),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 16, "layer_types": SOME_SLIDE}),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 0, 0]}),  # more than there are layers
        ("smollm3", {"no_rope_layers": [0, 0, 0]}),
        ("smollm3", {"no_rope_layer_interval": 3}),
        ("olmo2", {"num_key_value_heads": None}),
    ],
    ids=str,
)
def test_each_family_reads_its_own_keys(family, settings):
    assert_same(family, SAID | settings)


@pytest.mark.parametrize(
    "family, settings, message",
    [
        ("mistral", {"sliding_window": 0}, "sliding_window=0 lets a token see nothing"),
        ("mistral", {"sliding_window": 16, "layer_types": ["full_attention"] * 3}, "of a Mistral"),
        ("olmo2", {"sliding_window": 16}, "sliding_window=16 limits"),
        ("qwen3", {"attention_bias": True}, "attention_bias=true puts biases"),
        ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval=0 is below 1"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "does not say 0 or 1 of its 3 layers"),
        ("smollm3", {"no_rope_layers": [0, 1, 1]}, r"no_rope_layers sets layers \[1\] apart"),
        (
            "qwen3",
            {"use_sliding_window": False, "layer_types": SOME_SLIDE},
            "'sliding_attention', and no sliding_window is in use",
        ),
        ("llama", {"sliding_window": 4096}, "sliding_window=4096 limits"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
            r"layer_types sets layers \[1, 2\] apart, which are not every n-th",
        ),
        ("qwen2", {"layer_types": ["full_attention"] * 2}, "does not list its 3 layers"),
        ("qwen2", {"layer_types": ["full_attention"] * 2 + ["chunked"]}, "has 'chunked'"),
        ("llama", {"head_dim": 0}, "head_dim=0"),
        ("llama", {"num_key_value_heads": 0}, "num_kv_heads=0 must be at least 1"),
        ("llama", {"num_key_value_heads": True}, "num_key_value_heads=True is no integer"),
        ("llama", {"vocab_size": None}, "vocab_size=None is no integer"),
        ("llama", {"hidden_size": 64.0}, "hidden_size=64.0 is no integer"),
        ("llama", {"hidden_act": None}, "hidden_act=None is not 'silu'"),
        ("llama", {"max_position_embeddings": None}, "max_position_embeddings=None is no integer"),
        ("llama", {"rms_norm_eps": None}, "rms_norm_eps=None is no finite number"),
        ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps=nan is no finite number"),
        ("llama", {"rope_theta": None}, "rope_theta=None is no finite number"),
        ("llama", {"rope_theta": float("inf")}, "rope_theta=inf is no finite number"),
        ("llama", {"rope_theta": 10**400}, "rope_theta=10+ is no finite number"),
        ("llama", {"rope_parameters": {"rope_theta": None}}, "rope_theta=None is no finite"),
        ("llama", {"tie_word_embeddings": "false"}, "'false' is neither true nor false"),
        ("llama", {"rope_scaling": "linear"}, "rope_scaling='linear' is no object"),
        ("llama", {"rope_scaling": LINEAR | {"factor": None}}, "factor=None is no finite number"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "'linear' lacks factor"),
        ("llama", {"rope_scaling": {"type": None}}, "rope scaling None is none of"),
        (
            "llama",
            {"rope_scaling": SCALED, "original_max_position_embeddings": 32},
            "original_max_position_embeddings twice, 16 and 32",
        ),
        (
            "qwen2",
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            r"differ by kind of layer \(full_attention\)",
        ),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 rotates a part"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ("llama", {"per_layer_config": {"0": {"num_attention_heads": 2}}}, "per_layer_config"),
        ("llama", {"model_type": None}, "model_type=None is none of"),
        ("llama", {"model_type": ["llama"]}, "model_type=.* is none of"),
        ("llama", {"layer_types": [{}, {}, {}]}, "layer_types has {}"),
    ],
    ids=str,
)
def test_what_cannot_be_honoured_is_refused_by_name(family, settings, message):
    with pytest.raises(UserError, match=message):
        from_hugging_face_config({"model_type": family} | SAID | settings, "there")


def test_a_setting_said_twice_is_warned_of(caplog):
    twice = {"rope_parameters": {"rope_theta": 70.0}, "model_type": "llama"}
    assert from_hugging_face_config(SAID | twice, "there").rope_theta == 70
    assert "there says rope_theta twice, 70.0 and 5000.0; 70.0 counts" in caplog.text


@pytest.mark.parametrize(
    "model, generation, expected",
    [
        ({"model_type": "llama"}, None, [2]),
        ({"model_type": "qwen2"}, None, []),
        ({"model_type": "llama", "eos_token_id": None}, None, []),
        ({"model_type": "llama"}, {"eos_token_id": [7, 8]}, [7, 8]),
        ({"model_type": "llama", "eos_token_id": 4}, {"eos_token_id": [7, 4]}, [4, 7]),
        ({}, None, []),
    ],
)
def test_what_ends_a_text_where_it_is_absent_null_or_said_twice(
    model, generation, expected, tmp_path
):
    files = {"config.json": model, "generation_config.json": generation}
    files = {name: json.dumps(said).encode() for name, said in files.items() if said is not None}
    assert end_token_ids(files, tmp_path) == expected


@pytest.mark.parametrize("value", [-1, "2", [2, None], 2.0])
def test_an_end_token_that_is_no_id_is_refused(value, tmp_path):
    files = {"config.json": json.dumps({"eos_token_id": value}).encode()}
    with pytest.raises(UserError, match=r"eos_token_id=.* is no token's id"):
        end_token_ids(files, tmp_path)


# Tensors and files


@pytest.mark.parametrize("same", [True, False])
def test_a_head_beside_a_tied_embedding_counts_where_it_differs(folder, same, caplog):
    set_config(folder, tie_word_embeddings=True)
    if same:
        set_tensors(
            folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()})
        )
    model = open_pretrained(folder)
    assert model.config.tie_embeddings is same
    assert ("is not tied" in caplog.text) is not same
    stored = load_file(folder / "model.safetensors")["lm_head.weight"]
    found = model.parameters()
    head = found["embedding"] if same else np.asarray(found["head"]).T
    np.testing.assert_array_equal(head, stored)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    np.testing.assert_array_equal(theirs.lm_head.weight.detach().numpy(), stored)


def test_one_tensor_of_two_tied_ones_is_enough(folder):
    set_config(folder, tie_word_embeddings=True)
    before = load_file(folder / "model.safetensors")["lm_head.weight"]
    set_tensors(folder, lambda tensors: tensors.pop("model.embed_tokens.weight"))
    found = open_pretrained(folder).parameters()
    np.testing.assert_array_equal(found["embedding"], before)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    np.testing.assert_array_equal(theirs.model.embed_tokens.weight.detach().numpy(), before)


def test_rotary_buffers_are_ignored_and_a_missing_prefix_is_added(folder):
    before = open_pretrained(folder).parameters()

    def change(tensors):
        for name in [name for name in tensors if name.startswith("model.")]:
            tensors[name.removeprefix("model.")] = tensors.pop(name)
        for name in ("inv_freq", "cos_cached", "sin_cached"):
            tensors[f"layers.0.self_attn.rotary_emb.{name}"] = np.full(4, np.nan, np.float32)
        tensors["rotary_emb.inv_freq"] = np.ones(4, np.float32)

    set_tensors(folder, change)
    after = open_pretrained(folder).parameters()
    np.testing.assert_array_equal(after["embedding"], before["embedding"])
    np.testing.assert_array_equal(after["layers"]["mlp"]["up"], before["layers"]["mlp"]["up"])


@pytest.mark.parametrize(
    "name, value, dtype",
    [
        ("model.layers.1.mlp.up_proj.weight", np.nan, np.float32),
        ("model.norm.weight", -np.inf, np.float32),
        ("lm_head.weight", 1e300, np.float64),  # float32 has no such number
    ],
)
def test_values_that_are_not_finite_are_refused_by_name(folder, name, value, dtype):
    def change(tensors):
        tensors[name] = tensors[name].astype(dtype)
        tensors[name].flat[-1] = value

    set_tensors(folder, change)
    model = open_pretrained(folder)
    with pytest.raises(UserError, match=f"{name} holds values that are not finite in float32"):
        model.parameters()


def test_numbers_that_stand_for_weights_are_refused(folder):
    name = "model.layers.1.mlp.up_proj.weight"
    set_tensors(folder, lambda tensors: tensors.update({name: tensors[name].astype(np.int8)}))
    with pytest.raises(UserError, match=f"{name} is stored as I8"):
        open_pretrained(folder)


def split(folder, index=True):
    """Parts the weights in two files, as transformers does."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {1: names[: len(names) // 2], 2: names[len(names) // 2 :]}
    files = {number: f"model-0000{number}-of-00002.safetensors" for number in parts}
    for number, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / files[number])
    if index:
        of = {name: files[number] for number, part in parts.items() for name in part}
        content = json.dumps({"metadata": {}, "weight_map": of})
        (folder / "model.safetensors.index.json").write_text(content)
    return files


def test_parts_of_several_files_need_each_other(folder):
    before = open_pretrained(folder).parameters()["embedding"]
    files = split(folder)
    np.testing.assert_array_equal(open_pretrained(folder).parameters()["embedding"], before)
    with pytest.raises(UserError, match=r"00001-of-00002.safetensors is a part .* give its folder"):
        open_pretrained(folder / files[1])
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    (folder / files[2]).rename(folder / "away")
    with pytest.raises(UserError, match="lacks model-00002-of-00002.safetensors"):
        open_pretrained(folder)
    content["weight_map"] = {k: v for k, v in content["weight_map"].items() if v == files[1]}
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match="missing: model.layers.2"):
        open_pretrained(folder)
    index.write_text("{}")
    with pytest.raises(UserError, match="does not say where which tensor is"):
        open_pretrained(folder)
    index.unlink()
    with pytest.raises(UserError, match=r"has model-00001-of-00002.safetensors, .* download it"):
        open_pretrained(folder)


def test_a_tensor_in_two_parts_is_refused(folder):
    files = split(folder)
    tensors = load_file(folder / files[2]) | {"lm_head.weight": np.zeros((296, 32), np.float32)}
    save_file(tensors, folder / files[2])
    with pytest.raises(UserError, match=r"lm_head.weight is in .*00001.* and in .*00002"):
        open_pretrained(folder)


def test_one_file_counts_before_an_index(folder):
    """As in transformers."""
    whole = (folder / "model.safetensors").read_bytes()
    files = split(folder)
    set_first = load_file(folder / files[1])
    save_file({name: value + 1 for name, value in set_first.items()}, folder / files[1])
    (folder / "model.safetensors").write_bytes(whole)
    head = np.asarray(open_pretrained(folder).parameters()["head"]).T
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    np.testing.assert_array_equal(theirs.lm_head.weight.detach().numpy(), head)


def test_an_adapter_beside_the_weights_is_refused(folder):
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="adapter_config.json"):
        open_pretrained(folder)


# A tokenizer larger than the embedding


@pytest.fixture
def larger(folder, tokenizer_file):
    """The Llama of 296 rows, with a tokenizer of 297 tokens or more, the last to pad with."""
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.add_tokens([f"<more {number}>" for number in range(6)])
    tokenizer.add_special_tokens(["<pad>"])
    assert tokenizer.token_to_id("<pad>") == 296
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_a_token_beyond_the_embedding_has_rows_that_draw_nothing(larger, tmp_path, caplog):
    model = open_pretrained(larger)
    assert "has 297 tokens, and the embedding 296 rows" in caplog.text
    assert (model.config.vocab_size, model.config.vocab_rows) == (296, 320)
    parameters = model.parameters()
    assert parameters["embedding"].shape == (320, 32) and parameters["head"].shape == (32, 320)
    assert not np.any(parameters["embedding"][296:]) and not np.any(parameters["head"][:, 296:])

    loaded = layerskip_jax.load(larger, dtype="float32")
    rows = [loaded.encode("the cat")] * 64
    drawn = loaded.generator.generate(rows, 4, temperature=50.0).tokens
    assert max(map(max, drawn)) < 296
    with pytest.raises(ValueError, match=r"prompt 0 holds a token outside 0\.\.295"):
        loaded.generate("<pad>", max_new_tokens=2, special_tokens=True)


def test_a_model_with_a_larger_tokenizer_is_imported_and_exported_as_it_was(
    larger, tmp_path_factory
):
    out = tmp_path_factory.mktemp("larger")
    import_model(larger, out / "run", dtype="float32")
    export(out / "run", out / "back")
    before, after = (load_file(path / "model.safetensors") for path in (larger, out / "back"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor, err_msg=name)
    assert json.loads((out / "back" / "config.json").read_text())["vocab_size"] == 296
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "back")
    assert tokenizer.convert_tokens_to_ids("<pad>") == 296


def test_data_is_refused_only_if_a_window_holds_the_token_beyond():
    none = Split(documents=0, bytes=0, tokens=0, windows=0, shards=())
    manifest = Manifest(
        format=1, request=PrepareOptions(), sequence_length=8, vocab_size=297,
        tokenizer_sha256="", end_token=END, end_token_id=0, train=none, validation=none,
        skipped_files=0, unigram_entropy_nats=0.0, fingerprint="", largest_token=289,
    )  # fmt: skip
    manifest.check_tokens(296, "data")
    for largest in (296, -1):  # or where it was not counted
        manifest = dataclasses.replace(manifest, largest_token=largest)
        with pytest.raises(UserError, match="data holds the token 296, and the model has 296"):
            manifest.check_tokens(296, "data")


def test_an_end_token_beyond_the_embedding_is_refused(larger):
    set_config(larger, eos_token_id=296)
    with pytest.raises(UserError, match="the end token '<pad>' has id 296"):
        open_pretrained(larger)


def test_ids_of_no_token_are_none(larger):
    """Some configs say -1 for none, and an id without a row is never drawn."""
    set_config(larger, bos_token_id=-1, pad_token_id=-1, eos_token_id=[0, 296])
    (larger / "chat_template.jinja").write_text("{{ bos_token }}|{{ messages[0].content }}")
    loaded = layerskip_jax.load(larger, dtype="float32")
    assert (loaded.end_token, loaded.more_end_tokens) == (0, ())
    assert loaded.chat.render([{"role": "user", "content": "the"}]) == "|the"


def test_a_beginning_that_is_said_twice_is_warned_of(folder, caplog):
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    open_pretrained(folder)
    assert "says add_bos_token=True" in caplog.text
    assert "tokenizer.json does not begin a text" in caplog.text


def test_nothing_is_warned_of_without_a_cause(llama, caplog):
    with caplog.at_level(logging.WARNING):
        open_pretrained(llama)
    assert not caplog.records

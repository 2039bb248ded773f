"""The name map and the configuration, without transformers."""

import collections
import dataclasses
import json

import jax
import numpy as np
import pytest

from layerskip_jax.distributed.mesh import MeshShape, make_mesh
from layerskip_jax.distributed.sharding import ShardingRules, parameter_shardings
from layerskip_jax.interop.huggingface import (
    WEIGHTS,
    check_tensors,
    from_hugging_face,
    from_hugging_face_config,
    tensor_shapes,
    to_hugging_face,
    to_hugging_face_config,
)
from layerskip_jax.model.config import ModelConfig, RopeScaling
from layerskip_jax.schema import UserError
from tests.interop.helpers import CONFIG, random_parameters


def test_projections_worked_by_hand():
    config = ModelConfig(
        vocab_size=2, num_layers=1, model_dim=2, ffn_dim=1, num_heads=1, num_kv_heads=1
    )
    _, parameters = random_parameters(config)
    attention = parameters["layers"]["attention"]
    attention["q"] = np.array([[[[1.0, 2.0]], [[3.0, 4.0]]]])  # [L=1, D=2, H=1, h=2]
    attention["o"] = np.array([[[[5.0, 6.0], [7.0, 8.0]]]])  # [L=1, H=1, h=2, D=2]
    tensors = dict(to_hugging_face(parameters, config))
    q, o = (tensors[f"model.layers.0.self_attn.{x}_proj.weight"] for x in "qo")
    np.testing.assert_array_equal(q, [[1, 3], [2, 4]])
    np.testing.assert_array_equal(o, [[5, 7], [6, 8]])


ONE_DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


@pytest.mark.parametrize(
    "shape",
    [
        None,
        MeshShape(data=8),
        MeshShape(fsdp=4, tensor=2),
        MeshShape(data=2, fsdp=2, tensor=2),
    ],
)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True},
        {"qkv_bias": True},
        {"qk_norm": "head"},
        {"qk_norm": "all", "norm_position": "after"},
    ],
    ids=str,
)
def test_there_and_back_is_bit_equal(changes, shape):
    """On one device and on meshes, where each device reads its own part."""
    config = dataclasses.replace(CONFIG, head_dim=6, **changes)
    definition, parameters = random_parameters(config)
    tensors = dict(to_hugging_face(parameters, config))
    assert {name: tensor.shape for name, tensor in tensors.items()} == tensor_shapes(config)
    assert ("lm_head.weight" in tensors) is not config.tie_embeddings
    assert ("model.layers.0.self_attn.q_proj.bias" in tensors) is config.qkv_bias
    shardings, read = ONE_DEVICE, collections.defaultdict(set)
    if shape is not None:
        shardings = parameter_shardings(
            definition.shapes, definition.logical_axes, make_mesh(shape), ShardingRules()
        )

    def part(name, index):
        read[name].add(tensors[name][index].size)
        return tensors[name][index]

    back = from_hugging_face(part, config, shardings)
    assert jax.tree.structure(back) == jax.tree.structure(definition.shapes)
    jax.tree.map(np.testing.assert_array_equal, back, parameters)
    check_tensors({name: tensor.shape for name, tensor in tensors.items()}, config, "here")
    if shape is not None:  # each device its own part
        up = "model.layers.0.mlp.up_proj.weight"
        assert read[up] == {tensors[up].size // shape.fsdp // shape.tensor}


def test_a_part_that_splits_heads_is_cut_after_reading():
    config = dataclasses.replace(CONFIG, head_dim=6)
    _, parameters = random_parameters(config)
    tensors = dict(to_hugging_face(parameters, config))
    for name, path in (("q", "D H h"), ("o", "H h D")):
        ours = parameters["layers"]["attention"][name][1]
        index = tuple(
            {"D": slice(8, 16), "H": slice(1, 3), "h": slice(3, 6)}[d] for d in path.split()
        )
        weight = next(w for w in WEIGHTS if w.path == f"layers.attention.{name}")
        tensor = tensors[weight.name.format(layer=1)]
        np.testing.assert_array_equal(weight.read(tensor.__getitem__, index, config), ours[index])


def test_every_parameter_is_written_once():
    definition, parameters = random_parameters(CONFIG)
    written = sum(tensor.size for _, tensor in to_hugging_face(parameters, CONFIG))
    assert written == definition.num_parameters


def test_every_wrong_tensor_is_listed():
    shapes = tensor_shapes(CONFIG)
    up = "model.layers.1.mlp.up_proj.weight"
    shapes[up] = (48, 31)
    del shapes["model.norm.weight"], shapes["lm_head.weight"]
    shapes["model.layers.0.self_attn.q_proj.bias"] = (32,)
    shapes["model.layers.0.self_attn.rotary_emb.inv_freq"] = (4,)  # follows from the rest
    with pytest.raises(UserError) as error:
        check_tensors(shapes, CONFIG, "there")
    assert str(error.value).splitlines()[1:] == [
        "  missing: model.norm.weight (32,)",
        "  missing: lm_head.weight (300, 32)",
        "  unknown: model.layers.0.self_attn.q_proj.bias (32,)",
        f"  shape: {up} is (48, 31), and the config makes it (48, 32)",
    ]


LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)


# By family of transformers, what makes a model of it. Some have layers of several kinds.
OF_FAMILIES = [
    ("llama", {}),
    ("llama", {"tie_embeddings": True}),
    ("mistral", {"sliding_window": 9}),
    ("qwen2", {"qkv_bias": True}),
    ("qwen2", {"qkv_bias": True, "sliding_window": 9, "full_attention_every": 2}),
    ("qwen3", {"qk_norm": "head"}),
    ("qwen3", {"qk_norm": "head", "sliding_window": 9}),
    ("smollm3", {"no_rope_every": 2, "tie_embeddings": True}),
    ("smollm3", {"no_rope_every": 1}),
    ("smollm3", {"sliding_window": 9, "full_attention_every": 3}),
    ("olmo2", {"qk_norm": "all", "norm_position": "after"}),
]


@pytest.mark.parametrize("scaling", [RopeScaling(), RopeScaling("linear", 4.0), LLAMA3])
@pytest.mark.parametrize("family, changes", OF_FAMILIES, ids=str)
def test_the_config_goes_there_and_back(family, changes, scaling):
    config = dataclasses.replace(CONFIG, rope_scaling=scaling, dtype="bfloat16", **changes)
    settings = to_hugging_face_config(config, eos_token_id=0)
    assert settings["model_type"] == family
    assert from_hugging_face_config(settings, "here") == config
    # as transformers 4 wrote it
    without = {"rope_parameters", "dtype"} | ({"head_dim"} if family != "qwen3" else set())
    old = {k: v for k, v in settings.items() if k not in without}
    if old.get("rope_scaling"):
        old["rope_scaling"] = {
            "type" if k == "rope_type" else k: v for k, v in old["rope_scaling"].items()
        }
    assert from_hugging_face_config(old, "here") == config


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "gpt2"}, "model_type='gpt2' is none of llama, mistral, qwen2, qwen3, smol"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope scaling 'yarn' is none of"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "'llama3' lacks factor, high_freq_factor"),
        ({"sliding_window": 4096}, "sliding_window=4096 limits what a token sees"),
        ({"attention_bias": True}, "attention_bias=true puts biases"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not 'silu'"),
        ({"hidden_size": None}, "hidden_size=None is no integer"),
        ({"num_key_value_heads": 3}, "num_kv_heads=3 must divide num_heads=4"),
    ],
)
def test_a_config_of_another_model_is_refused(changes, message):
    settings = to_hugging_face_config(CONFIG, eos_token_id=0) | changes
    with pytest.raises(UserError, match=message):
        from_hugging_face_config(settings, "config.json")


def test_a_sliding_window_that_is_not_used_is_ignored():
    config = dataclasses.replace(CONFIG, qkv_bias=True, dtype="bfloat16")
    settings = to_hugging_face_config(config, eos_token_id=0) | {"sliding_window": 4096}
    assert from_hugging_face_config(settings, "here") == config


def test_config_states_what_either_transformers_reads():
    config = to_hugging_face_config(CONFIG, eos_token_id=0, dtype="bfloat16")
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5000.0
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert config["head_dim"] == 8 and config["num_key_value_heads"] == 2
    json.dumps(config)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"qk_norm": "all"}, "qk_norm='all'"),
        ({"qk_norm": "head", "no_rope_every": 4}, "qk_norm='head', no_rope_every=4"),
        (
            {"norm_position": "after", "qk_norm": "all", "sliding_window": 8},
            "qk_norm='all', norm_position='after', sliding_window=8",
        ),
    ],
)
def test_a_model_of_no_family_is_not_exported(changes, said):
    config = dataclasses.replace(CONFIG, **changes)
    with pytest.raises(UserError, match=f"no family of transformers .* has {said} together"):
        to_hugging_face_config(config, eos_token_id=0)


def test_a_shape_that_llama_refuses_is_an_error():
    config = dataclasses.replace(CONFIG, model_dim=34, head_dim=8)
    with pytest.raises(UserError, match=r"width \(34\).*heads \(4\)"):
        to_hugging_face_config(config, eos_token_id=0)

"""The name map and the configuration, without transformers."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from layerskip_jax.interop.huggingface import (
    from_hugging_face,
    llama_config,
    tensor_shapes,
    to_hugging_face,
)
from layerskip_jax.model.config import ModelConfig
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


@pytest.mark.parametrize("tied", [False, True])
def test_there_and_back_is_bit_equal(tied):
    config = dataclasses.replace(CONFIG, tie_embeddings=tied, head_dim=6)
    definition, parameters = random_parameters(config)
    tensors = dict(to_hugging_face(parameters, config))
    assert {name: tensor.shape for name, tensor in tensors.items()} == tensor_shapes(config)
    assert ("lm_head.weight" in tensors) is not tied
    back = from_hugging_face(tensors.__getitem__, config)
    assert jax.tree.structure(back) == jax.tree.structure(definition.shapes)
    jax.tree.map(np.testing.assert_array_equal, back, parameters)


def test_every_parameter_is_written_once():
    definition, parameters = random_parameters(CONFIG)
    written = sum(tensor.size for _, tensor in to_hugging_face(parameters, CONFIG))
    assert written == definition.num_parameters


def test_a_tensor_of_another_shape_is_named():
    _, parameters = random_parameters(CONFIG)
    tensors = dict(to_hugging_face(parameters, CONFIG))
    tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((48, 31))
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj.*\(48, 31\).*\(48, 32\)"):
        from_hugging_face(tensors.__getitem__, CONFIG)


def test_config_states_what_either_transformers_reads():
    config = llama_config(CONFIG, eos_token_id=0, dtype="bfloat16")
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5000.0
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert config["head_dim"] == 8 and config["num_key_value_heads"] == 2
    json.dumps(config)


def test_a_shape_that_llama_refuses_is_an_error():
    config = dataclasses.replace(CONFIG, model_dim=34, head_dim=8)
    with pytest.raises(UserError, match=r"width \(34\).*heads \(4\)"):
        llama_config(config, eos_token_id=0)

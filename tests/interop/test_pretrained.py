"""Published models in and out again: real transformers folders, and GGUF files."""

import dataclasses
import json
import os

import gguf
import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from tokenizers import Tokenizer
from tokenizers.normalizers import NFKC, Lowercase
from tokenizers.processors import TemplateProcessing

import layerskip_jax
from layerskip_jax.cli import main
from layerskip_jax.commands.export import export
from layerskip_jax.commands.import_model import import_model
from layerskip_jax.config import RunConfig
from layerskip_jax.data.text import begin_tokens
from layerskip_jax.distributed.mesh import MeshShape, make_mesh
from layerskip_jax.distributed.sharding import ShardingRules, parameter_shardings
from layerskip_jax.interop.pretrained import open_pretrained
from layerskip_jax.interop.verify import compare_texts, longest_window
from layerskip_jax.model.config import RopeScaling
from layerskip_jax.model.definition import ModelDefinition
from layerskip_jax.run_folder.paths import RunFolder
from layerskip_jax.schema import UserError
from layerskip_jax.training.checkpoint import Checkpoints
from layerskip_jax.training.restore import load_run
from tests.interop.helpers import (
    CONFIG,
    END,
    FAMILIES,
    published,
    random_parameters,
    write_gguf,
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory, tokenizer_file):
    return published(tmp_path_factory.mktemp("llama"), tokenizer_file, "llama 3.1")


def tensors_of(folder):
    """Returns the tensors as bits."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="np") as shard:
            for name in shard.keys():
                value = shard.get_tensor(name)
                tensors[name] = value.view(np.uint16 if value.itemsize == 2 else np.uint32)
    return tensors


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_import_and_export_give_the_very_tensors(family, tmp_path, tokenizer_file, capsys):
    """And the model in between computes what transformers computes, layer by layer."""
    save = {"max_shard_size": "20KB"} if family == "llama 2" else {}
    source = published(tmp_path / "there", tokenizer_file, family, **save)
    if family == "llama 2":
        assert len(list(source.glob("*.safetensors"))) > 1
    assert main(["verify", str(source), "--tokens=48", "--new-tokens=8"]) == 0
    assert "every exit and 8 greedy tokens agree" in capsys.readouterr().out
    generator = layerskip_jax.load(source).generator
    plain = generator.generate([[5, 9, 11]], 20).tokens
    drafts = {"mode": "self_speculative", "exit_layer": 1, "draft_length": 3}
    assert generator.generate([[5, 9, 11]], 20, **drafts).tokens == plain

    assert main(["import", f"--source={source}", f"--workdir={tmp_path / 'run'}"]) == 0
    export(tmp_path / "run", tmp_path / "back", dtype="bfloat16")
    before, after = tensors_of(source), tensors_of(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor, err_msg=name)
    again = open_pretrained(tmp_path / "back")
    assert again.config == open_pretrained(source).config
    assert (again.end_token, again.end_token_id) == (END, 0)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    original = transformers.AutoModelForCausalLM.from_pretrained(source)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, original(ids).logits)


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape_in, shape_out",
    [(MeshShape(1, 8, 1), MeshShape(2, 2, 2)), (MeshShape(2, 1, 4), MeshShape(1, 4, 2))],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama 3.2", "mistral", "qwen2"])
def test_any_mesh_reads_and_any_mesh_writes(family, shape_in, shape_out, tmp_path, tokenizer_file):
    """Read onto one mesh and saved, restored onto another and saved, exported: the very bits.

    The vocabulary is padded from 290 to 320 rows, so that eight devices can share it.
    """
    source = published(tmp_path / "there", tokenizer_file, family, vocab_size=290)
    pretrained = open_pretrained(source)
    model = dataclasses.replace(pretrained.config, pad_vocab_to_multiple_of=64, num_kv_heads=2)
    config = RunConfig(model=model)
    rules = dataclasses.replace(ShardingRules(), vocab=("fsdp", "tensor"), kv_heads=(), embed=())
    definition = ModelDefinition(model)

    def shardings(shape):
        mesh = make_mesh(shape)
        return parameter_shardings(definition.shapes, definition.logical_axes, mesh, rules)

    parameters = pretrained.parameters(shardings(shape_in), model)
    assert parameters["embedding"].shape == (320, 32)
    rows = 320 // (shape_in.fsdp * shape_in.tensor)
    assert parameters["embedding"].addressable_shards[0].data.shape == (rows, 32)
    folder = RunFolder(tmp_path / "run")
    checkpoints = Checkpoints(folder.checkpoints, keep=2)
    checkpoints.save(1, parameters, None)
    checkpoints.close()
    template = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        definition.shapes,
        shardings(shape_out),
    )
    checkpoints = Checkpoints(folder.checkpoints, keep=2)
    checkpoints.save(2, checkpoints.restore_parameters(1, template), None)
    checkpoints.close()
    folder.config_file.write_text(json.dumps(config.to_dict()))
    folder.data_file.write_text(json.dumps({"end_token": END, "end_token_id": 0}))
    folder.tokenizer_file.write_bytes(tokenizer_file.read_bytes())
    for step in (1, 2):
        export(folder.path, tmp_path / str(step), step=step, dtype="bfloat16")
        before, after = tensors_of(source), tensors_of(tmp_path / str(step))
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            np.testing.assert_array_equal(after[name], tensor, err_msg=name)


def test_what_is_published_beside_the_weights_is_exported_again(tmp_path, tokenizer_file):
    """Ids, generation settings, the tokenizer's own files, and with them the chat template."""
    source = published(tmp_path / "there", tokenizer_file, "llama 2")
    settings = json.loads((source / "config.json").read_text())
    settings |= {"bos_token_id": 5, "eos_token_id": [0, 7]}
    (source / "config.json").write_text(json.dumps(settings))
    generation = {"eos_token_id": [0, 9], "temperature": 0.6, "do_sample": True, "pad_token_id": 3}
    (source / "generation_config.json").write_text(json.dumps(generation))
    tokenizer_settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": "!",
        "chat_template": "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}",
    }  # fmt: skip
    (source / "tokenizer_config.json").write_text(json.dumps(tokenizer_settings))
    (source / "tokenizer.model").write_bytes(b"pieces")
    import_model(source, tmp_path / "run")
    assert layerskip_jax.load(tmp_path / "run").more_end_tokens == (7, 9)
    for _ in range(2):  # an export is overwritten, whatever files it carries
        export(tmp_path / "run", tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"pieces"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "the cat"}], tokenize=False)
    assert (chat, tokenizer.pad_token) == ("[user]the cat", "!")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (model.config.bos_token_id, model.config.eos_token_id) == (5, [0, 7, 9])
    found = model.generation_config
    assert (found.temperature, found.pad_token_id, found.eos_token_id) == (0.6, 3, [0, 7, 9])


def test_the_first_layers_are_a_model_of_their_own(llama, tmp_path):
    """For servers that know nothing of exits: the logits are those of the exit."""
    import_model(llama, tmp_path / "run", dtype="float32")
    export(tmp_path / "run", tmp_path / "out", exit_layer=2)
    ids = torch.arange(40)[None]
    short, whole = (
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in (tmp_path / "out", llama)
    )
    with torch.no_grad():
        states = whole(ids, output_hidden_states=True).hidden_states[2]
        expected = whole.lm_head(whole.model.norm(states))
        np.testing.assert_allclose(short(ids).logits, expected, atol=1e-4)
    assert "its first 2 layers of 3" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(UserError, match=r"--exit=4 must be in 1\.\.3"):
        export(tmp_path / "run", tmp_path / "other", exit_layer=4)


def test_verify_names_the_first_layer_that_differs(llama, monkeypatch, capsys):
    from layerskip_jax.commands import verify

    load = verify.load_transformers

    def altered(folder):
        model = load(folder)
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight *= 1.01
        return model

    monkeypatch.setattr(verify, "load_transformers", altered)
    assert main(["verify", str(llama), "--tokens=32", "--new-tokens=4"]) == 1
    assert "the outputs differ from layer 2 on" in capsys.readouterr().out


def test_verify_names_the_texts_that_autotokenizer_splits_otherwise(
    llama, tmp_path, capsys, monkeypatch
):
    """By a class that makes its own of the vocabulary, whatever else the tokenizer.json says."""
    folder = _copy(llama, tmp_path)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.normalizer = Lowercase()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    figures = tmp_path / "figures.json"
    monkeypatch.setattr("layerskip_jax.interop.verify._MOST_POSITIONS", 7)
    arguments = [str(folder), "--new-tokens=4", f"--json={figures}"]
    assert main(["verify", *arguments]) == 1
    printed = capsys.readouterr().out
    assert "'The cat sat on the mat.' is [" in printed
    found = json.loads(figures.read_text())
    assert found["tokens"] == 64  # the context
    assert found["first_layer_that_differs"] is None and found["same_greedy_tokens"]
    assert found["texts_that_differ"][0]["ours"] != found["texts_that_differ"][0]["theirs"]


def test_verify_compares_special_tokens_and_what_a_text_begins_with(tmp_path, tokenizer_file):
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.post_processor = TemplateProcessing(
        single=f"{END} $A {END}", special_tokens=[(END, 0)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert compare_texts(tokenizer, tmp_path) == []
    other = Tokenizer.from_file(str(tokenizer_file))
    [found] = compare_texts(other, tmp_path)
    assert (found.text, found.theirs[0]) == ("a", 0)
    other.add_special_tokens(["<|turn|>"])
    texts = [found.text for found in compare_texts(other, tmp_path)]
    assert texts == ["one <|turn|>two<|turn|> <|turn|>\n", "a"]
    settings["added_tokens_decoder"] = {"290": {"content": "<|image|>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    [found] = compare_texts(tokenizer, tmp_path)
    assert found.theirs.count(290) == 3
    other.normalizer = NFKC()
    assert any("\ufb01" in found.text for found in compare_texts(other, tmp_path))


def test_the_longest_window_is_the_context_or_what_fits():
    assert longest_window(CONFIG) == 64
    assert longest_window(dataclasses.replace(CONFIG, max_sequence_length=2**20)) == 5792
    heads = {"num_heads": 32, "num_kv_heads": 2, "model_dim": 64}
    assert longest_window(dataclasses.replace(CONFIG, max_sequence_length=8192, **heads)) == 2048


def test_a_folder_of_transformers_4_reads_alike(llama, tmp_path):
    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((llama / "config.json").read_text())
    rope = settings.pop("rope_parameters")
    settings |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    settings["torch_dtype"] = settings.pop("dtype")
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert open_pretrained(tmp_path).config == open_pretrained(llama).config


def _copy(llama, folder):
    for file in llama.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def _cut(folder):
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)


def _set(**changes):
    def change(folder):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def _index(folder):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _rename(name, to):
    return lambda folder: (folder / name).rename(folder / to)


def _without(name):
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    "damage, message",
    [
        (_cut, r"model.safetensors is damaged or cut short .* download it again"),
        (_index, "lacks model-00001-of-00002.safetensors; download it again"),
        (_without("model.safetensors"), "lacks model.safetensors"),
        (
            _rename("model.safetensors", "pytorch_model.bin"),
            "has its weights in pytorch_model.bin",
        ),
        (_rename("tokenizer.json", "tokenizer.model"), "in tokenizer.model only"),
        (_without("config.json"), "config.json cannot be read"),
        (_without("tokenizer.json"), "there is no such tokenizer.json"),
        (_set(intermediate_size=50), r"up_proj.weight is \(48, 32\), and the config makes it \(50"),
        (_set(num_hidden_layers=4), r"missing: model.layers.3.input_layernorm.weight \(32,\)"),
        (_set(num_hidden_layers=2), r"unknown: model.layers.2.input_layernorm.weight \(32,\)"),
        (_set(model_type="gpt2"), "model_type='gpt2' is none of llama, mistral, qwen2"),
        (_set(eos_token_id=400), "eos_token_id=400 is none of the tokenizer's tokens"),
    ],
)
def test_bad_folders_are_refused_before_anything_is_written(llama, tmp_path, damage, message):
    damage(_copy(llama, tmp_path))
    (tmp_path / "generation_config.json").unlink()
    with pytest.raises(UserError, match=message):
        import_model(tmp_path, tmp_path.parent / "never")
    assert not (tmp_path.parent / "never").exists()


def test_an_import_takes_no_folder_in_use(llama, tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(UserError, match="is not empty; take a new folder"):
        import_model(llama, tmp_path)
    assert (tmp_path / "mine").read_text() == "x"


# GGUF


@pytest.mark.parametrize("tied, biases", [(False, False), (True, False), (True, True)])
def test_a_gguf_file_holds_the_same_model(tmp_path, tokenizer_file, tied, biases):
    config = dataclasses.replace(
        CONFIG, tie_embeddings=tied, qkv_bias=biases, dtype="bfloat16", norm_eps=1e-6
    )
    _, parameters = random_parameters(config)
    write_gguf(tmp_path / "m.gguf", config, parameters, tokenizer_file)
    model = open_pretrained(tmp_path / "m.gguf")
    assert model.config == config
    jax.tree.map(np.testing.assert_array_equal, model.parameters(), parameters)
    text = "the lazy dog, 17 times"
    expected = Tokenizer.from_file(str(tokenizer_file)).encode(text).ids
    assert model.tokenizer.encode(text).ids == expected
    assert model.end_token == END


def test_a_gguf_file_of_llama_3_1_begins_its_texts_and_scales_its_frequencies(
    tmp_path, tokenizer_file
):
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    config = dataclasses.replace(
        CONFIG, head_dim=64, rope_theta=5e5, norm_eps=1e-6, dtype="bfloat16"
    )
    _, parameters = random_parameters(config)
    turns = 8192 * 5e5 ** -(np.arange(0, 64, 2) / 64) / (2 * np.pi)
    kept = np.clip((turns - 1) / 3, 0, 1)
    factors = (1 / (kept + (1 - kept) / 8)).astype(np.float32)

    def extend(writer):
        writer.add_key_length(64)
        writer.add_bos_token_id(1)
        writer.add_add_bos_token(True)
        writer.add_eot_token_id(2)
        writer.add_chat_template("{{ messages }}")
        writer.add_tensor("rope_freqs.weight", factors)

    write_gguf(tmp_path / "m.gguf", config, parameters, tokenizer_file, extend=extend)
    model = open_pretrained(tmp_path / "m.gguf")
    assert model.config == dataclasses.replace(config, rope_scaling=scaling)
    assert begin_tokens(model.tokenizer) == [1]
    import_model(tmp_path / "m.gguf", tmp_path / "run")
    export(tmp_path / "run", tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("the cat")["input_ids"] == model.tokenizer.encode("the cat").ids
    assert tokenizer("the cat")["input_ids"][0] == tokenizer.bos_token_id == 1
    assert tokenizer.chat_template == "{{ messages }}"
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (settings["bos_token_id"], settings["eos_token_id"]) == (1, [0, 2])

    factors[-1] += 1
    write_gguf(tmp_path / "m.gguf", config, parameters, tokenizer_file, extend=extend)
    with pytest.raises(UserError, match="factors in rope_freqs.weight are not those of Llama 3.1"):
        open_pretrained(tmp_path / "m.gguf")


def test_a_quantized_gguf_file_is_read_as_its_own_library_reads_it(tmp_path, tokenizer_file):
    config = dataclasses.replace(CONFIG, ffn_dim=64)  # in blocks of 32
    _, parameters = random_parameters(config)
    kind = gguf.GGMLQuantizationType.Q8_0
    write_gguf(tmp_path / "m.gguf", config, parameters, tokenizer_file, kind)
    found = open_pretrained(tmp_path / "m.gguf").parameters()
    assert not np.array_equal(found["embedding"], parameters["embedding"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=0.01), found, parameters)
    again = gguf.dequantize(gguf.quantize(np.asarray(parameters["embedding"]), kind), kind)
    np.testing.assert_array_equal(found["embedding"], again)


def test_an_imported_run_serves_the_other_verbs(llama, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["import", f"--source={llama}", f"--workdir={run}", "--dtype=float32"]) == 0
    assert load_run(run).step == 0
    command = ["generate", f"--workdir={run}", "--prompt=the cat", "--max-new-tokens=8"]
    capsys.readouterr()
    assert main([*command, "--draft=1,2"]) == 0
    assert capsys.readouterr().out.startswith("the cat")
    assert main(["evaluate", f"--workdir={run}"]) == 2
    assert "--data" in capsys.readouterr().err


def test_damaged_gguf_files_are_refused(tmp_path, tokenizer_file):
    _, parameters = random_parameters(CONFIG)
    file = tmp_path / "m.gguf"
    write_gguf(file, CONFIG, parameters, tokenizer_file)
    whole = file.read_bytes()
    for size in (0, 10, 4000, len(whole) - 500):
        file.write_bytes(whole[:size])
        with pytest.raises(UserError, match="is damaged or no GGUF file"):
            open_pretrained(file)
    with pytest.raises(UserError, match="there is no such file"):
        open_pretrained(tmp_path / "other.gguf")
    with pytest.raises(UserError, match="is no folder and no .gguf file"):
        open_pretrained(tmp_path / "m.bin")

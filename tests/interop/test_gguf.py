"""What a GGUF file says beside its tensors: vocabularies, parts of several, contradictions."""

import dataclasses
import json

import gguf
import jax
import numpy as np
import pytest
from tokenizers import Tokenizer

from layerskip_jax.data.text import begin_tokens, encode_prompt
from layerskip_jax.interop.gguf import GGUF
from layerskip_jax.interop.pretrained import open_pretrained
from layerskip_jax.interop.verify import compare_texts
from layerskip_jax.schema import UserError
from tests.interop.helpers import CONFIG, random_parameters, write_gguf

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "\u2581"
# SentencePiece's order: what is special, the bytes, the merged pieces, the characters.
PIECES = [
    ("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL),
    *((f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)),
    *((piece, -float(rank), NORMAL) for rank, piece in enumerate(
        [SPACE + "t", "he", SPACE + "the", SPACE + SPACE, "ca", SPACE + "ca", "cat", SPACE + "cat",
         "s>"])),
    *((letter, -100.0 - rank, NORMAL) for rank, letter in enumerate(SPACE + "theca</s>\u00e9x")),
    ("<|turn|>", 0.0, USER_DEFINED), ("[PAD]", 0.0, UNUSED),
]  # fmt: skip
PIECES = list({piece[0]: piece for piece in PIECES}.values())
IDS = {piece: number for number, (piece, _, _) in enumerate(PIECES)}


def sentencepiece(path, *extra, tokens=PIECES, arch="llama", without=()):
    """Writes a file of a vocabulary and of no tensors, all that `GGUF` needs to be opened."""
    writer = gguf.GGUFWriter(path, arch)
    of_model = {
        "block_count": 3, "context_length": 64, "embedding_length": 32, "feed_forward_length": 48,
        "head_count": 4, "layer_norm_rms_eps": 1e-6,
    }  # fmt: skip
    for name, value in of_model.items():
        if name not in without:
            getattr(writer, f"add_{name}")(value)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([token for token, _, _ in tokens])
    writer.add_token_scores([score for _, score, _ in tokens])
    writer.add_token_types([kind for _, _, kind in tokens])
    for name, *values in extra:
        getattr(writer, f"add_{name}")(*values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pieces(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).tokens


@pytest.mark.parametrize(
    "text, expected",
    [
        ("the cat", [SPACE + "the", SPACE + "cat"]),
        ("  the", [SPACE + SPACE, SPACE + "the"]),  # one space more than is written
        ("cat  cat", [SPACE + "cat", SPACE + SPACE, "cat"]),  # two spaces are merged before "ca"
        ("\u00e9t", [SPACE, "\u00e9", "t"]),
        ("t\n", [SPACE + "t", "<0x0A>"]),
        ("x\u4f60", [SPACE, "x", "<0xE4>", "<0xBD>", "<0xA0>"]),
        ("</s>", [SPACE, "<", "/", "s>"]),  # spelled out it is text, though it could be merged
        ("the<|turn|>cat", [SPACE + "the", "<|turn|>", SPACE + "cat"]),
        ("", []),
    ],
)
def test_sentencepiece_is_built_from_scores(text, expected, tmp_path):
    tokenizer = GGUF(sentencepiece(tmp_path / "m.gguf")).tokenizer()
    assert pieces(tokenizer, text) == expected
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == [IDS[piece] for piece in expected]
    if "turn" not in text:  # after which a space comes that is not there
        assert tokenizer.decode(ids) == text
    assert encode_prompt(tokenizer, text) == [IDS["<s>"], *ids]


def test_sentencepiece_agrees_with_transformers(tmp_path):
    """But for a text that begins with a space, which transformers 5 takes for one that does not."""
    transformers = pytest.importorskip("transformers")
    sentencepiece(tmp_path / "m.gguf", ("bos_token_id", 1), ("eos_token_id", 2))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    ours = GGUF(tmp_path / "m.gguf").tokenizer()
    for text in ("the cat", "cat  the", "x\u4f60\n\tcat", "caca\u00e9", "\U0001f642the"):
        assert theirs(text)["input_ids"] == ours.encode(text).ids


def test_transformers_reads_an_exported_sentencepiece_alike(tmp_path):
    """As the tokenizer.json that an import keeps and an export writes."""
    tokenizer = GGUF(sentencepiece(tmp_path / "m.gguf")).tokenizer()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert compare_texts(tokenizer, tmp_path) == []
    # The class of Llama in transformers 5 makes its own, and takes a space off a text.
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    texts = [found.text for found in compare_texts(tokenizer, tmp_path)]
    assert "  two  spaces   three, and at the end  " in texts


def test_a_text_begins_as_the_file_says(tmp_path):
    file = tmp_path / "m.gguf"
    tokenizer = GGUF(sentencepiece(file, ("add_bos_token", False))).tokenizer()
    assert begin_tokens(tokenizer) == []
    sentencepiece(file, ("add_space_prefix", False), ("bos_token_id", 2))
    tokenizer = GGUF(file).tokenizer()
    assert begin_tokens(tokenizer) == [2]
    assert pieces(tokenizer, "cat") == ["cat"] and pieces(tokenizer, " cat") == [SPACE + "cat"]
    ids = tokenizer.encode("  cat", add_special_tokens=False).ids
    assert tokenizer.decode(ids) == "  cat"


def test_a_special_token_is_read_where_it_is_asked_for(tmp_path):
    tokenizer = Tokenizer.from_str(GGUF(sentencepiece(tmp_path / "m.gguf")).tokenizer().to_str())
    tokenizer.encode_special_tokens = False
    assert pieces(tokenizer, "the</s>") == [SPACE + "the", "</s>"]
    assert tokenizer.decode([IDS[SPACE + "cat"], IDS["</s>"]]) == "cat"


@pytest.mark.parametrize(
    "extra, message",
    [
        ([("uint16", "split.count", 3), ("uint16", "split.no", 1)], "is part 2 of 3; join them"),
        ([("rope_dimension_count", 4)], "rope.dimension_count=4 is not the width of a head, 8"),
        ([("value_length", 4)], "attention.value_length=4 is not the width"),
        ([("rope_scaling_type", gguf.RopeScalingType.YARN)], "rope scaling 'yarn' is none of"),
        ([("head_count_kv", [4, 2, 4])], r"attention.head_count_kv=\[4, 2, 4\] differs from layer"),
        ([("head_count_kv", 3)], "num_kv_heads=3 must divide num_heads=4"),
    ],
)
def test_what_a_file_says_and_cannot_be_honoured_is_refused(extra, message, tmp_path):
    with pytest.raises(UserError, match=message):
        GGUF(sentencepiece(tmp_path / "m.gguf", *extra))


def test_what_a_file_leaves_out_or_says_for_every_layer(tmp_path):
    file = tmp_path / "m.gguf"
    config = GGUF(sentencepiece(file)).config
    assert (config.num_kv_heads, config.head_dim, config.rope_theta) == (4, 8, 10_000)
    assert config.rope_scaling.kind == "none"
    extra = [
        ("head_count_kv", [2, 2, 2]), ("rope_scaling_factor", 4.0), ("sliding_window", 64),
        ("rope_dimension_count", 8),
    ]  # fmt: skip
    config = GGUF(sentencepiece(file, *extra)).config
    assert config.num_kv_heads == 2
    assert (config.rope_scaling.kind, config.rope_scaling.factor) == ("linear", 4.0)
    with pytest.raises(UserError, match="lacks the field 'llama.context_length'"):
        GGUF(sentencepiece(file, without=("context_length",)))


def test_a_vocabulary_that_contradicts_itself_is_refused(tmp_path):
    file = GGUF(sentencepiece(tmp_path / "m.gguf", ("token_scores", [0.0])))
    with pytest.raises(UserError, match=f"says scores of 1 tokens and has {len(PIECES)}"):
        file.tokenizer()
    file = GGUF(sentencepiece(tmp_path / "m.gguf", ("tokenizer_model", "t5")))
    with pytest.raises(UserError, match=r"its tokenizer \('t5', 'default'\) cannot be rebuilt"):
        file.tokenizer()


def test_more_tokens_than_rows_are_rows_of_padding(tmp_path, tokenizer_file):
    """The vocabulary is as long as the embedding, whatever the list of tokens says."""
    config = dataclasses.replace(CONFIG, vocab_size=290, norm_eps=1e-6, dtype="bfloat16")
    _, parameters = random_parameters(config)
    longer = dataclasses.replace(config, vocab_size=300)
    write_gguf(tmp_path / "m.gguf", config, parameters, tokenizer_file, tokens=longer.vocab_size)
    model = open_pretrained(tmp_path / "m.gguf")
    assert model.config == dataclasses.replace(config, pad_vocab_to_multiple_of=320)
    assert model.parameters()["embedding"].shape == (320, 32)


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": 9},
        {"qk_norm": "head", "head_dim": 6},
        {"no_rope_every": 4, "tie_embeddings": True},
        {"qk_norm": "all", "norm_position": "after"},
    ],
    ids=["mistral", "qwen3", "smollm3", "olmo2"],
)
def test_each_family_is_read(changes, tmp_path, tokenizer_file):
    config = dataclasses.replace(CONFIG, num_layers=4, dtype="bfloat16", **changes)
    _, parameters = random_parameters(config)
    write_gguf(tmp_path / "model.gguf", config, parameters, tokenizer_file)
    found = open_pretrained(tmp_path / "model.gguf")
    assert found.config == config
    jax.tree.map(np.testing.assert_array_equal, found.parameters(), parameters)


def test_a_window_of_olmo_is_refused(tmp_path):
    """It is OLMo 3's, some of whose layers see all, which the file does not say."""
    path = sentencepiece(tmp_path / "m.gguf", ("sliding_window", 16), arch="olmo2")
    with pytest.raises(UserError, match=r"attention.sliding_window=16, which OLMo 3"):
        GGUF(path)

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip_jax.data.tokenizer import (
    END_TOKEN,
    end_token_of,
    file_sha256,
    load_tokenizer,
    train_tokenizer,
    vocabulary_size,
)
from layerskip_jax.schema import UserError

TEXTS = ["the cat sat on the mat; the dog sat on the cat\n"] * 4


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(iter(TEXTS), 270).save(str(path))
    return path


def test_training_fills_the_vocabulary_and_is_deterministic(file):
    tokenizer = load_tokenizer(file)
    assert vocabulary_size(tokenizer) == 270
    assert end_token_of(tokenizer, None) == (END_TOKEN, 0)
    again = file.with_name("again.json")
    train_tokenizer(iter(TEXTS), 270).save(str(again))
    assert file_sha256(file) == file_sha256(again)


def test_any_text_comes_back(file):
    tokenizer = load_tokenizer(file)

    @settings(deadline=None)
    @given(st.text())
    def round_trip(text):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert 0 not in ids

    round_trip()


def test_an_end_token_spelled_out_is_text(file):
    tokenizer = load_tokenizer(file)
    text = f"what {END_TOKEN} means"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert 0 not in ids
    assert tokenizer.decode(ids) == text


def test_a_tokenizer_that_truncates_and_pads_does_neither_here(file, tmp_path):
    tokenizer = load_tokenizer(file)
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "t.json"))
    text = "the cat sat on the mat, and more"
    assert (
        load_tokenizer(tmp_path / "t.json").encode(text).ids
        == load_tokenizer(file).encode(text).ids
    )


def test_ids_left_out_count_as_vocabulary(file, tmp_path):
    values = json.loads(file.read_text())
    values["added_tokens"].append({**values["added_tokens"][0], "id": 500, "content": "</s>"})
    (tmp_path / "t.json").write_text(json.dumps(values))
    tokenizer = load_tokenizer(tmp_path / "t.json")
    last = tokenizer.token_to_id("</s>")
    assert vocabulary_size(tokenizer) == last + 1


def test_messages(file, tmp_path):
    with pytest.raises(UserError, match="there is no such tokenizer.json"):
        load_tokenizer(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(UserError, match="is no tokenizer.json that can be read"):
        load_tokenizer(tmp_path / "bad.json")
    with pytest.raises(UserError, match="no end token <stop>; name one .* with --end-token"):
        end_token_of(load_tokenizer(file), "<stop>")

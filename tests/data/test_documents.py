import pytest

from layerskip_jax.data.batches import BatchSource
from layerskip_jax.data.documents import first_tokens
from layerskip_jax.data.manifest import read_manifest
from layerskip_jax.data.packing import Rows
from layerskip_jax.data.tokenizer import load_tokenizer
from layerskip_jax.schema import ConfigError


@pytest.mark.parametrize("split", ["train", "validation"])
def test_documents_come_out_of_the_windows_whole(prepared, corpus_folder, split):
    tokenizer, manifest = load_tokenizer(prepared / "tokenizer.json"), read_manifest(prepared)
    whole = {
        (*tokenizer.encode(file.read_text()).ids, manifest.end_token_id)
        for file in corpus_folder.rglob("*.txt")
    }
    texts = [tuple(text) for text in first_tokens(str(prepared), split, 10_000)]
    assert len(texts) == getattr(manifest, split).documents
    assert len(set(texts)) == len(texts) and set(texts) <= whole


def test_a_text_is_the_beginning_of_a_document_and_none_gives_two(prepared):
    whole = first_tokens(str(prepared), "train", 10_000)
    lengths = list(map(len, whole))
    assert max(lengths) > 40 > min(lengths)  # longer than windows of 16, and shorter than a text
    assert first_tokens(str(prepared), "train", 40) == [text[:40] for text in whole]
    # Stopping early gives the same texts, and no half of the last one.
    for count in range(1, len(whole) + 1):
        texts = first_tokens(str(prepared), "train", 40, count=count)
        assert texts == [text[:40] for text in whole[:count]]
    with pytest.raises(ConfigError, match="--tokens=1 must be at least 2"):
        first_tokens(str(prepared), "train", 1)


def test_a_document_ends_before_a_damaged_window(prepared, monkeypatch):
    whole = first_tokens(str(prepared), "train", 10_000)
    read = BatchSource.batch

    def batch(source, step):
        rows = read(source, step)
        return Rows(*(array * 0 for array in rows)) if step == 3 else rows

    monkeypatch.setattr(BatchSource, "batch", batch)
    texts = first_tokens(str(prepared), "train", 10_000, on_damaged="skip")
    assert 0 < sum(text not in whole for text in texts) <= 1  # the one that was cut
    beginnings = {tuple(text[:n]) for text in whole for n in range(len(text) + 1)}
    assert all(tuple(text) in beginnings for text in texts)

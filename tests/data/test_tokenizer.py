import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from layerskip_jax.data import tokenizer as tokenizers_of_text
from layerskip_jax.data.tokenizer import (
    END_TOKEN,
    encode_parts,
    encode_texts,
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


# As the tokenizers of these models part a text into words.
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_2 = LLAMA_3.replace("{1,3}", "")
WORDS = [
    "the", "Katze", "сидит", "字", "don't", "42", "x=1;", "é", "e\u0301", "\u1112\u1161", "</s>",
]  # fmt: skip
GAPS = [" ", "\n", "\n\n", "  ", " \n", "\r\n", "\t", "", ".\n", "\u2028", "\u0301"]


def by_pattern(pattern):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def byte_level(pre_tokenizer, normalizer=None, post_processor=None):
    """A small BPE that is trained with these parts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=[END_TOKEN, "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [gap.join(WORDS) for gap in GAPS]
    tokenizer.train_from_iterator(texts * 4, trainer)
    if post_processor is not None:
        tokenizer.post_processor = post_processor
    tokenizer.encode_special_tokens = True
    return tokenizer


def sentencepiece(parts):
    """A Unigram model whose words begin where spaces are, or that has none."""
    tokenizer = Tokenizer(models.Unigram())
    parts(tokenizer)
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    texts = [gap.join(WORDS) for gap in GAPS]
    tokenizer.train_from_iterator(texts * 4, trainer)
    return tokenizer


def metaspace(scheme):
    def parts(tokenizer):
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)

    return parts


def as_llama_2(tokenizer):
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )


def with_added_tokens(tokenizer):
    tokenizer.add_tokens(["the\nKatze", "  ", "sits"])
    return tokenizer


CUT = {
    "gpt 2": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "llama 3": lambda: byte_level(by_pattern(LLAMA_3)),
    "qwen 2": lambda: byte_level(by_pattern(QWEN_2), normalizers.NFC()),
    "begins a text": lambda: byte_level(
        by_pattern(LLAMA_3),
        post_processor=processors.TemplateProcessing(
            single=f"{END_TOKEN} $A", special_tokens=[(END_TOKEN, 0)]
        ),
    ),
    "a prefix": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "added tokens": lambda: with_added_tokens(byte_level(by_pattern(LLAMA_3))),
    "words in quotes": lambda: byte_level(by_pattern(r'"[^"]*"|\s?\w+|\s+|[^\w\s"]+|"')),
    "t5": lambda: sentencepiece(metaspace("always")),
    "gemma": lambda: sentencepiece(metaspace("never")),
}
WHOLE = {
    "llama 2": lambda: sentencepiece(as_llama_2),
    "letters by number": lambda: byte_level(
        pre_tokenizers.Sequence(
            [pre_tokenizers.FixedLength(5), pre_tokenizers.ByteLevel(False, use_regex=False)]
        )
    ),
    "strips": lambda: byte_level(by_pattern(LLAMA_3), normalizers.Strip()),
}


@pytest.mark.parametrize("kind", [*CUT, *WHOLE])
def test_a_text_has_the_same_ids_in_parts_as_whole(kind, monkeypatch):
    monkeypatch.setattr(tokenizers_of_text, "PART_CHARACTERS", 12)
    monkeypatch.setattr(tokenizers_of_text, "CONTEXT_CHARACTERS", 30)
    tokenizer = {**CUT, **WHOLE}[kind]()
    cut = 0
    pieces = st.lists(st.tuples(st.sampled_from([*WORDS, '"', "ab", "A"]), st.sampled_from(GAPS)))

    @settings(deadline=None, max_examples=60, derandomize=True, database=None)
    @given(st.lists(st.one_of(st.text(max_size=60), pieces.map(joined)), min_size=1, max_size=3))
    def holds(texts):
        nonlocal cut
        found = encode_texts(tokenizer, texts)
        for text, ids in zip(texts, found, strict=True):
            parts = cut_text(tokenizer, text)
            assert "".join(parts) == text
            cut += len(parts) > 1
            assert ids.tolist() == tokenizer.encode(text, add_special_tokens=False).ids
            assert ids.dtype == "int32"

    holds()
    # Plain words and lines are cut by all that part them.
    text = "the cat sat on\nthe mat and slept " * 20
    count = len(cut_text(tokenizer, text))
    if kind in CUT:
        assert cut and count > 20
    elif kind == "llama 2":
        assert count == 1
    whole = tokenizer.encode(text, add_special_tokens=False).ids
    assert encode_texts(tokenizer, [text])[0].tolist() == whole


def cut_text(tokenizer, text):
    return [text[part.begin : part.end] for part, _ in encode_parts(tokenizer, [text])]


def joined(pieces):
    return "".join(word + gap for word, gap in pieces)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("aaaa bbbb\ncccc dddd\neeee", ["aaaa bbbb\ncccc dddd\n", "eeee"]),
        ("aaaa bbbb cccc dddd eeee", ["aaaa bbbb cccc", " dddd eeee"]),  # no newline
        ("aaaabbbbccccddddeeeeffff\ngggg", ["aaaabbbbccccddddeeeeffff\ngggg"]),  # too short a rest
        ("a" * 60 + " bbbb cccc dddd\neeee", ["a" * 60, " bbbb cccc dddd\n", "eeee"]),
        ("字" * 14 + "\n" + "字" * 14 + "\nд", ["字" * 14 + "\n", "字" * 14 + "\n", "д"]),
        ("x" * 40, ["x" * 40]),
        ("12 34 " * 9, ["12 34 " * 9]),  # no letters
        ("", [""]),
    ],
)
def test_where_a_text_is_cut(monkeypatch, text, parts):
    monkeypatch.setattr(tokenizers_of_text, "PART_CHARACTERS", 12)
    found = cut_text(byte_level(by_pattern(LLAMA_3)), text)
    assert found == parts


def test_a_text_that_cannot_be_cut_is_given_up_soon(monkeypatch):
    """After as many tries, at lines and at words, as it would have parts."""
    monkeypatch.setattr(tokenizers_of_text, "PART_CHARACTERS", 12)
    tried = []
    monkeypatch.setattr(tokenizers_of_text, "_ids_after", lambda *given: tried.append(given))
    for text in ("the cat sat on a mat\n", "the cat sat on\nthe mat and slept\n" * 50):
        tried.clear()
        assert cut_text(byte_level(by_pattern(LLAMA_3)), text) == [text]
        assert 0 < len(tried) <= 2 * (len(text) // 12)


def test_a_word_that_seemed_to_end_is_not_cut(monkeypatch):
    """Within quotes that are one word, which the place alone does not show."""
    monkeypatch.setattr(tokenizers_of_text, "PART_CHARACTERS", 12)
    monkeypatch.setattr(tokenizers_of_text, "CONTEXT_CHARACTERS", 30)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = by_pattern(r'"[^"]*"|\s?\w+|\s+|[^\w\s"]+|"')
    quote = '"the mat and the cat on it"'
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([quote] * 4, trainer)
    plain = "the mat and the cat on it. " * 4
    text = plain + quote + plain
    parts = cut_text(tokenizer, text)
    assert len(parts) > 2 and sum(quote in part for part in parts) == 1
    whole = tokenizer.encode(text, add_special_tokens=False).ids
    assert encode_texts(tokenizer, [text, plain])[0].tolist() == whole

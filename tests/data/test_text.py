"""Text is text, however it is cut into tokens."""

import functools
import json

import jax
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

from layerskip_jax.data.text import (
    Continuation,
    Row,
    begin_tokens,
    completion_ids,
    encode_prompt,
    stop_sequences,
    stop_texts,
)
from layerskip_jax.data.tokenizer import END_TOKEN, train_tokenizer
from layerskip_jax.generation.generator import Generator
from layerskip_jax.language_model import LanguageModel
from layerskip_jax.model.transformer import Transformer
from layerskip_jax.run_folder.paths import read_prompt
from layerskip_jax.schema import ConfigError
from tests.helpers import small_model

TEXT = (
    "def main(self):\n    if x:\n        return self.main(x)\n\n\nclass Main:\n    pass\n"
    "the cat sat on the mat, and the dog didn't.\n  - naïve – 日本語 😀\n"
) * 4
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
BEGIN, TURN = "<s>", "<|turn|>"


def _trained(tokenizer, trainer, **more):
    tokenizer.train_from_iterator([TEXT], trainer(show_progress=False, vocab_size=420, **more))
    return tokenizer


def _byte_level(add_prefix_space):
    tokenizer = train_tokenizer(iter([TEXT]), 330)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    return tokenizer


def _llama_2(prepend):
    """Space marks and a byte for what the vocabulary lacks, as SentencePiece has it."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    marks = [normalizers.Prepend("▁")] if prepend else []
    tokenizer.normalizer = normalizers.Sequence([*marks, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prepend else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    special = ["<unk>", BEGIN, END_TOKEN]
    # Words, or the whole text would become a few tokens.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("▁*[^▁]+"), "isolated")
    # Without a limit on the alphabet no byte would ever fall back. Bytes are ordinary tokens.
    _trained(tokenizer, trainers.BpeTrainer, special_tokens=special + BYTES, limit_alphabet=40)
    tokenizer.pre_tokenizer = None
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] in special]
    return Tokenizer.from_str(json.dumps(content))


def _word_piece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return _trained(tokenizer, trainers.WordPieceTrainer, special_tokens=["[UNK]", END_TOKEN])


def _unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _trained(
        tokenizer, trainers.UnigramTrainer, special_tokens=["<unk>", END_TOKEN], unk_token="<unk>"
    )


MAKERS = {
    "byte-level": lambda: _byte_level(False),
    "byte-level, with a space before": lambda: _byte_level(True),
    "llama 2": lambda: _llama_2(True),
    "llama 2, without a space before": lambda: _llama_2(False),
    "word piece": _word_piece,
    "unigram": _unigram,
}
LOSSLESS = ["byte-level", "llama 2", "llama 2, without a space before"]


@functools.cache
def tokenizer(kind):
    made = MAKERS[kind]()
    made.add_special_tokens([TURN])
    made.add_tokens(["didn't"])
    made.encode_special_tokens = True
    return made


kinds = pytest.mark.parametrize("kind", MAKERS)
few = settings(max_examples=60, deadline=None)
words = st.lists(
    st.sampled_from(
        ["def main", "(self)", ":", "\n", "\n    ", " ", "  ", "the cat", " sat", "didn't", ",",
         ".", "é", "日本", "😀", "\ufffd", "x", TURN, "<0x0A>", "\t", "'"]
    ),
    max_size=12,
).map("".join)  # fmt: skip


def _ids(kind, draw_from):
    return st.lists(st.integers(0, tokenizer(kind).get_vocab_size() - 1), max_size=draw_from)


def _written(made, prompt, tokens, cuts=(), **ends):
    """Returns the row, and its pieces, of tokens that come in parts."""
    row, pieces, begun = Row(made, prompt, **ends), [], 0
    for cut in [*sorted(cuts), len(tokens)]:
        pieces.append(row.add(tokens[begun:cut]))
        begun = max(begun, cut)
    return row, [*pieces, row.finish()]


@kinds
@few
@given(data=st.data())
def test_a_completion_s_ids_say_it_after_the_prompt_s_own(kind, data):
    made = tokenizer(kind)
    prompt, completion = "a " + data.draw(words), data.draw(words) + "z"
    prompt_ids, whole_ids = (
        made.encode(text, add_special_tokens=False).ids for text in (prompt, prompt + completion)
    )
    ids = completion_ids(made, completion, prompt_ids, whole_ids)
    said = made.decode(whole_ids, skip_special_tokens=False)
    if ids is None:  # only of text that the tokenizer does not keep anyway
        assert said != prompt + completion and kind not in LOSSLESS
        return
    assert ids
    assert made.decode(prompt_ids + ids, skip_special_tokens=False) == said
    if kind in LOSSLESS:
        assert Continuation(made, prompt_ids).peek(ids) == completion


def test_a_token_over_the_boundary_is_parted_there():
    made = tokenizer("byte-level")
    prompt, whole = made.encode("the ca").ids, made.encode("the cat").ids
    assert whole[: len(prompt)] != prompt
    assert completion_ids(made, "t", prompt, whole) == made.encode("t").ids
    made = tokenizer("llama 2")  # which puts a space before what is encoded alone
    prompt, whole = made.encode("the ca").ids, made.encode("the cat").ids
    assert whole[: len(prompt)] != prompt
    [token] = completion_ids(made, "t", prompt, whole)
    assert made.id_to_token(token) == "t"


@kinds
@few
@given(data=st.data())
def test_pieces_join_to_the_text_however_the_tokens_come(kind, data):
    made = tokenizer(kind)
    prompt, tokens = data.draw(_ids(kind, 6)), data.draw(_ids(kind, 24))
    cuts = data.draw(st.lists(st.integers(0, len(tokens)), max_size=6))
    stop = data.draw(st.lists(st.sampled_from(["\n", "ai", " the", ":\n", "é", "n'"]), max_size=3))
    whole, _ = _written(made, prompt, tokens)
    row, pieces = _written(made, prompt, tokens, cuts, stop=stop)
    assert "".join(pieces) == row.text
    assert not any(text in row.text for text in stop)
    # The text up to the first stop text, and no more.
    at = min((whole.text.find(text) for text in stop if text in whole.text), default=None)
    assert row.text == whole.text[:at]
    assert row.ended == (at is not None)
    if row.ended:
        before, _ = _written(made, prompt, tokens[: row.count - 1], stop=stop)
        ended, _ = _written(made, prompt, tokens[: row.count], stop=stop)
        assert ended.ended and (not before.ended or before.count < row.count)


@pytest.mark.parametrize("kind", LOSSLESS)
@few
@given(text=words, share=st.floats(0, 1))
def test_prompt_and_text_are_what_the_model_wrote(kind, text, share):
    """And encode to the same ids again."""
    made = tokenizer(kind)
    ids = made.encode(text, add_special_tokens=False).ids
    cut = int(share * len(ids))
    row, _ = _written(made, ids[:cut], ids[cut:])
    before = Continuation(made, [])
    prompt = "".join(map(before.add, ids[:cut])) + before.finish()
    if prompt.endswith("\ufffd"):
        return  # cut within a character, which no prompt is
    assert prompt + row.text == text
    assert made.encode(prompt + row.text, add_special_tokens=False).ids == ids


@pytest.mark.parametrize("kind", LOSSLESS)
@pytest.mark.parametrize(
    "text", ["ééé\t\t<|turn|>", "日本語日本語日本語 <|turn|>", "😀😀😀😀é|😀|"]
)
def test_what_is_forgotten_ends_with_a_character(kind, text):
    """Where bytes are tokens, half a character spoils the decoding of all bytes after it."""
    made = tokenizer(kind)
    row, pieces = _written(made, [], made.encode(text, add_special_tokens=False).ids)
    assert row.text == "".join(pieces) == text


@kinds
@few
@given(data=st.data())
def test_a_row_is_the_text_of_all_less_that_of_the_prompt(kind, data):
    """Where what comes after changes nothing before.

    WordPiece's decoder takes spaces away, and bytes beside one that is no character become none.
    """
    made = tokenizer(kind)
    prompt, tokens = data.draw(_ids(kind, 30)), data.draw(_ids(kind, 30))
    before, after = made.decode(prompt), made.decode([*prompt, *tokens])
    row, _ = _written(made, prompt, tokens)
    if kind != "word piece" and "\ufffd" not in before + after:
        assert before + row.text == after


def test_stop_texts_of_a_model():
    made = tokenizer("llama 2")
    [*alone] = made.encode("\n", add_special_tokens=False).ids
    assert len(alone) == 2, "a space mark comes first, which never follows anything"
    assert stop_sequences(made, ["\n"]) == [alone, alone[1:]]
    assert stop_sequences(made, [TURN]) == [[made.token_to_id(TURN)]]
    assert stop_texts("ab") == ("ab",)
    with pytest.raises(ConfigError, match="stop='' would end every text"):
        stop_texts(["a", ""])
    with pytest.raises(ConfigError, match="stop=3 is no text"):
        stop_texts([3])


def test_bytes_that_are_no_character():
    """Half of one, then a letter: it ended with a traceback."""
    made = tokenizer("llama 2")
    ids = [made.token_to_id(token) for token in ("<0x41>", "<0xC3>", "x")]
    row, pieces = _written(made, [], ids, [1, 2])
    assert pieces == ["A", "", "\ufffdx", ""]
    row, pieces = _written(made, [], ids[:2], [1])
    assert pieces == ["A", "", "\ufffd"] and row.text == "A\ufffd"


@functools.cache
def _generator():
    """Random weights that write every kind of token, compiled once for all tokenizers."""
    most = max(tokenizer(kind).get_vocab_size() for kind in MAKERS)
    model = Transformer(
        small_model(vocab_size=most, num_layers=2, max_sequence_length=96), jax.random.key(0)
    )
    model.head[...] = 4 * model.head[...]
    return Generator(model)


def _model(kind):
    end = tokenizer(kind).token_to_id(END_TOKEN)
    return LanguageModel(_generator(), tokenizer(kind), end, None)


@kinds
def test_what_is_generated_is_what_is_streamed(kind):
    model = _model(kind)
    for prompt, stop, seed in [
        ("def main(self):\n    if x:", ["\n", "zz"], 1), ("the cat", ["a", "th"], 2),
        (" x", "e", 3), ("the dog didn't", "\n\n", 4),
    ]:  # fmt: skip
        if not model.encode(prompt):
            continue
        options = {"temperature": 1.3, "seed": seed, "stop": stop}
        whole = model.generate(prompt, 40, temperature=1.3, seed=seed)
        done = model.generate(prompt, 40, **options)
        [text] = done.texts
        stops = stop_texts(stop)
        at = min((whole.texts[0].find(s) for s in stops if s in whole.texts[0]), default=None)
        assert text == whole.texts[0][:at]
        [tokens] = done.generation.tokens
        assert tokens == whole.generation.tokens[0][: len(tokens)]
        assert model.generate(prompt, 40, draft=(1, 2), **options).texts == [text]
        pieces = list(model.stream(prompt, 40, draft=(1, 2), **options))
        assert "".join(piece.text for piece in pieces if not piece.is_draft) == text


def test_a_batch_stops_row_by_row():
    model = _model("byte-level")
    prompts = ["the cat", "def main", "class Main", "x"]
    whole = model.generate(prompts, 60, temperature=1.2, seed=3).texts
    done = model.generate(prompts, 60, temperature=1.2, seed=3, stop="e")
    assert done.texts == [text.split("e")[0] for text in whole]
    assert len({len(tokens) for tokens in done.generation.tokens}) > 1


def test_special_tokens_in_a_prompt_are_text_unless_asked_for():
    model = _model("byte-level")
    turn = model.tokenizer.token_to_id(TURN)
    assert turn not in model.encode(f"a{TURN}b")
    assert model.encode(f"a{TURN}b", special_tokens=True).count(turn) == 1
    assert model.tokenizer.decode(model.encode(f"a{TURN}b")) == f"a{TURN}b"


def test_what_begins_a_text_is_put_there_once():
    made = Tokenizer.from_str(tokenizer("llama 2").to_str())
    begin = made.token_to_id(BEGIN)
    made.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, begin)]
    )
    made.encode_special_tokens = True
    assert begin_tokens(made) == [begin]
    assert encode_prompt(made, "x")[0] == begin
    model = LanguageModel(Generator.__new__(Generator), made, None, None)
    assert model.encode("x") == encode_prompt(made, "x")
    assert model.encode(f"{BEGIN}x", special_tokens=True) == [begin, *encode_prompt(made, "x")[1:]]


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path):
    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbfdef main")
    assert read_prompt(tmp_path / "prompt.txt") == "def main"

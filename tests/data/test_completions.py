"""Prompts with completions, and chats: what is read, what is learned, and what is refused."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from layerskip_jax.commands import prepare as command
from layerskip_jax.data import units
from layerskip_jax.data.batches import BatchSource
from layerskip_jax.data.documents import first_tokens
from layerskip_jax.data.manifest import read_manifest
from layerskip_jax.data.prepare import prepare
from layerskip_jax.data.text import encode_prompt, reading_special_tokens
from layerskip_jax.data.tokenizer import END_TOKEN, file_sha256, load_tokenizer
from layerskip_jax.interop.chat import ChatTemplate
from layerskip_jax.schema import ConfigError, UserError
from tests.data.conftest import small_request

LONG = 7  # the record that no window holds
RECORDS = [
    {"asked": f"Sum of {n} and é{n}?\n", "parse": str(3**400) if n == LONG else f"{2 * n} [in:é]"}
    for n in range(60)
]
CHAT_ML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Of turns before the last it leaves out what was thought, as Qwen3's does.
FORGETS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if loop.last else m.content.split('/')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURNS = ["<|im_start|>", "<|im_end|>"]


def chat(*texts, first="user"):
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]


def write_lines(file: Path, records) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def pairs_request(file, **changes):
    settings = {"prompt_field": "asked", "completion_field": "parse", "sequence_length": 47}
    settings["keep_documents"] = True
    return small_request(file, **{**settings, **changes})


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    return write_lines(tmp_path_factory.mktemp("lines") / "d.jsonl", RECORDS)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, lines):
    """Prepared from `RECORDS`; for reading."""
    output = tmp_path_factory.mktemp("pairs") / "data"
    prepare(pairs_request(lines), output)
    return output


@pytest.fixture(scope="module")
def chat_request(tmp_path_factory, pairs):
    """Returns a function that prepares chats by a template, and the folder's tokenizer."""
    tokenizer = load_tokenizer(pairs / "tokenizer.json")
    tokenizer.add_special_tokens(TURNS)
    file = tmp_path_factory.mktemp("chat") / "tokenizer.json"
    tokenizer.save(str(file))

    def prepared(template, chats, output, end_token=END_TOKEN, **changes):
        chosen = ChatTemplate(template, {})
        source = write_lines(output.with_suffix(".jsonl"), [{"talk": c} for c in chats])
        request = small_request(
            source, messages_field="talk", sequence_length=99, vocab_size=0, end_token=end_token,
            tokenizer_sha256=file_sha256(file), chat_template_sha256=chosen.sha256,
            validation_fraction=0.5, **changes,
        )  # fmt: skip
        prepare(request, output, tokenizer_file=file, chat_turns=chosen.turns)
        return output

    return prepared, load_tokenizer(file), chosen_ids


def chosen_ids(tokenizer, text):
    """Returns what a model is asked with; see `LanguageModel.encode_chat`."""
    return reading_special_tokens(tokenizer).encode(text, add_special_tokens=False).ids


def documents_of(folder):
    """Returns the documents of both splits, each as its ids and which of them are targets."""
    found = []
    for split in ("train", "validation"):
        source = BatchSource(folder, split, batch_size=1, seed=0, shuffle=False)
        for step in range(source.num_windows):
            rows = source.batch(step)
            tokens = np.append(rows.tokens[0], rows.targets[0, -1])
            learned = np.append(False, rows.valid[0])
            segments = np.append(rows.segment_ids[0], 0)
            if learned[-1]:
                segments[-1] = segments[-2]
            for segment in range(1, segments.max() + 1):
                part = segments == segment
                found.append((tuple(tokens[part].tolist()), tuple(learned[part].tolist())))
    return found


def test_prompts_are_those_of_generate_and_completions_alone_are_learned(pairs):
    tokenizer, manifest = load_tokenizer(pairs / "tokenizer.json"), read_manifest(pairs)
    expected = []
    for number, record in enumerate(RECORDS):
        if number != LONG:
            prompt = encode_prompt(tokenizer, record["asked"])
            completion = [*tokenizer.encode(record["parse"]).ids, manifest.end_token_id]
            learned = [False] * len(prompt) + [True] * len(completion)
            expected.append((tuple(prompt + completion), tuple(learned)))
    found = documents_of(pairs)
    assert sorted(found) == sorted(expected)
    splits = (manifest.train, manifest.validation)
    assert sum(split.documents for split in splits) == len(RECORDS) - 1
    assert sum(split.over_long for split in splits) == 1
    assert sum(split.tokens for split in splits) == sum(len(ids) for ids, _ in expected)
    assert sum(split.targets for split in splits) == sum(sum(learned) for _, learned in expected)
    kept = [r["asked"] + r["parse"] for n, r in enumerate(RECORDS) if n != LONG]
    assert sum(split.bytes for split in splits) == sum(len(text.encode()) for text in kept)
    assert manifest.largest_token == max(max(ids) for ids, _ in expected)
    assert 0.7 < manifest.train.filled(47) <= 1


def test_the_entropy_is_that_of_what_is_learned(pairs):
    source = BatchSource(pairs, "validation", batch_size=1, seed=0, shuffle=False)
    batches = [source.batch(step) for step in range(source.num_windows)]
    tokens = np.concatenate([rows.targets[rows.valid] for rows in batches])
    p = np.unique(tokens, return_counts=True)[1] / len(tokens)
    assert read_manifest(pairs).unigram_entropy_nats == pytest.approx(-(p * np.log(p)).sum())


def test_documents_come_out_of_whole_windows_one_by_one(pairs):
    found = [
        tuple(text)
        for split in ("train", "validation")
        for text in first_tokens(str(pairs), split, 10_000)
    ]
    assert sorted(found) == sorted(ids for ids, _ in documents_of(pairs))


def test_equal_requests_give_equal_data_also_after_a_kill(pairs, lines, tmp_path):
    output = tmp_path / "data"
    code = (
        "import os, signal, sys\nfrom pathlib import Path\n"
        "from layerskip_jax.data import manifest, prepare as preparing\n"
        "from tests.data.test_completions import pairs_request\n"
        "manifest.fingerprint = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "preparing.prepare(pairs_request(sys.argv[1]), Path(sys.argv[2]))\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", code, str(lines), str(output)],
        cwd=Path(__file__).parents[2], check=False,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL
    assert not output.exists() and len(os.listdir(tmp_path)) == 2
    assert prepare(pairs_request(lines), output) == read_manifest(pairs)
    assert os.listdir(tmp_path) == ["data"]
    for name in ("train-00000.array_record", "validation-00000.array_record"):
        assert (output / name).read_bytes() == (pairs / name).read_bytes()
    with pytest.raises(UserError, match="completion_field 'parse' there, 'asked2' asked for"):
        prepare(pairs_request(lines, completion_field="asked2"), output)


def test_a_tokenizer_that_begins_texts_begins_prompts(pairs, lines, tmp_path):
    tokenizer = load_tokenizer(pairs / "tokenizer.json")
    tokenizer.add_special_tokens(["<s>"])
    begin = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", begin)]
    )
    file = tmp_path / "tokenizer.json"
    tokenizer.save(str(file))
    request = pairs_request(
        lines, vocab_size=0, tokenizer_sha256=file_sha256(file), sequence_length=60
    )
    prepare(request, tmp_path / "data", tokenizer_file=file)
    plain = {(begin, *ids) for ids, _ in documents_of(pairs)}
    found = documents_of(tmp_path / "data")
    assert plain <= {ids for ids, _ in found}
    assert all(not learned[0] for _, learned in found)


def test_plain_text_and_completions_are_mixed(pairs, lines, tmp_path):
    request = small_request(
        lines, jsonl_field="asked", sequence_length=47, vocab_size=0,
        tokenizer_sha256=file_sha256(pairs / "tokenizer.json"),
    )  # fmt: skip
    prepare(request, tmp_path / "plain", tokenizer_file=pairs / "tokenizer.json")

    def rows_of(batch):
        return {
            (tuple(tokens.tolist()), tuple(valid.tolist()))
            for tokens, valid in zip(batch.tokens, batch.valid, strict=True)
        }

    folders = [str(pairs), str(tmp_path / "plain")]
    alone = [BatchSource(f, "train", batch_size=1, seed=0, shuffle=False) for f in folders]
    expected = [
        set().union(*(rows_of(source.batch(n)) for n in range(source.num_windows)))
        for source in alone
    ]
    mixed = BatchSource(
        folders[0], "train", batch_size=64, seed=0, mixture=folders[1:], weights=(1.0, 1.0)
    )
    found = rows_of(mixed.batch(0))
    assert found == expected[0] | expected[1]
    # Of plain text every target within a document counts, of prompts none.
    shares = [np.mean([valid for _, valid in rows]) for rows in expected]
    assert shares[0] < 0.6 < shares[1]


def test_documents_that_are_all_too_long_are_refused(lines, tmp_path):
    with pytest.raises(UserError, match=r"of the train split's \d+ documents are longer than --se"):
        prepare(pairs_request(lines, sequence_length=3), tmp_path / "data")
    assert os.listdir(tmp_path) == []


def test_a_tfds_data_set_may_have_the_fields(pairs, tmp_path):
    folder = pairs / "documents"
    request = small_request(
        f"tfds:{folder}", prompt_field="path", completion_field="text", sequence_length=199, seed=1
    )
    prepare(request, tmp_path / "data")
    documents = read_manifest(tmp_path / "data")
    held = documents.train.documents + documents.validation.documents
    assert held == read_manifest(pairs).train.documents + read_manifest(pairs).train.over_long
    with pytest.raises(UserError, match="no text in a field 'a'; its fields.*with --prompt-field"):
        prepare(dataclasses.replace(request, prompt_field="a"), tmp_path / "other")


BAD = [
    (b'{"asked": "x"}', r"has no field 'parse' \(its fields: 'asked'\)"),
    (b'{"asked": 3, "parse": "x"}', "has 3 in its field 'asked', which is no text"),
    (b'{"asked": "x", "parse": null}', "has None in its field 'parse', which is no text"),
    (b'{"asked": "x", "parse": ""}', "has no text in its field 'parse'"),
    (b'{"asked": " ", "parse": "x"}', "has no text in its field 'asked'"),
    (b'{"asked": "x", "parse": "\\ud800"}', "has '.ud800' in its field 'parse', which is no text"),
    (b'{"asked": "x", "parse": "\xff"}', "is not UTF-8 text"),
    (b"[1]", "is no JSON object"),
    (b"{", r"is no JSON object \(Expecting"),
]
BAD_CHATS = [
    (3, "has no list of messages in its field 'talk'"),
    ([], "the chat has no message"),
    ([{"role": "user"}], "must have a role and a content"),
    (["hello"], "has no list of messages in its field 'talk', each an object with role"),
    (chat("only asked"), "has no turn of the assistant after another's in its field 'talk'"),
    (chat("said first", "asked", first="assistant"), "has no turn of the assistant"),
    (chat("asked", " "), "is empty"),
    (chat("asked", "\ud800"), "that are no text"),
]


@pytest.mark.parametrize(("line", "message"), BAD)
def test_bad_records_are_named_or_left_out(tmp_path, line, message):
    good = [json.dumps(record).encode() for record in RECORDS[:6]]
    (tmp_path / "d.jsonl").write_bytes(b"\n".join([*good[:2], line, b"", *good[2:]]))
    request = pairs_request(tmp_path / "d.jsonl", validation_fraction=0.5)
    with pytest.raises(UserError, match=f"d.jsonl(:3)? {message}.*or pass --skip-bad-files"):
        prepare(request, tmp_path / "data")
    manifest = prepare(dataclasses.replace(request, skip_bad_files=True), tmp_path / "data")
    assert manifest.skipped_files == 1
    assert manifest.train.documents + manifest.validation.documents == 6


@pytest.mark.parametrize(("bad", "message"), BAD_CHATS)
def test_bad_chats_are_named_or_left_out(chat_request, tmp_path, bad, message):
    prepared, *_ = chat_request
    chats = [chat(f"asked {n}", "said") for n in range(6)]
    with pytest.raises(UserError, match=f"data.jsonl:3 .*{message}.*or pass --skip-bad-files"):
        prepared(CHAT_ML, [*chats[:2], bad, *chats[2:]], tmp_path / "data")
    folder = prepared(
        CHAT_ML, [*chats[:2], bad, *chats[2:]], tmp_path / "data", skip_bad_files=True
    )
    assert read_manifest(folder).skipped_files == 1


def test_a_template_that_refuses_a_chat_or_changes_a_turn_is_reported(chat_request, tmp_path):
    prepared, *_ = chat_request
    refuses = "{{ raise_exception('roles must alternate') }}"
    changes = CHAT_ML.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
    for template, message in (
        (refuses, "refuses this chat: roles must alternate"),
        (changes, "does not write message .* after what it asks for it with"),
    ):
        with pytest.raises(UserError, match=f"data.jsonl:1 has no chat in its field .*{message}"):
            prepared(template, [chat("a", "b")] * 4, tmp_path / "data")


def test_every_turn_of_the_assistant_is_learned_after_what_asks_for_it(chat_request, tmp_path):
    prepared, tokenizer, ids_of = chat_request
    talk = chat("one", "two", "three <|im_end|>", "four")
    folder = prepared(CHAT_ML, [talk, *(chat(f"q{n}", "a") for n in range(5))], tmp_path / "data")
    end = read_manifest(folder).end_token_id
    [(ids, learned)] = [found for found in documents_of(folder) if len(found[0]) > 40]
    template = ChatTemplate(CHAT_ML, {})
    prompts = [ids_of(tokenizer, template.render(talk[:turn])) for turn in (1, 3)]
    said = [ids_of(tokenizer, f"{text}<|im_end|>\n") for text in ("two", "four")]
    said[1].append(end)
    assert ids == (*prompts[1], *said[1])
    targets = np.zeros(len(ids), bool)
    for prompt, turn in zip(prompts, said, strict=True):
        assert ids[: len(prompt)] == tuple(prompt)
        targets[len(prompt) : len(prompt) + len(turn)] = True
        assert ids[len(prompt) : len(prompt) + len(turn)] == tuple(turn)
    np.testing.assert_array_equal(learned, targets)


def test_an_end_token_that_the_template_writes_is_not_written_twice(chat_request, tmp_path):
    prepared, tokenizer, ids_of = chat_request
    chats = [chat(f"q{n}", "a") for n in range(6)]
    folder = prepared(CHAT_ML, chats, tmp_path / "data", end_token="<|im_end|>")
    turn = ids_of(tokenizer, "a<|im_end|>")
    for ids, learned in documents_of(folder):
        assert ids[-len(turn) :] == tuple(turn)
        assert learned == (*[False] * (len(ids) - len(turn)), *[True] * len(turn))


def test_a_turn_whose_chat_is_written_otherwise_later_has_a_document_of_its_own(
    chat_request, tmp_path
):
    prepared, tokenizer, ids_of = chat_request
    talk = chat("one", "hm/two", "three", "oh/four")
    folder = prepared(FORGETS, [talk, *(chat(f"q{n}", "a") for n in range(5))], tmp_path / "data")
    end = read_manifest(folder).end_token_id
    template = ChatTemplate(FORGETS, {})
    expected = []
    for turn, said in ((1, "hm/two"), (3, "oh/four")):
        prompt = ids_of(tokenizer, template.render(talk[:turn]))
        completion = [*ids_of(tokenizer, f"{said}<|im_end|>\n"), end]
        learned = [False] * len(prompt) + [True] * len(completion)
        expected.append((tuple(prompt + completion), tuple(learned)))
    found = documents_of(folder)
    assert len(found) == 7 and set(expected) < set(found)


def test_what_no_tokens_say_after_the_prompt_is_named(tmp_path):
    vocabulary = {"ab": 0, "cd": 1, "abcd": 2, "[UNK]": 3, END_TOKEN: 4}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    file = tmp_path / "tokenizer.json"
    tokenizer.save(str(file))
    good = [{"asked": "ab" + " ab" * n, "parse": " cd"} for n in range(10)]
    bad = {"asked": "ab", "parse": "cd"}
    source = write_lines(tmp_path / "d.jsonl", [good[0], bad, *good[1:]])
    request = pairs_request(
        source, vocab_size=0, tokenizer_sha256=file_sha256(file), validation_fraction=0.5
    )
    with pytest.raises(UserError, match=r"d.jsonl:2 .*no tokens that say 'cd' after 'ab'.*or pas"):
        prepare(request, tmp_path / "data", tokenizer_file=file)
    request = dataclasses.replace(request, skip_bad_files=True)
    manifest = prepare(request, tmp_path / "data", tokenizer_file=file)
    assert manifest.skipped_files == 1
    assert manifest.train.documents + manifest.validation.documents == 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"completion_field": ""}, "--prompt-field='asked' and --completion-field='' belong"),
        ({"completion_field": "asked"}, "are both 'asked'; name two fields"),
        ({"messages_field": "m"}, "--messages-field='m' takes the place of --prompt-field='asked'"),
        (
            {"prompt_field": "", "completion_field": "", "messages_field": "m"},
            "--messages-field='m' needs a chat template",
        ),
        ({"sources": ("stdlib",)}, "--source=stdlib is plain text and has no fields"),
    ],
)
def test_requests_that_contradict_themselves(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(pairs_request("x.jsonl"), **changes)


def test_chats_need_a_template(tmp_path):
    request = small_request("x.jsonl", messages_field="talk", chat_template_sha256="0")
    with pytest.raises(ConfigError, match="messages_field='talk' needs chat_turns"):
        prepare(request, tmp_path / "data")


def test_plain_files_have_no_fields(lines, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match="a.txt is plain text and has no fields; name .jsonl"):
        prepare(pairs_request(tmp_path / "a.txt"), tmp_path / "data")
    with pytest.raises(
        UserError, match="matches no file; a folder is searched for .jsonl, .parquet, .arrow"
    ):
        prepare(pairs_request(tmp_path), tmp_path / "data")


def test_the_command(lines, pairs, tmp_path, capsys):
    figures = tmp_path / "figures.json"
    arguments = [
        f"--source={lines}", f"--output={tmp_path / 'data'}", "--sequence-length=47",
        "--vocab-size=300", "--validation-fraction=0.2", "--prompt-field=asked",
        "--completion-field=parse", f"--json={figures}", "--keep-documents",
    ]  # fmt: skip
    assert command.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "over long" in printed and "full" in printed
    assert read_manifest(tmp_path / "data") == read_manifest(pairs)
    values = json.loads(figures.read_text())
    assert values["train_over_long"] + values["validation_over_long"] == 1
    assert f"{values['train_targets']:,}" in printed


def test_the_command_takes_the_chat_template_beside_the_tokenizer(chat_request, tmp_path, capsys):
    _, tokenizer, _ = chat_request
    model = tmp_path / "model"
    model.mkdir()
    tokenizer.save(str(model / "tokenizer.json"))
    source = write_lines(tmp_path / "d.jsonl", [{"talk": chat(f"q{n}", "a")} for n in range(6)])
    arguments = [
        f"--source={source}", f"--output={tmp_path / 'data'}", "--validation-fraction=0.5",
        "--messages-field=talk", f"--tokenizer={model}",
    ]  # fmt: skip
    with pytest.raises(UserError, match="model has no chat template beside it"):
        command.main(arguments)
    (model / "chat_template.jinja").write_text(CHAT_ML)
    assert command.main(arguments) == 0
    assert read_manifest(tmp_path / "data").train.targets > 0
    (model / "chat_template.jinja").write_text(FORGETS)
    with pytest.raises(UserError, match="chat_template_sha256"):
        command.main(arguments)


def test_more_than_a_chunk_is_tokenized_as_one(lines, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(units, "CHUNK_DOCUMENTS", 7)
    assert prepare(pairs_request(lines), tmp_path / "data") == read_manifest(pairs)

"""Chats, by the template that comes with a model, as `transformers` writes them."""

import json

import pytest
import transformers
from tokenizers import Tokenizer

import layerskip_jax
from layerskip_jax.cli import main
from layerskip_jax.interop.chat import ChatTemplate, chat_template
from layerskip_jax.schema import ConfigError, UserError
from tests.interop.helpers import published

TURNS = ["<|im_start|>", "<|im_end|>"]
CHAT_ML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What published templates make use of.
OTHERS = [
    "{{ bos_token }}{% for m in messages %}\n    {% if m.role == 'user' %}\n[INST] {{ m.content }}"
    " [/INST]\n    {% else %}\n{{ m.content }}{{ eos_token }}\n    {% endif %}\n{% endfor %}\n",
    "{% for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}"
    "{{ m | tojson }}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{{ messages | map(attribute='content') | join('é<') }}{% set ns = namespace(n=0) %}"
    "{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}{{ tools is none }}",
]
CHATS = [
    [{"role": "user", "content": " the <cat> é\n"}],
    [{"role": "system", "content": "sit"}, {"role": "user", "content": "on the mat"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
     {"role": "user", "content": "c <|im_end|>"}],
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer_file):
    """A model with tokens for turns, and a template in the tokenizer's settings."""
    folder = published(
        tmp_path_factory.mktemp("chat") / "model", tokenizer_file, "llama 2", vocab_size=292
    )
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(TURNS)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>",
        "bos_token": "<|im_start|>", "chat_template": CHAT_ML,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("template", [CHAT_ML, *OTHERS])
@pytest.mark.parametrize("chat", CHATS)
def test_a_chat_is_the_ids_of_transformers(folder, template, chat):
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    theirs.chat_template = template
    model = layerskip_jax.load(folder)
    model.chat = ChatTemplate(template, {"bos_token": TURNS[0], "eos_token": TURNS[1]})
    expected = theirs.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert model.chat.render(chat) == expected
    ids = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert model.encode_chat(chat) == ids


@pytest.mark.parametrize("template", [CHAT_ML, OTHERS[0], CHAT_ML.replace(" | trim", "")])
@pytest.mark.parametrize("said", ["so", " It is \n", ""])
def test_a_turn_that_the_model_has_begun_is_as_transformers_writes_it(folder, template, said):
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    theirs.chat_template = template
    chat = [*CHATS[1], {"role": "assistant", "content": said}]
    ours = ChatTemplate(template, {"bos_token": TURNS[0], "eos_token": TURNS[1]})
    expected = theirs.apply_chat_template(chat, continue_final_message=True, tokenize=False)
    assert ours.render(chat, continue_last=True) == expected


def test_a_begun_turn_that_a_template_writes_twice_is_the_same_both_times():
    text = "{% for m in messages %}{{ m | tojson }}{{ m.content }};{% endfor %}"
    said = {"role": "assistant", "content": "so "}
    assert ChatTemplate(text, {}).render([said], continue_last=True) == (
        '{"role": "assistant", "content": "so "}so '
    )


def test_the_template_is_found_where_transformers_looks(folder):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    files = {"tokenizer_config.json": json.dumps({"chat_template": "old"}).encode()}
    chat = CHATS[0]

    def found(**more):
        return chat_template(files | {k: v.encode() for k, v in more.items()}, folder, tokenizer)

    assert found().render(chat) == "old"
    named = json.dumps({"chat_template": [{"name": "default", "template": "first"}]})
    assert found(**{"tokenizer_config.json": named}).render(chat) == "first"
    assert found(**{"chat_template.jinja": "new"}).render(chat) == "new"
    ids = json.dumps({"bos_token_id": 0, "eos_token_id": [1, 2]})
    both = found(**{"chat_template.jinja": "{{ bos_token }}{{ eos_token }}", "config.json": ids})
    assert both.render(chat) == tokenizer.id_to_token(0) + tokenizer.id_to_token(1)
    named = json.dumps({"bos_token": {"content": "named"}})
    named = found(**{"chat_template.jinja": "{{ bos_token }}", "special_tokens_map.json": named})
    assert named.render(chat) == "named"
    assert chat_template({}, folder, tokenizer) is None
    with pytest.raises(UserError, match="chat template cannot be read"):
        found(**{"chat_template.jinja": "{% if %}"})
    with pytest.raises(UserError, match=r"chat_template=7 is no text"):
        found(**{"tokenizer_config.json": json.dumps({"chat_template": 7})})


def test_what_a_template_may_not_do_and_refuses():
    with pytest.raises(ConfigError, match="refuses this chat"):
        ChatTemplate("{{ ''.__class__.__mro__ }}", {}).render(CHATS[0])
    with pytest.raises(ConfigError, match="refuses this chat: no system here"):
        ChatTemplate("{{ raise_exception('no system here') }}", {}).render(CHATS[0])
    with pytest.raises(ConfigError, match="refuses this chat: .*zero"):
        ChatTemplate("{{ 1 / 0 }}", {}).render(CHATS[0])
    for text in ("{{ bos_token }}", "{{ messages[0].content | upper }}"):
        with pytest.raises(ConfigError, match="changes message .* so it cannot be continued"):
            ChatTemplate(text, {"bos_token": "<s>"}).render(CHATS[0], continue_last=True)
    template = ChatTemplate(CHAT_ML, {})
    with pytest.raises(ConfigError, match="must have a role and a content"):
        template.render([{"content": "x"}])
    with pytest.raises(ConfigError, match="the chat has no message"):
        template.render([])


def test_a_chat_is_generated_streamed_and_printed(folder, capsys):
    model = layerskip_jax.load(folder)
    chats = CHATS[:2]
    both = model.generate(max_new_tokens=6, messages=chats).texts
    assert [model.generate(max_new_tokens=6, messages=chat).texts[0] for chat in chats] == both
    assert both == model.complete(list(map(model.encode_chat, chats)), 6).texts
    pieces = model.stream(max_new_tokens=6, messages=chats[1])
    assert "".join(piece.text for piece in pieces) == both[1]
    command = [
        "generate", f"--workdir={folder}", "--chat", "--system=sit", "--prompt=on the mat",
        "--max-new-tokens=6",
    ]  # fmt: skip
    assert main(command) == 0
    assert capsys.readouterr().out.startswith(f"on the mat\n\n{both[1]}\n")
    assert main([*command, "--stream"]) == 0
    assert capsys.readouterr().out == f"on the mat\n\n{both[1]}\n"
    with pytest.raises(ConfigError, match="give prompts or messages, not both"):
        model.generate("x", messages=CHATS[0])
    model.chat = None
    with pytest.raises(ConfigError, match="the model has no chat template"):
        model.generate(messages=CHATS[0])

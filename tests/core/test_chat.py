"""Chat templates against transformers, and what a stranger's template must not do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from stackwise_core.data.tokenizer import load_tokenizer
from stackwise_core.errors import ConfigError
from stackwise_core.generation.chat import render_chat

TEMPLATE = """{% for message in messages %}
    {%- if loop.first %}{{ bos_token + 'system\nBe brief.' + eos_token + '\n' }}{% endif %}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>\n' }}
{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
MESSAGES = [{"role": "user", "content": " Naïve <|im_end|> question? "}]


def saved_tokenizer(folder: Path, **beside: Any) -> str:
    library = Tokenizer(
        models.BPE(vocab={each: n for n, each in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    library.add_special_tokens([AddedToken(name, special=True) for name in ("<|im_start|>", "<|im_end|>")])
    library.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 256), ("<|im_end|>", 257)]
    )
    library.save(str(folder / "tokenizer.json"))
    named = {
        "bos_token": "<|im_start|>",
        "eos_token": {"content": "<|im_end|>"},
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({**named, **beside}))
    return str(folder / "tokenizer.json")


@pytest.mark.parametrize("where", ["file", "config", "list"])
def test_the_tokens_of_a_chat_are_those_of_transformers(where: str, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    named = [{"name": "tool", "template": "no"}, {"name": "default", "template": TEMPLATE}]
    beside = {"config": {"chat_template": TEMPLATE}, "list": {"chat_template": named}, "file": {}}[where]
    path = saved_tokenizer(tmp_path, **beside)
    if where == "file":
        (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    text = render_chat(path, MESSAGES)
    theirs: Any = PreTrainedTokenizerFast(tokenizer_file=path, bos_token="<|im_start|>", eos_token="<|im_end|>")
    theirs.chat_template = TEMPLATE
    assert text == theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    ids = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=True, return_dict=False)
    tokenizer = load_tokenizer(path)
    assert tokenizer.encode_named(text.encode()).tolist() == ids
    assert 256 in ids
    assert 256 not in tokenizer.encode(text.encode())  # elsewhere a name in a text is text
    assert tokenizer.start_tokens == [256]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages.__class__.__mro__ }}", "access to attribute '__class__' of 'list' object is unsafe"),
        ("{{ cycler.__init__.__globals__.os.system('touch gone') }}", "is unsafe|undefined"),
        ("{% set _ = messages.append(1) %}", "is not safely callable|unsafe"),
        ("{{ 'a' * 1000000000000 }}", r"\* is for numbers here"),
        ("{{ 9 ** 9 ** 9 }}", r"\*\* is for numbers here"),
        ("{% for i in range(99999999) %}x{% endfor %}", "Range too big"),
        (
            "{% for i in range(9999) %}{% for j in range(9999) %}xxxxxxxxxx{% endfor %}{% endfor %}",
            "more than 16,777,216",
        ),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "Expected an expression"),
        ("{% include '/etc/passwd' %}", "no loader for this environment"),
    ],
)
def test_what_a_template_must_not_do(
    template: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = saved_tokenizer(tmp_path, chat_template=template)
    with pytest.raises(ConfigError, match=f"--chat: got .*; its template cannot be rendered .*({message})"):
        render_chat(path, MESSAGES)
    assert not (tmp_path / "gone").exists()


def test_what_is_no_template(tmp_path: Path) -> None:
    path = saved_tokenizer(tmp_path)
    for where in (path, "byte"):
        with pytest.raises(
            ConfigError, match=r"--chat: got .*; its tokenizer has no chat template \(chat_template.jinja"
        ):
            render_chat(where, MESSAGES)
    (tmp_path / "chat_template.jinja").symlink_to("/etc/passwd")
    with pytest.raises(ConfigError, match=r"chat_template.jinja; it cannot be read \(is a link that leads out"):
        render_chat(path, MESSAGES)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer_config.json; it is damaged"):
        render_chat(path, MESSAGES)

"""The chat template beside a tokenizer: a stranger's program, run in jinja's sandbox and nowhere else."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2.exceptions import SecurityError, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from stackwise_core.errors import ConfigError, Fault, shortened
from stackwise_core.files import inside
from stackwise_core.strict import parse_object, read_bounded, told

TEMPLATE, CONFIG = "chat_template.jinja", "tokenizer_config.json"
_MOST_BYTES = 2**22
_MOST_CHARACTERS = 2**24
"""Of a rendered conversation."""

Message = dict[str, str]
"""A `role` (user, assistant, system) and its `content`."""


def render_chat(tokenizer_path: str, messages: list[Message]) -> str:
    """Return a conversation as the model was trained on it, up to where its answer begins.

    Args:
        tokenizer_path: of the tokenizer.json; the template lies beside it, as transformers writes it: in
            `chat_template.jinja`, or in `tokenizer_config.json`.
        messages: the conversation so far.

    Raises:
        ConfigError: there is no template, or it cannot be rendered.
    """
    path = Path(tokenizer_path)
    settings = {} if tokenizer_path == "byte" else _settings(path)
    template = "" if tokenizer_path == "byte" else _template(path, settings)
    if not template:
        allowed = f"its tokenizer has no chat template ({TEMPLATE}, or chat_template in {CONFIG}); leave it out"
        raise ConfigError([Fault("--chat", repr(tokenizer_path), allowed)])
    named = {key: _text(settings.get(key)) for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
    try:
        return _rendered(template, messages, {key: text for key, text in named.items() if text})
    except Exception as error:  # a stranger's program may fail in any way
        allowed = f"its template cannot be rendered ({shortened(str(error) or type(error).__name__)})"
        raise ConfigError([Fault("--chat", repr(tokenizer_path), allowed)]) from None


class _Sandbox(ImmutableSandboxedEnvironment):
    """No attribute leads out of it, nothing that it is given changes, and no product makes a text of gigabytes."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" or not (isinstance(left, (int, float)) and isinstance(right, (int, float))):
            raise SecurityError(f"{operator} is for numbers here, and no power")
        return super().call_binop(context, operator, left, right)


def _rendered(template: str, messages: list[Message], named: dict[str, str]) -> str:
    def raise_exception(message: object) -> None:
        raise TemplateError(str(message))

    # As transformers sets it up, so that a template means the same.
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])

    def strftime_now(form: object) -> str:
        return datetime.now().strftime(str(form))

    functions: dict[str, Any] = {"raise_exception": raise_exception, "strftime_now": strftime_now}
    parts, size = list[str](), 0
    program = environment.from_string(template, globals=functions)
    for part in program.generate(messages=messages, add_generation_prompt=True, **named):
        parts.append(part)
        size += len(part)
        if size > _MOST_CHARACTERS:
            raise ValueError(f"it makes more than {_MOST_CHARACTERS:,} characters")
    return "".join(parts)


def _settings(tokenizer: Path) -> dict[str, Any]:
    """Return what lies beside a tokenizer.json in tokenizer_config.json; empty if there is none."""
    data = _beside(tokenizer, CONFIG)
    if data is None:
        return {}
    try:
        return parse_object(data)
    except ValueError as error:
        raise ConfigError(
            [Fault("--chat", str(tokenizer.with_name(CONFIG)), f"it is damaged ({told(error)})")]
        ) from None


def _template(tokenizer: Path, settings: dict[str, Any]) -> str:
    data = _beside(tokenizer, TEMPLATE)
    if data is not None:
        return data.decode(errors="replace")
    found = settings.get("chat_template")
    if isinstance(found, list):  # several with names
        found = next(
            (each.get("template") for each in found if isinstance(each, dict) and each.get("name") == "default"), ""
        )
    return found if isinstance(found, str) else ""


def _beside(tokenizer: Path, name: str) -> bytes | None:
    path = tokenizer.with_name(name)
    try:
        return read_bounded(inside(path.parent, name), _MOST_BYTES)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError([Fault("--chat", str(path), f"it cannot be read ({told(error)})")]) from None


def _text(token: Any) -> str:
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else ""

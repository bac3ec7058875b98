"""What a configuration says of its corpus: the tokenizer, and notes on how documents are read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from stackwise_core.config.schema import ConfigSchema
from stackwise_core.data.files import holds_tokens
from stackwise_core.data.mixture import sources_of
from stackwise_core.data.tokenizer import Tokenizer, load_tokenizer
from stackwise_core.errors import ConfigError


def tokenizer_of(config: ConfigSchema) -> Tokenizer:
    """Return the tokenizer of a configuration; raises ConfigError if it cannot be had."""
    return load_tokenizer(config.data.tokenizer, config.data.end_token)


def corpus_notes(config: ConfigSchema) -> Iterator[str]:
    """Yield a line if nothing tells documents apart."""
    name = config.data.tokenizer
    has_text = not all(holds_tokens(source.name) for source in sources_of(config.data.source))
    if not has_text or name == "byte" or config.training.progressive.training_objective == "custom":
        return
    with contextlib.suppress(ConfigError):  # the file may be gone since
        if tokenizer_of(config).end_token is None:
            what = "has no end token of a known name, so documents run into one another"
            yield f"data.tokenizer: {name} {what}; name one with data.end_token"

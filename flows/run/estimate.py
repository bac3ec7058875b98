"""How many sequences a corpus gives, where packing it to count them would take long."""

from __future__ import annotations

from stackwise_core.config import StackWiseConfig
from stackwise_core.config.corpus import tokenizer_of
from stackwise_core.data.files import holds_tokens
from stackwise_core.data.packing import sample_sizes
from stackwise_core.data.sources import beginning_of
from stackwise_core.stages.resolve import reads_examples

_READ = 1 << 20
"""Bytes of the corpus that are tokenised for an estimate."""


def estimate_sequences(config: StackWiseConfig, corpus_bytes: int) -> tuple[int, int]:
    """Return about how many training and validation sequences a corpus of some size gives, from its beginning.

    `corpus_bytes` are the bytes of its texts, or the number of its tokens. Raises CorpusError if it cannot be read.
    """
    data = config.data
    sequences = corpus_bytes * _sequences_per_byte(config)
    validation = max(1, round(sequences * data.validation_fraction))
    train = max(1, round(sequences) - validation)
    most = data.max_sequences
    if most and most < train:
        return (most, validation) if data.sample == "first" else sample_sizes(train, validation, most)
    return train, validation


def _sequences_per_byte(config: StackWiseConfig) -> float:
    if holds_tokens(config.data.source):
        return 1 / config.data.seq_len
    texts = list(beginning_of(config.data.source, examples=reads_examples(config), n_bytes=_READ))
    n_bytes = max(1, sum(map(len, texts)))
    if reads_examples(config):
        return sum(text.count(b"\n") for text in texts) / n_bytes
    # A long text, of which this is the beginning, has no end here.
    n_tokens = len(tokenizer_of(config).encode_all(texts, [len(text) < _READ for text in texts]))
    return n_tokens / n_bytes / config.data.seq_len

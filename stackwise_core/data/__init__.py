"""Corpora, tokens, packed sequences, their order and their masks. Knows neither torch nor a configuration."""

"""Corpora, tokens, packed sequences, their order and their masks. Needs neither torch nor a configuration."""

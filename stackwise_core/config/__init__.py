"""The configuration: its schema, its rules, and YAML."""

from stackwise_core.config.config import StackWiseConfig

__all__ = ["StackWiseConfig"]

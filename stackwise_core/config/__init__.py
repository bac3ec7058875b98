"""The configuration: one schema, every rule once."""

from stackwise_core.config.schema import StackWiseConfig

__all__ = ["StackWiseConfig"]

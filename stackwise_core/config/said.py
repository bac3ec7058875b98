"""Which keys of a configuration somebody set: a key that was left at its default says nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from stackwise_core.config.schema import Section


def said_keys(section: Section, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys that were set, in a file or by assignment."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from said_keys(value, f"{prefix}{name}.")
        elif name in section.model_fields_set:
            yield f"{prefix}{name}"


def keep_said(section: Section, said: Collection[str], prefix: str = "") -> None:
    """Have only these keys count as set: a file that holds every key would say all of them."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            keep_said(value, said, f"{prefix}{name}.")
        elif f"{prefix}{name}" not in said:
            section.model_fields_set.discard(name)

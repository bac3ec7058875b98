"""Every key of a configuration with its value, its default and its description."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel


class Key(NamedTuple):
    """One key; values are those that a YAML or JSON file holds."""

    name: str
    """Such as training.batch_size."""
    value: Any
    default: Any
    description: str
    choices: tuple[str, ...] = ()
    """The words of which it is one, or of which its list is made, where only some are allowed."""

    @property
    def changed(self) -> bool:
        """Whether the value is not the default."""
        return bool(self.value != self.default)


def keys_of(config: BaseModel) -> list[Key]:
    """Return all keys in the order of the schema."""
    values, defaults = config.model_dump(mode="json"), type(config)().model_dump(mode="json")
    return list(_keys(type(config), values, defaults, config.model_dump(mode="json", exclude_defaults=True), ""))


def _keys(
    section: type[BaseModel], values: dict[str, Any], defaults: dict[str, Any], said: dict[str, Any], prefix: str
) -> Iterator[Key]:
    """Yield the keys of a section; of what is in a list, `said` leaves out keys at their default."""
    schemas = section.model_json_schema(by_alias=False)["properties"]
    for attribute, field in section.model_fields.items():
        name, inner = field.alias or attribute, field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _keys(inner, values[name], defaults[name], said.get(name, {}), f"{prefix}{name}.")
        else:
            about, choices = " ".join((field.description or "").split()), _choices(schemas[attribute])
            yield Key(f"{prefix}{name}", said.get(name, values[name]), defaults[name], about, choices)


def _choices(schema: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the words that the JSON schema of a key, or of an entry of its list, allows."""
    return tuple({**schema, **schema.get("items", {})}.get("enum", ()))

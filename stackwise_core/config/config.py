"""`StackWiseConfig`: the schema, the rules between fields, and YAML.

Importing it imports neither torch nor prefect, so the command line can validate a configuration and find
finished work without waiting for either.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from stackwise_core.config.arguments import check_type
from stackwise_core.config.rules import rule_faults
from stackwise_core.config.schema import GROWTH, ConfigSchema
from stackwise_core.config.yaml import apply_overrides, dump_yaml, load_yaml
from stackwise_core.errors import ConfigError, Fault
from stackwise_core.files import write_file


class StackWiseConfig(ConfigSchema):
    """One run of StackWise: everything that can be chosen.

    `StackWiseConfig()` has every key at its default; keys are attributes: `config.training.batch_size = 8`.
    """

    def validate(self, *, corpus: bool = True) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Check the rules between fields, and types and ranges again, since lists and mappings can be edited in place.

        Args:
            corpus: whether `data` is used; callers of the library may supply their own tokens.

        Raises:
            ConfigError: lists every fault with its path, its value and what is allowed.
        """
        if faults := _all_faults(type(self), self.model_dump(warnings=False), corpus=corpus):
            raise ConfigError(faults)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> StackWiseConfig:
        """Build a configuration from nested mappings and validate it; a ConfigError lists every fault."""
        check_type("configuration", values, dict, "nested mappings are expected, as {'data': {'seq_len': 64}}")
        if faults := _all_faults(cls, values):
            raise ConfigError(faults)
        return cls.model_validate(values)

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: dict[str, Any] | None = None) -> StackWiseConfig:
        """Read a YAML file, apply overrides such as {"training.batch_size": 8}, and validate; raises ConfigError."""
        values = load_yaml(Path(path))
        apply_overrides(values, overrides or {})
        return cls.from_dict(values)

    @classmethod
    def read_unchecked(cls, path: Path, data: bytes | None = None) -> StackWiseConfig:
        """Read a file that `to_yaml` wrote, or its bytes, checking types and ranges but no rules; raises ValueError.

        A key that an older version did not know has the value that it used.
        """
        values = load_yaml(path, path.read_bytes() if data is None else data)
        if isinstance(section := values.get("data"), dict):
            section.setdefault("sample", "first")
        return cls.model_validate(values)

    def to_yaml(self, path: str | Path | None = None) -> str:
        """Return the whole configuration as YAML, and write it to `path` if given.

        Raises ConfigError if it holds a function object, which a file cannot record.
        """
        growth = self.training.progressive
        functions = {
            f"{GROWTH}.time_mapping": growth.time_mapping,
            f"{GROWTH}.stack_time_mapping": growth.stack_time_mapping,
            "training.custom_loss": self.training.custom_loss,
        }
        if held := [key for key, value in functions.items() if callable(value)]:
            raise ConfigError([Fault(key, "a callable", "a file needs 'module:name' or a list") for key in held])
        text = dump_yaml(self.model_dump())
        if path is not None:
            write_file(Path(path), text.encode())
        return text


def _all_faults(schema: type[ConfigSchema], values: dict[str, Any], *, corpus: bool = True) -> list[Fault]:
    """Return the faults of the schema, and those of the rules that do not concern a value faulty by itself."""
    try:
        return rule_faults(schema.model_validate(values), corpus=corpus)
    except ValidationError as error:
        faults = [_schema_fault(schema, item) for item in error.errors(include_url=False)]
        remainder = _without_faulty(values, error)
    with contextlib.suppress(ValidationError):  # without its faulty keys it may still be incomplete
        broken = {fault.path for fault in faults}
        for fault in rule_faults(schema.model_validate(remainder), corpus=corpus):
            if not any(path in (fault.path, *fault.allowed.split()) for path in broken):
                faults.append(fault)
    return faults


def _schema_fault(schema: type[BaseModel], item: ErrorDetails) -> Fault:
    path = ".".join(map(str, item["loc"]))
    if item["type"] == "extra_forbidden":
        return Fault(path, repr(item["input"]), _unknown_key(schema, item["loc"]))
    message = item["msg"].removeprefix("Value error, ")
    return Fault(path, repr(item["input"]), message[0].lower() + message[1:])


def _unknown_key(schema: type[BaseModel], location: tuple[int | str, ...]) -> str:
    section = schema
    for part in location[:-1]:
        field = section.model_fields.get(str(part))
        annotation = field.annotation if field else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return "there is no such key"
        section = annotation
    keys = [field.alias or name for name, field in section.model_fields.items()]
    close = difflib.get_close_matches(str(location[-1]), keys, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(keys)}"
    return f"there is no such key; {hint}"


def _without_faulty(values: dict[str, Any], error: ValidationError) -> dict[str, Any]:
    """Return a copy of the values without those that pydantic rejected."""
    remainder = copy.deepcopy(values)
    # Last first, so that removing a list item does not shift those still to be removed.
    for item in sorted(error.errors(include_url=False), key=_sortable, reverse=True):
        *parents, last = item["loc"][:-1] if item["type"] == "missing" else item["loc"]
        with contextlib.suppress(KeyError, IndexError, TypeError):  # missing, or below a value that is not a section
            target: Any = remainder
            for part in parents:
                target = target[part]
            del target[last]
    return remainder


def _sortable(item: ErrorDetails) -> list[str]:
    return [f"{part:09d}" if isinstance(part, int) else part for part in item["loc"]]

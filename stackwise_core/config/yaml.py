"""YAML without duplicate keys, with 1e-3 as a number, and with errors that name file and line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from stackwise_core.errors import ConfigError, Fault

_MOST_BYTES = 2**24
"""Of a configuration."""
_COMMENT = re.compile(r"(^|\s)#")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which by itself keeps the last of two equal keys and reads 1e-3 as text."""


class _RecordLoader(_Loader):
    """Reads what `dump_yaml` wrote: an alias, by which a few lines become billions of values, is not among it."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.constructor.ConstructorError(None, None, "an alias has no place in a record", mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, which by itself leaves the string 1e3 unquoted."""


def _mapping_without_duplicates(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys: set[tuple[str, str]] = set()
    for key_node, _ in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key_node.start_mark)
        key = (key_node.tag, key_node.value)
        if key in keys:
            problem = f"the key {key_node.value!r} stands here twice"
            raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
        keys.add(key)
    return loader.construct_mapping(node, deep=True)


_BASE_8 = re.compile(r"[-+]?0[0-9_]+")


def _plain_integer(loader: _Loader, node: yaml.ScalarNode) -> int | str:
    """Return an integer; YAML 1.1 reads 0100 as 64 and 1:30 as 90, which nobody means who writes a configuration."""
    if ":" in node.value:
        return node.value
    if _BASE_8.fullmatch(node.value) and node.value.strip("-+0_"):
        what = "with a leading 0 is a number to the base 8 in YAML"
        remedy = f"write {node.value.replace('0', '', 1)}, or quote it if it is text"
        raise yaml.constructor.ConstructorError(None, None, f"{node.value} {what}; {remedy}", node.start_mark)
    return loader.construct_yaml_int(node)


def _plain_float(loader: _Loader, node: yaml.ScalarNode) -> float | str:
    return node.value if ":" in node.value else loader.construct_yaml_float(node)


# No key takes a date, and names and paths may look like one.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
_Loader.add_constructor("tag:yaml.org,2002:int", _plain_integer)
_Loader.add_constructor("tag:yaml.org,2002:float", _plain_float)
_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_duplicates)
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
        list("-+0123456789"),
    )


def dump_yaml(values: dict[str, Any]) -> str:
    """Return YAML that `load_yaml` reads back as the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)


def parse_value(text: str) -> Any:
    """Return the YAML value of a command-line string: 8, true, 1e-3, [1, 2], word."""
    if _COMMENT.search(text) and not text.lstrip().startswith(("'", '"', "[", "{")):
        return text  # a path, since a comment would have no reader here
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text


def load_yaml(path: Path, record: bytes | None = None) -> dict[str, Any]:
    """Return the mapping in a file, empty for an empty file; raises ConfigError if it is not readable as one.

    With `record`, what a program wrote into the file, read already.
    """
    try:
        if record is None:
            values = yaml.load(_read(path), Loader=_Loader)
        else:
            values = yaml.load(record.decode(), Loader=_RecordLoader)
    except FileNotFoundError:
        raise ConfigError([Fault(str(path), "no such file", "give the path of a YAML configuration")]) from None
    except IsADirectoryError:
        raise ConfigError([Fault(str(path), "a folder", "give the path of a YAML configuration")]) from None
    except (OSError, UnicodeError) as error:
        raise ConfigError([Fault(str(path), str(error), "give a readable YAML configuration")]) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError of malformed dates and numbers
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or "not YAML"
        raise ConfigError([Fault(where, str(problem), "mend the YAML on this line")]) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError([Fault(str(path), type(values).__name__, "a mapping with run, data, model, ... is expected")])
    # `training:` with all its keys commented out is an empty section.
    return {name: {} if section is None else section for name, section in values.items()}


def _read(path: Path) -> str:
    with path.open("rb") as file:
        text = file.read(_MOST_BYTES + 1)
    if len(text) > _MOST_BYTES:  # or endless, as a device
        raise OSError(f"longer than {_MOST_BYTES:,} bytes")
    return text.decode("utf-8")


def apply_overrides(values: dict[str, Any], overrides: dict[str, Any]) -> None:
    """Set dotted keys in nested mappings, in place."""
    for dotted, value in overrides.items():
        *parents, last = dotted.split(".")
        target = values
        for name in parents:
            child = target.setdefault(name, {})
            if not isinstance(child, dict):
                raise ConfigError([Fault(dotted, repr(value), f"{name} is a value, not a section")])
            target = child
        target[last] = value

"""Small JSON records that end in the hash of what stands before it, so that a changed bit is noticed."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from stackwise_core.strict import parse_object

CHANGED = "it is not what was written"
"""What is wrong with a file whose hash is another."""
_MARK = ', "seal": "'
_IS_SEALED = re.compile(rb'"[0-9a-f]{64}"}\Z')
"""Says so even where the name of the seal is damaged."""


def hash_of(data: bytes) -> str:
    """Return the sha256 of some bytes: 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def sealed(values: dict[str, Any]) -> str:
    """Return values, at least one, as JSON whose last key, `seal`, is the hash of all before it."""
    body = json.dumps(values).removesuffix("}")
    return f'{body}{_MARK}{hash_of(body.encode())}"}}'


def unsealed(data: bytes) -> dict[str, Any]:
    """Return the values of a record, without its seal; an older version wrote records that have none.

    Raises:
        ValueError: it is no JSON object, or is not what was sealed.
    """
    values = parse_object(data)
    if "seal" in values or _IS_SEALED.search(data):
        body, _, seal = data.rpartition(_MARK.encode())
        if seal != f'{hash_of(body)}"}}'.encode():
            raise ValueError(CHANGED)
        del values["seal"]
    return values


def as_sealed(data: bytes) -> bytes:
    """Return the bytes of a record; raises as `unsealed`."""
    unsealed(data)
    return data

"""The oldest torch that is allowed, 2.11: GPU images have it, and none of them can install another."""

from __future__ import annotations

import re

from support.disk import ROOT
from support.older_torch import LATER, MORE

GUARDED = {
    "stackwise_core/training/distributed.py": {"forward_sync_buffers", "set_reduce_scatter_unused_params"},
    "benchmarks/large_vocabulary.py": {"LinearCrossEntropyOptions", "linear_cross_entropy"},
}
"""Where a later name is asked for before it is used; tests take it away."""


def test_no_name_of_a_later_torch_is_used_unasked() -> None:
    later = {*LATER, *MORE.split()}
    found = {
        str(path.relative_to(ROOT)): names
        for folder in ("stackwise_core", "storage", "flows", "benchmarks")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if (names := later & set(re.findall(r"\w+", path.read_text())))
    }
    assert found == GUARDED

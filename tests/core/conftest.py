"""Fixtures of the tests of the core."""

from __future__ import annotations

from collections.abc import Generator

import pytest
import torch


@pytest.fixture(scope="module")
def one_thread_per_module() -> Generator[None]:
    """Let torch use one thread throughout a module: Hypothesis refuses fixtures of a single test."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

"""The device and the threads a configuration asks for."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import warnings
from collections.abc import Generator
from functools import cache
from typing import Any

import torch

from stackwise_core.config.rules import device_fault
from stackwise_core.config.schema import HardwareConfig
from stackwise_core.errors import ConfigError, Fault

BACKEND = "inductor"
"""What torch.compile makes of a block."""
_DETERMINISTIC: Any = torch.utils.deterministic  # a module whose only attribute is made when it is imported
_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_WORKSPACES = (":4096:8", ":16:8")
"""With one of these cuBLAS gives the same bits every time (cuBLAS documentation, "Results reproducibility")."""


def use_hardware(hardware: HardwareConfig) -> torch.device:
    """Set torch's threads and return the device; a rank of several processes gets its share of both.

    With CUDA, also make torch deterministic or not, and let it round to TF32 or not, as configured.
    """
    rank = os.environ.get("LOCAL_RANK") if hardware.ranks > 1 else None  # set by torchrun
    torch.set_num_threads(n_threads(hardware) if rank is None else threads_of_rank(hardware))
    n_devices = torch.cuda.device_count()
    device = torch.device("cuda" if hardware.device == "auto" and n_devices else hardware.device.replace("auto", "cpu"))
    if device.type == "cpu":
        return device
    if fault := device_fault(hardware, n_devices):
        raise ConfigError([fault])
    _use_determinism(hardware.deterministic)
    torch.backends.cuda.matmul.allow_tf32 = hardware.tf32
    return device if rank is None else torch.device("cuda", int(rank))


def _use_determinism(deterministic: bool) -> None:
    """Have torch use kernels that give the same bits every time, or any; cuBLAS reads its variable at its first use."""
    if deterministic and os.environ.setdefault(_WORKSPACE, _WORKSPACES[0]) not in _WORKSPACES:
        allowed = f"cuBLAS is not deterministic with {_WORKSPACE}={os.environ[_WORKSPACE]}; unset it, or use false"
        raise ConfigError([Fault("hardware.deterministic", "true", allowed)])
    torch.use_deterministic_algorithms(deterministic)
    _DETERMINISTIC.fill_uninitialized_memory = False  # everything that is read here was written before


@contextlib.contextmanager
def torch_restored() -> Generator[None]:
    """At the end, make torch as deterministic and as exact as it was: a library's is not the whole program's."""
    tf32 = torch.backends.cuda.matmul.allow_tf32
    fills, mode = _DETERMINISTIC.fill_uninitialized_memory, torch.get_deterministic_debug_mode()
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.set_deterministic_debug_mode(mode)
        _DETERMINISTIC.fill_uninitialized_memory = fills


def n_threads(hardware: HardwareConfig) -> int:
    """Return the CPU threads: as configured, else as many as this process may use."""
    return hardware.threads or len(os.sched_getaffinity(0))


def threads_of_rank(hardware: HardwareConfig) -> int:
    """Return the CPU threads of each of the processes that train together: they divide those of one process."""
    return max(1, n_threads(hardware) // hardware.processes)


def compiler_fault(device: torch.device) -> str:
    """Return why blocks cannot be compiled here, or ''.

    It is tried out, which takes some seconds the first time: C++ compiler, headers and triton can all be missing.
    """
    return _fault_of(device, BACKEND)


@cache
def _fault_of(device: torch.device, backend: str) -> str:
    try:
        with warnings.catch_warnings(action="ignore"):  # of what it imports, which may be errors in this program
            torch.compile(torch.neg, backend=backend)(torch.ones(8, device=device))
    except Exception as error:  # whatever is missing: training goes on without
        lines = [line for line in str(error).splitlines() if line and not line.startswith("backend=")]
        return f"hardware.compile: torch.compile does not work here, so blocks run as they are ({lines[0]})"
    return ""


@contextlib.contextmanager
def many_kinds_of_code() -> Generator[None]:
    """Let one function be compiled for as many kinds of block, batch and gradient as a rack has.

    From the ninth on torch would, with a warning, run them as they are.
    """
    import torch._dynamo.config  # takes seconds

    with torch._dynamo.config.patch(recompile_limit=256):
        yield


def peak_bytes(device: torch.device) -> int:
    """Return the most bytes held so far: of a CUDA device by torch since it was last reset, else by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

"""The device and the threads a configuration asks for."""

from __future__ import annotations

import os

import torch

from stackwise_core.config.schema import HardwareConfig
from stackwise_core.errors import ConfigError, Fault


def use_hardware(hardware: HardwareConfig) -> torch.device:
    """Set torch's threads and return the device; a rank of several processes gets its share of both."""
    rank = os.environ.get("LOCAL_RANK") if hardware.processes > 1 else None  # set by torchrun
    torch.set_num_threads(n_threads(hardware) if rank is None else threads_of_rank(hardware))
    n_devices = torch.cuda.device_count()
    device = torch.device("cuda" if hardware.device == "auto" and n_devices else hardware.device.replace("auto", "cpu"))
    if device.type == "cpu":
        return device
    there = f"this machine has {n_devices} CUDA devices"
    if (device.index or 0) >= n_devices:
        raise ConfigError([Fault("hardware.device", repr(hardware.device), f"{there}; use auto or cpu")])
    if hardware.processes > n_devices:
        allowed = f"{there}, and each process needs its own; lower it, or set hardware.device: cpu"
        raise ConfigError([Fault("hardware.processes", str(hardware.processes), allowed)])
    return device if rank is None else torch.device("cuda", int(rank))


def n_threads(hardware: HardwareConfig) -> int:
    """Return the CPU threads: as configured, else as many as this process may use."""
    return hardware.threads or len(os.sched_getaffinity(0))


def threads_of_rank(hardware: HardwareConfig) -> int:
    """Return the CPU threads of each of the processes that train together: they divide those of one process."""
    return max(1, n_threads(hardware) // hardware.processes)

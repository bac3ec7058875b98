"""The device and the threads a configuration asks for."""

from __future__ import annotations

import os

import torch

from stackwise_core.config import HardwareConfig
from stackwise_core.errors import ConfigError, Fault


def use_hardware(hardware: HardwareConfig) -> torch.device:
    """Set torch's threads and return the device.

    Raises:
        ConfigError: a CUDA device is asked for that is not there.
    """
    torch.set_num_threads(n_threads(hardware))
    if hardware.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(hardware.device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        there = f"this machine has {torch.cuda.device_count()} CUDA devices; use auto or cpu"
        raise ConfigError([Fault("hardware.device", repr(hardware.device), there)])
    return device


def n_threads(hardware: HardwareConfig) -> int:
    """Return the CPU threads: as configured, else as many as this process may use."""
    return hardware.threads or len(os.sched_getaffinity(0))

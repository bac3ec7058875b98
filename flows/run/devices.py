"""What this machine has of what a run asks for: devices, memory, packages. Imports no torch, which takes seconds."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import socket
from collections.abc import Iterator
from importlib.metadata import version
from typing import NamedTuple

from flows.run.trackers import tracker_faults
from stackwise_core.config import StackWiseConfig
from stackwise_core.config.rules import device_fault
from stackwise_core.config.schema import HardwareConfig
from stackwise_core.config.unused import is_used
from stackwise_core.errors import ConfigError, Fault
from stackwise_core.stages.memory import Setting
from stackwise_core.stages.plan import RunPlan

ADVICE = (
    "precision full computes in float32; on a GPU training.progressive.new_stack_precision=bfloat16 is several times "
    "as fast, and hardware.tf32=true somewhat faster"
)
"""What to say where there is a GPU."""


class Gpu(NamedTuple):
    """A CUDA device."""

    name: str
    n_bytes: int
    """Of its memory; 0 if it does not say."""


def gpus() -> list[Gpu]:
    """Ask the CUDA driver (docs.nvidia.com/cuda/cuda-driver-api) for its devices."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count, found = ctypes.c_int(0), list[Gpu]()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):  # 0 is success
        return []
    for index in range(count.value):
        device, name, n_bytes = ctypes.c_int(), ctypes.create_string_buffer(100), ctypes.c_size_t(0)
        if not cuda.cuDeviceGet(ctypes.byref(device), index):
            cuda.cuDeviceGetName(name, len(name), device)
            cuda.cuDeviceTotalMem_v2(ctypes.byref(n_bytes), device)
            found.append(Gpu(name.value.decode(), n_bytes.value))
    return found


RUNNER = "cache.task_runner"
_PACKAGES = {"dask": "prefect_dask", "ray": "prefect_ray"}


SHARED = "nodes share the work folders of artifacts, which an object store does not hold; give a folder that all have"


def check_machine(config: StackWiseConfig, *, remote: bool) -> None:
    """Check that this machine has the devices, the packages and the address that a run needs.

    `remote` says that its artifacts are in an object store.

    Raises:
        ConfigError: with all that is missing, and what to do about it.
    """
    asks = config.hardware.device != "cpu" and not version("torch").endswith("+cpu")
    n_devices = len(gpus()) if asks else 0
    faults = [device_fault(config.hardware, n_devices), _runner_fault(config), *tracker_faults(config.tracking.to)]
    if config.hardware.nodes > 1 and remote:
        faults.append(Fault("hardware.nodes", str(config.hardware.nodes), SHARED))
    if found := [fault for fault in faults if fault]:
        raise ConfigError(found)
    if config.hardware.nodes > 1:
        address_of(config.hardware)


def address_of(hardware: HardwareConfig) -> str:
    """Return the address of this node on its way to the rendezvous, where other nodes reach it too.

    Raises:
        ConfigError: the rendezvous has no address.
    """
    host, _, port = hardware.rendezvous.rpartition(":")
    try:
        kind, _, _, _, there = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
        with socket.socket(kind, socket.SOCK_DGRAM) as probe:  # connecting sends nothing
            probe.connect(there)
            return probe.getsockname()[0]
    except (OSError, OverflowError) as error:
        fault = Fault("hardware.rendezvous", repr(hardware.rendezvous), f"no address was found for it ({error})")
        raise ConfigError([fault]) from None


def _runner_fault(config: StackWiseConfig) -> Fault | None:
    """Return what to install, if a task runner would be used but is not installed."""
    runner = config.cache.task_runner
    package = _PACKAGES.get(runner) if is_used(config, RUNNER) else None
    if package is None or importlib.util.find_spec(package) is not None:
        return None
    remedy = f"{package.replace('_', '-')} is not installed: pip install 'stackwise[{runner}]'"
    return Fault(RUNNER, repr(runner), remedy)


def device_memory(hardware: HardwareConfig) -> tuple[bool, int]:
    """Return whether the device is a CUDA device here, and the bytes that a process has of it, or of this machine."""
    asked = hardware.device
    there = [] if asked == "cpu" else gpus()
    if asked != "cpu" and (asked != "auto" or (there and not version("torch").endswith("+cpu"))):
        index = int(asked.partition(":")[2] or 0)
        return True, there[index].n_bytes if index < len(there) else 0
    return False, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // hardware.processes


def settings_of(config: StackWiseConfig, plan: RunPlan, *, cuda: bool, there: int) -> Iterator[Setting]:
    """Yield what the memory of each stage of a plan depends on; see `device_memory`."""
    for below, stage in zip([None, *plan.stages], plan.stages, strict=False):
        ratio = stage.mask.mean_ratio if stage.mask else None
        cached = below is None or below.activations is not None or not stage.spec.anatomy.boundary
        yield Setting.of(config, stage.shape, stage.spec, loss_fraction=ratio, cached=cached, cuda=cuda, there=there)

"""The GPUs of this machine, asked of the CUDA driver: importing torch takes seconds."""

from __future__ import annotations

import ctypes

ADVICE = (
    "precision full computes in float32; on a GPU training.progressive.new_stack_precision=bfloat16 is several times "
    "as fast, and hardware.tf32=true somewhat faster"
)
"""What to say where there is a GPU."""


def gpu_names() -> list[str]:
    """Return the name of every device (docs.nvidia.com/cuda/cuda-driver-api)."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count, names = ctypes.c_int(0), list[str]()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):  # 0 is success
        return []
    for index in range(count.value):
        device, name = ctypes.c_int(), ctypes.create_string_buffer(100)
        if not cuda.cuDeviceGet(ctypes.byref(device), index):
            cuda.cuDeviceGetName(name, len(name), device)
            names.append(name.value.decode())
    return names

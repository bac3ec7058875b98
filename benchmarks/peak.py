"""The peak of the bytes that tensors hold.

On a CPU, torch's profiler reports every allocation and release: the count is exact and includes buffers inside
operators, but not memory of numpy, such as tokens. On CUDA it is `torch.cuda.max_memory_allocated`.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Generator, Iterable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


@contextlib.contextmanager
def peak_bytes(device: torch.device) -> Generator[list[int]]:
    """Yield a list that holds one number after the block: the peak bytes of its tensors.

    Tensors that were allocated before the block and are released in it do not count.
    """
    peak: list[int] = []
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.append(torch.cuda.max_memory_allocated(device) - before)
        return
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        yield peak
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    allocations = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: float(e["ts"]))
    peak.append(peak_of((e["args"]["Addr"], e["args"]["Bytes"]) for e in allocations))


def peak_of(allocations: Iterable[tuple[int, int]]) -> int:
    """Return the peak of the bytes held.

    Args:
        allocations: (address, bytes) in order of time; negative bytes release the address.
    """
    held: dict[int, int] = {}
    now = peak = 0
    for address, n_bytes in allocations:
        # An unknown address was allocated before the block.
        now += n_bytes - held.pop(address, 0) if n_bytes > 0 else -held.pop(address, 0)
        if n_bytes > 0:
            held[address] = n_bytes
        peak = max(peak, now)
    return peak

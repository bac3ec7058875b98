"""Reading batches of an activation store, compared with np.memmap (the limit) and other formats.

Batches of 32 rows of 256 x 512 bfloat16 from 1 GiB, at random or in order; a check ensures that every format holds the
same bits. A round is eight batches. Warm: all pages are in memory, and a batch was just read. Cold: the pages are
evicted before every round. `take` is np.take on a memmap, `take(out=)` into a reused page-aligned buffer, as in our
reader. Our checksums are verified when a chunk is first read, so in the cold rounds but not in the warm ones; with
"always", at every read. One thread unless the case says otherwise.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from benchmarks import store_peers as peers
from benchmarks.harness import Measure, interleaved, ratios
from benchmarks.store_peers import BATCH, D_MODEL, ROW_BYTES, SEQ_LEN, ReadBatch
from storage.activations.reader import StoreReader, empty_aligned
from storage.activations.shard import bytes_of

GOALS: dict[str, float | None] = {
    "tensorstore": 4.0,
    "safetensors": 3.0,
    "h5py": 6.0,
    "HF datasets": 30.0,
    "HF datasets, flat": None,
    "zarr-python": 100.0,
}
BATCHES_AT_ONCE = 8
"""Of a candidate in a round: an epoch reads one after the other."""
COLD_BATCHES, COLD_THREADS = 8, 16


def measure(quick: bool) -> list[Measure]:
    torch.set_num_threads(1)
    n_rows, rounds = (512, 3) if quick else (4096, 16)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        folder = Path(name)
        data = list(peers.blocks(n_rows))
        for format_name, write in peers.WRITERS.items():
            write(folder / format_name, data)
        files = peers.write_ours(folder / "ours", data)
        _compare(folder, files, data)
        del data
        warm = [
            *_warm("shuffled", folder, files, n_rows, rounds, _shuffled),
            *_warm("in order", folder, files, n_rows, rounds, _in_order),
        ]
        return [*warm, *_both_cores(folder, files, n_rows, rounds), *_cold(folder, files, n_rows, max(3, rounds // 2))]


def _shuffled(n_rows: int) -> Callable[[], np.ndarray]:
    generator = np.random.default_rng(1)
    return lambda: generator.integers(0, n_rows, BATCH)


def _in_order(n_rows: int) -> Callable[[], np.ndarray]:
    state = {"first": 0}

    def following() -> np.ndarray:
        first = state["first"]
        state["first"] = (first + BATCH) % (n_rows - BATCH)
        return np.arange(first, first + BATCH)

    return following


def _ours(folder: Path, files: dict[str, tuple[int, str]], check: str) -> ReadBatch:
    reader = StoreReader(folder / "ours", files, check)  # type: ignore[arg-type]
    out = empty_aligned((BATCH, SEQ_LEN, D_MODEL), torch.bfloat16)
    data = bytes_of(out)

    def read(ix: np.ndarray) -> torch.Tensor:
        reader.read_bytes("train", ix, data)
        return out

    return read


def _candidates(folder: Path, files: dict[str, tuple[int, str]]) -> dict[str, ReadBatch]:
    take, take_out = peers.read_memmap(folder / "memmap")
    found = {"take": take, "take(out=)": take_out}
    found |= {"ours": _ours(folder, files, "first_touch"), "ours, always": _ours(folder, files, "always")}
    return found | {name: read(folder / name) for name, read in peers.READERS.items()}


def _compare(folder: Path, files: dict[str, tuple[int, str]], data: list[np.ndarray]) -> None:
    """Check that all return what was written."""
    ix = np.array([0, 254, 255, 500, 3, 3, 300, 77] * 4)
    expected = np.concatenate(data[:2])[ix] if len(data) > 1 else data[0][ix]
    for name, read in _candidates(folder, files).items():
        found = read(ix)
        if isinstance(found, torch.Tensor):
            found = found.view(torch.uint16).numpy()
        found = np.asarray(found)
        bits = found.view(np.uint16).reshape(expected.shape)
        assert np.array_equal(bits, expected), f"{name} gives other bits"


def _warm(
    case: str,
    folder: Path,
    files: dict[str, tuple[int, str]],
    n_rows: int,
    rounds: int,
    order: Callable[[int], Callable[[], np.ndarray]],
) -> list[Measure]:
    readers = _candidates(folder, files)
    for name, read in readers.items():
        if name in ("take", "take(out=)", "ours", "ours, always"):
            for first in range(0, n_rows - BATCH + 1, BATCH):  # all pages mapped, all chunks seen
                read(np.arange(first, first + BATCH))
    nexts = {name: order(n_rows) for name in readers}

    def reading(name: str) -> Callable[[], None]:
        def some() -> None:
            for _ in range(BATCHES_AT_ONCE):
                readers[name](nexts[name]())

        return some

    # An epoch reads batch after batch; the first one after the other candidates would measure a cold CPU cache.
    seconds = interleaved(
        {name: reading(name) for name in readers}, rounds, before=lambda name: readers[name](nexts[name]())
    )
    gigabytes = BATCHES_AT_ONCE * BATCH * ROW_BYTES / 1e9
    case = f"warm, {case}"
    measures = [Measure(case, name, "GB/s", [gigabytes / s for s in values]) for name, values in seconds.items()]

    def faster(than: str, who: str, goal: float | None) -> Measure:
        return Measure(case, f"{who} / {than}", "x", ratios(seconds[than], seconds[who]), at_least=goal)

    shuffled = order is _shuffled
    measures += [
        faster("take", "ours", 1.1 if shuffled else None),
        faster("take(out=)", "ours", 0.85 if shuffled else None),
        faster("take(out=)", "ours, always", 0.5 if shuffled else None),
    ]
    return measures + [faster(name, "ours", goal if shuffled else None) for name, goal in GOALS.items()]


def _both_cores(folder: Path, files: dict[str, tuple[int, str]], n_rows: int, rounds: int) -> list[Measure]:
    """Two threads that read different batches through one reader or memmap."""
    reader = StoreReader(folder / "ours", files)
    rows = np.memmap(folder / "memmap" / "rows", np.uint16, "r").reshape(-1, SEQ_LEN, D_MODEL)
    outs = [empty_aligned((BATCH, SEQ_LEN, D_MODEL), torch.bfloat16) for _ in range(2)]
    orders = {name: [_shuffled(n_rows), _shuffled(n_rows)] for name in ("ours", "take(out=)")}
    for first in range(0, n_rows - BATCH + 1, BATCH):
        reader.read("train", np.arange(first, first + BATCH))
    with ThreadPoolExecutor(2) as pool:

        def ours(n: int) -> None:
            for _ in range(4):
                reader.read("train", orders["ours"][n](), outs[n])

        def take(n: int) -> None:
            for _ in range(4):
                ix, out = orders["take(out=)"][n](), outs[n].view(torch.uint16).numpy()
                np.take(rows, ix, axis=0, out=out, mode="clip")

        candidates = {
            "ours": lambda: list(pool.map(ours, range(2))),
            "take(out=)": lambda: list(pool.map(take, range(2))),
        }
        seconds = interleaved(candidates, rounds, warmup=2)
    gigabytes = 2 * 4 * BATCH * ROW_BYTES / 1e9
    case = "warm, shuffled, two threads"
    return [
        *(Measure(case, name, "GB/s", [gigabytes / s for s in values]) for name, values in seconds.items()),
        Measure(case, "ours / take(out=)", "x", ratios(seconds["take(out=)"], seconds["ours"])),
    ]


def _cold(folder: Path, files: dict[str, tuple[int, str]], n_rows: int, rounds: int) -> list[Measure]:
    """Eight batches from the disk, after evicting every page of the file."""
    generator = np.random.default_rng(2)
    outs = [empty_aligned((BATCH, SEQ_LEN, D_MODEL), torch.bfloat16) for _ in range(COLD_THREADS)]

    def batches() -> list[np.ndarray]:
        return list(generator.permutation(n_rows)[: COLD_BATCHES * BATCH].reshape(COLD_BATCHES, BATCH))

    def with_memmap(n_threads: int) -> None:
        rows = np.memmap(folder / "memmap" / "rows", np.uint16, "r").reshape(-1, SEQ_LEN, D_MODEL)
        _spread(batches(), n_threads, lambda n, ix: np.take(rows, ix, axis=0, out=_bits(outs[n], ix), mode="clip"))

    def with_ours(n_threads: int) -> None:
        with StoreReader(folder / "ours", files) as reader:
            _spread(batches(), n_threads, lambda n, ix: reader.read("train", ix, outs[n][: len(ix)]))

    kinds = {"memmap": (with_memmap, folder / "memmap"), "ours": (with_ours, folder / "ours")}
    seconds: dict[str, list[float]] = {}
    for n_threads in (1, COLD_THREADS):
        names = {f"{kind}, {n_threads} threads": kind for kind in kinds}
        seconds |= _interleaved_cold({n: (kinds[k][0], kinds[k][1], n_threads) for n, k in names.items()}, rounds)
    gigabytes = COLD_BATCHES * BATCH * ROW_BYTES / 1e9
    measures = [Measure("cold, shuffled", name, "GB/s", [gigabytes / s for s in v]) for name, v in seconds.items()]
    for n_threads in (1, COLD_THREADS):
        ours, memmap = seconds[f"ours, {n_threads} threads"], seconds[f"memmap, {n_threads} threads"]
        what, goal = f"ours / memmap, {n_threads} threads", 1.0 if n_threads > 1 else None
        measures.append(Measure("cold, shuffled", what, "x", ratios(memmap, ours), at_least=goal))
    return measures


def _bits(out: torch.Tensor, ix: np.ndarray) -> np.ndarray:
    return out[: len(ix)].view(torch.uint16).numpy()


def _spread(batches: list[np.ndarray], n_threads: int, read: Callable[[int, np.ndarray], object]) -> None:
    """Divide the rows of every batch among threads, as a prefetching loader would."""
    if n_threads == 1:
        for ix in batches:
            read(0, ix)
        return
    parts = np.array_split(np.concatenate(batches), n_threads)
    with ThreadPoolExecutor(n_threads) as pool:
        list(pool.map(read, range(n_threads), parts))


def _interleaved_cold(
    candidates: dict[str, tuple[Callable[[int], None], Path, int]], rounds: int
) -> dict[str, list[float]]:
    import time

    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for n in range(rounds):
        names = list(candidates)
        for name in names[n % len(names) :] + names[: n % len(names)]:
            read, folder, n_threads = candidates[name]
            peers.evict(folder)
            began = time.perf_counter()
            read(n_threads)
            seconds[name].append(time.perf_counter() - began)
    return seconds

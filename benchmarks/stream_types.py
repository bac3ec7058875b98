"""Data types of the frozen trunk's stream: the cost in loss and the saving in bytes.

The growth of the quickstart with fewer steps: text of Python's standard library, bytes, causal objective, three stacks.
Loss is measured on the validation sequences after the last stage, with the stream rounded as in training. The errors
are differences between the last store and what the stack computed, over sampled rows; those of a channel are relative
to how much it varies. Rows are read in shuffled batches of 32, from pages in memory, by one thread.
"""

from __future__ import annotations

import contextlib
import tempfile
from typing import Any

import numpy as np
import torch

from benchmarks.harness import ROOT, Measure, interleaved, ratios
from flows.run.run import grow
from stackwise_core.config import StackWiseConfig
from stackwise_core.config.yaml import apply_overrides
from stackwise_core.model.stream import STREAM_DTYPES
from stackwise_core.stages.plan import plan_config
from storage.activations.reader import StoreReader
from storage.artifacts import Artifacts

SEEDS = (0, 1, 2)
STEPS = 80
REFERENCE = "float32"
TYPES = (REFERENCE, *(dtype for dtype in STREAM_DTYPES if dtype != REFERENCE))
BATCH = 32


def measure(quick: bool) -> list[Measure]:
    steps, seeds, rounds = (10, SEEDS[:1], 3) if quick else (STEPS, SEEDS, 30)
    with tempfile.TemporaryDirectory() as artifacts:
        losses = {dtype: [_grow(_config(dtype, seed, steps), artifacts) for seed in seeds] for dtype in TYPES}
        stores = {dtype: _last_store(_config(dtype, seeds[0], steps), artifacts) for dtype in TYPES}
        torch.set_num_threads(1)
        seconds = _reading(stores, rounds)
    return [m for dtype in TYPES for m in _measures(dtype, losses, stores[dtype], seconds)]


def _config(dtype: str, seed: int, steps: int) -> StackWiseConfig:
    config = StackWiseConfig.from_yaml(ROOT / "configs" / "quickstart.yaml")
    values = config.model_dump()
    changes: dict[str, Any] = {
        "run.name": f"{dtype}-seed{seed}",
        "run.seed": seed,
        "training.batch_size": 16,
        "training.steps_per_stack": steps,
        "training.warmup_steps": min(steps, 20),
        "cache.dtype": dtype,
        "cache.keep": "all",
        "validation.max_sequences": 64,
        "hardware.device": "cpu",
        "hardware.threads": 2,
    }
    apply_overrides(values, changes)
    return StackWiseConfig.from_dict(values)


def _grow(config: StackWiseConfig, artifacts: str) -> float:
    """Return the validation loss after the last stage [nats per byte]."""
    print(config.run.name, flush=True)
    loss = grow(config, artifacts)[-1].validation_loss
    assert loss is not None
    return loss


def _last_store(config: StackWiseConfig, root: str) -> tuple[StoreReader, dict[str, Any], int]:
    """Return the last store of a run, the facts in its manifest, and its bytes on the disk."""
    ref = plan_config(config).stages[-2].ref("activations")
    artifacts = Artifacts(root)
    manifest = artifacts.manifest(ref)
    return StoreReader(artifacts.folder(ref), manifest.checksums()), manifest.facts, manifest.n_bytes


def _reading(stores: dict[str, tuple[StoreReader, dict[str, Any], int]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds per row for each store, per round."""
    with contextlib.ExitStack() as stack:
        readers = {dtype: stack.enter_context(reader) for dtype, (reader, _, _) in stores.items()}
        n_rows = min(reader.train.rows for reader in readers.values()) // BATCH * BATCH
        order = np.random.default_rng(0).permutation(n_rows).reshape(-1, BATCH)

        def candidate(reader: StoreReader) -> Any:
            def read() -> None:
                for rows in order:
                    reader.read("train", rows)

            return read

        seconds = interleaved({dtype: candidate(reader) for dtype, reader in readers.items()}, rounds)
    return {dtype: [s / n_rows for s in values] for dtype, values in seconds.items()}


def _measures(
    dtype: str,
    losses: dict[str, list[float]],
    store: tuple[StoreReader, dict[str, Any], int],
    seconds: dict[str, list[float]],
) -> list[Measure]:
    reader, facts, n_bytes = store
    n_values = (reader.train.rows + reader.validation.rows) * reader.train.seq_len * reader.train.d_model
    measures = [
        Measure(dtype, "loss after the last stage", "nats", losses[dtype]),
        Measure(dtype, "bytes of the store per value", "bytes", [n_bytes / n_values]),
        Measure(dtype, "error, overall", "%", [100.0 * facts["error"]["overall"]]),
        Measure(dtype, "error of the worst channel", "%", [100.0 * facts["error"]["channel_max"]]),
        Measure(dtype, "reading a row", "us", [1e6 * s for s in seconds[dtype]]),
    ]
    if dtype == REFERENCE:
        return measures
    gap = [1e3 * (mine - theirs) for mine, theirs in zip(losses[dtype], losses[REFERENCE], strict=True)]
    return [
        *measures,
        Measure(dtype, f"loss above {REFERENCE}", "mnats", gap),
        Measure(dtype, f"reading / {REFERENCE}", "x", ratios(seconds[dtype], seconds[REFERENCE])),
    ]

"""The report pages of docs/gallery.md, made from small runs: `make gallery`, and a slow test."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path
from typing import Any

from flows.cli.main import main
from flows.run.run import grow
from stackwise_core.config import StackWiseConfig

CONFIGS = ("quickstart", "recipes/qlora", "recipes/diffusion-depth")
SMALL: dict[str, Any] = {
    "data.source": str(Path(asyncio.__file__).parent / "*.py"),
    "data.seq_len": 64,
    "model.d_model": 64,
    "training.batch_size": 16,
    "training.steps_per_stack": 40,
    "training.warmup_steps": 4,
    "validation.max_sequences": 64,
    "hardware.threads": 1,  # more do not help racks this small
}


def write(folder: Path, **changes: Any) -> None:
    """Train each configuration, made small, and write the page of its run into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as artifacts:
        for config in CONFIGS:
            run = grow_small(config, artifacts, changes)
            code = main(["report", run, "--artifacts", artifacts, "--html", str(folder / f"{run}.html")])
            assert code == 0, run


def grow_small(config: str, artifacts: str, changes: dict[str, Any]) -> str:
    """Train a configuration and return the name of its run."""
    root = Path(__file__).parents[2]
    small = StackWiseConfig.from_yaml(root / "configs" / f"{config}.yaml", SMALL | changes)
    grow(small, artifacts)
    return small.run.name


if __name__ == "__main__":
    write(Path(sys.argv[1]))

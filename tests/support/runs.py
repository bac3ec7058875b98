"""Tiny runs and what they left: a corpus, a configuration that grows in half a second, digests, events."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_WORDS = "the of stack trunk frozen layer boundary token grows each one then keeps rack under noise"


def write_corpus(path: Path, *, words: int = 400, seed: int = 0) -> Path:
    """Write some kilobytes of text that a model can learn something of."""
    draw = random.Random(seed)
    path.write_text(" ".join(draw.choice(_WORDS.split()) for _ in range(words)))
    return path


def tiny_values(corpus: Path) -> dict[str, Any]:
    """Three stacks of one block; 16 sequences in batches of 4, so that 12 steps are three epochs."""
    return {
        "run": {"name": "tiny"},
        "data": {
            "source": str(corpus),
            "seq_len": 16,
            "max_sequences": 16,
            "sample": "first",
            "validation_fraction": 0.1,
        },
        "model": {"d_model": 16, "n_heads": 2, "d_ff": 32, "blocks_per_stack": 1},
        "training": {
            "batch_size": 4,
            "steps_per_stack": 12,
            "warmup_steps": 2,
            "checkpoint_every": 4,
            "progressive": {"training_objective": "clm", "target_stacks": 3},
        },
        "hardware": {"threads": 1, "device": "cpu"},
        "validation": {"max_sequences": 8, "sampled_rows": 64},
    }


def tiny(folder: Path, changes: dict[str, Any] | None = None) -> Any:
    """Return the tiny configuration, its corpus written into `folder`; changes are dotted keys."""
    from stackwise_core.config import StackWiseConfig
    from stackwise_core.config.yaml import apply_overrides

    corpus = folder / "corpus.txt"
    values = tiny_values(corpus if corpus.exists() else write_corpus(corpus))
    apply_overrides(values, changes or {})
    return StackWiseConfig.from_dict(values)


def manifests(root: Path) -> dict[str, dict[str, Any]]:
    """Return every manifest below an artifacts folder, by the artifact's name."""
    found = [path for room in _ROOMS for path in (root / room).glob("*/manifest.json")]
    return {path.parent.name: json.loads(path.read_text()) for path in found}


def digests(root: Path) -> dict[str, str]:
    """Return the digest of every artifact: equal digests are equal bytes. `verify` says that they are true."""
    sealed = {name: manifest["digest"] for name, manifest in manifests(root).items()}
    assert sealed, f"nothing sealed in {root}"
    return sealed


_ROOMS = ("data", "builds", "trunks", "stacks", "optimizers", "cooldowns", "activations", "validations")


def folder_of(root: Path, kind: str, stage: int) -> Path:
    """Return the one folder of a kind and stage."""
    (found,) = (root / f"{kind.removesuffix('s')}s").glob(f"{kind}-{stage}-*")
    return found


def files_below(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


class Recorder:
    """A subscriber that keeps the events of a run."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def __call__(self, event: Any) -> None:
        self.events.append(event)

    @property
    def made(self) -> list[str]:
        """Tasks that did work, as 'train 1', in order."""
        from flows.run.events import TaskStarted

        return [f"{event.task} {event.stage}" for event in self.events if isinstance(event, TaskStarted)]

    @property
    def messages(self) -> list[str]:
        from flows.run.events import Message

        return [event.text for event in self.events if isinstance(event, Message)]


def grown(config: Any, root: Path, **how: Any) -> Recorder:
    """Grow by plain calls and return the recorded events."""
    from flows.run.events import subscribed
    from flows.run.run import grow

    recorder = Recorder()
    with subscribed(recorder):
        grow(config, str(root), **how)
    return recorder


ALL_OF = {stage: [f"{task} {stage}" for task in ("build", "trunk", "train", "cache", "validate")] for stage in range(9)}


def made_by_stages(n_stages: int, first: int = 0) -> list[str]:
    """What a run from stage `first` on makes; the last stage caches nothing."""
    tasks = [task for stage in range(first, n_stages) for task in ALL_OF[stage]]
    tasks.remove(f"cache {n_stages - 1}")
    return tasks


def stage_model(rack: Any, index: int) -> Any:
    """Return what stage `index` trains of a rack that grows by appending on a frozen trunk."""
    from stackwise_core.config import StackWiseConfig
    from stackwise_core.stages.stages import stage_anatomy
    from stackwise_core.training.stage_model import StageModel

    embedding = None if index else rack.embedding
    return StageModel(stage_anatomy(StackWiseConfig(), index), [rack.stacks[index]], rack.head, embedding)


def subset(names: Iterable[str], *kinds: str) -> set[str]:
    """Return the artifact names of some kinds, such as 'stack' or 'stack-1'."""
    return {name for name in names if name.startswith(tuple(f"{kind}-" for kind in kinds))}

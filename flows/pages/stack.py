"""A sealed stack: its tensors and its training curves, as sections of a document and as a page."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from markupsafe import Markup
from torch import Tensor

from flows.pages.page import artifact_page
from flows.pages.plots import SMOOTHED, SMOOTHED_FROM, Plot, places, scale_of
from stackwise_core.data.masks import MaskSpec
from storage.activations.statistics import evenly_spaced
from storage.artifacts import Artifacts
from storage.checkpoints import load_tensors
from storage.manifest import Manifest, read_manifest
from storage.midstage import METRICS, read_metrics

_MOST_STEPS = 1000


def describe_stack(artifacts: Artifacts, manifest: Manifest) -> dict[str, Any]:
    """Return the sections `tensors` and `metrics` (at most 1,000 steps) of the document of a sealed stack.

    Raises:
        ArtifactCorruptError: a file is not in the safetensors format.
    """
    folder = artifacts.checked(manifest.ref)
    files = sorted(name for name in manifest.files if name.endswith(".safetensors"))
    held = {file: load_tensors(folder / file) for file in files}
    tensors = [_tensor(file, name, held[file][name]) for file in files for name in sorted(held[file], key=_by_number)]
    metrics = _metrics(folder / METRICS) if METRICS in manifest.files else []
    return {"tensors": tensors, "metrics": metrics}


def validation_of(artifacts: Artifacts, stack: Manifest) -> dict[str, Any]:
    """Return the losses of the rack that ends with a stack; empty if it was not judged."""
    beginning, here = f"validation-{stack.ref.stage}-", (stack.ref, stack.digest)
    for folder in artifacts.everything():
        found = read_manifest(folder) if folder.name.startswith(beginning) else None
        if found and here in [(entry.ref, entry.digest) for entry in found.inputs]:
            return found.facts if artifacts.sealed(found.ref) else {}
    return {}


def _metrics(path: Path) -> list[dict[str, Any]]:
    records = read_metrics(path)
    return [records[at] for at in evenly_spaced(len(records), _MOST_STEPS)]


def _by_number(name: str) -> list[tuple[int, str]]:
    """Return a sort key that puts blocks.2 before blocks.10."""
    return [(int(part), "") if part.isdecimal() and len(part) < 10 else (-1, part) for part in name.split(".")]


def _tensor(file: str, name: str, tensor: Tensor) -> dict[str, Any]:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"file": file, "name": name, "shape": list(tensor.shape), "dtype": dtype, "bytes": tensor.nbytes}


def stack_page(document: dict[str, Any], validation: dict[str, Any]) -> str:
    """Return the page of the document of a sealed stack, and of the validation of its rack."""
    metrics, facts = document["metrics"], document["facts"]
    if "adopted" in facts:  # of a saved rack, whose facts do not say how many blocks it has
        document = {**document, "facts": {**facts, "blocks": document["recipe"]["stack"]["n_blocks"]}}
    last = [record["loss"] for record in metrics[9 * len(metrics) // 10 :] if record["loss"] is not None]
    mean = math.fsum(last) / len(last) if last else None
    curves = _curves(metrics, validation.get("validation_loss")) if metrics else []
    mask = document["recipe"].get("mask")
    values = {
        "curves": curves,
        "mean_loss": mean,
        "validation": validation,
        "ratio": mask and MaskSpec.model_validate(mask).for_validation().mean_ratio,
        "trained": _trained(document["tensors"]),
    }
    return artifact_page("stack.html.j2", document, **values)


def _trained(tensors: list[dict[str, Any]]) -> str:
    """Return what a stage trained, which are the parts that it wrote: the stack and the head."""
    files = {tensor["file"] for tensor in tensors}
    ends = [part for part in ("embedding", "head") if f"{part}.safetensors" in files]
    others = len({file.partition("/")[0] for file in files if "/" in file})
    own = any("/" not in file for file in files - {f"{part}.safetensors" for part in ends})
    counted = {0: [], 1: ["another stack"]}.get(others, [f"{others} other stacks"]) if own else [f"{others} stacks"]
    parts = [*(["the stack"] if own else []), *counted, *(f"the {part}" for part in ends)]
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def _curves(metrics: list[dict[str, Any]], validation_loss: float | None) -> list[tuple[Markup, str]]:
    captions = {
        "loss": ("loss [nats per loss position]", "Of each step's batch."),
        "learning_rate": ("learning rate", "The schedule of the optimizer."),
        "gradient_norm": ("norm of the gradient", "Before clipping."),
    }
    steps = [record["step"] + 1 for record in metrics]
    judged = [(record["step"] + 1, record["validation_loss"]) for record in metrics if "validation_loss" in record]
    if validation_loss is not None:
        judged = [*(each for each in judged if each[0] < steps[-1]), (steps[-1], validation_loss)]
    curves: list[tuple[Markup, str]] = []
    for name, (label, caption) in captions.items():
        log, validated = name == "gradient_norm", judged if name == "loss" else []
        values = [record.get(name) for record in metrics]
        around = scale_of([*values, *(value for _, value in validated)], log=log, zero=name == "learning_rate")
        plot = Plot(places(steps[0], steps[-1]), around, "step", label)
        draw = plot.line if name == "learning_rate" else plot.curve
        draw(steps, [value if value is None or value > 0 or not log else None for value in values])
        for step, value in validated:
            plot.dot(step, value, "outlier judged", f"validation, step {step}")
        caption += "" if name == "learning_rate" or len(steps) < SMOOTHED_FROM else f" {SMOOTHED}"
        curves.append((plot.svg(), caption + (" Dots: validation." if validated else "")))
    return curves

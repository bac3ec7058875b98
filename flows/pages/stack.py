"""A sealed stack: its tensors and its training curves, as sections of a document and as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markupsafe import Markup
from torch import Tensor

from flows.pages.page import artifact_page
from flows.pages.plots import Plot, places, scale_of
from stackwise_core.strict import parse_object
from storage.activations.statistics import evenly_spaced
from storage.checkpoints import METRICS, load_tensors
from storage.errors import ArtifactCorruptError
from storage.manifest import Manifest

_MOST_STEPS = 1000


def describe_stack(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """Return the sections `tensors` and `metrics` (at most 1,000 steps) of the document of a sealed stack.

    Raises:
        ArtifactCorruptError: a file is not in the safetensors format.
    """
    files = sorted(name for name in manifest.files if name.endswith(".safetensors"))
    held = {file: load_tensors(folder / file) for file in files}
    tensors = [_tensor(file, name, held[file][name]) for file in files for name in sorted(held[file], key=_by_number)]
    return {"tensors": tensors, "metrics": _metrics(folder / METRICS) if METRICS in manifest.files else []}


def _metrics(path: Path) -> list[dict[str, Any]]:
    lines = path.read_bytes().splitlines()
    try:
        return [parse_object(lines[at]) for at in evenly_spaced(len(lines), _MOST_STEPS)]
    except ValueError as error:
        raise ArtifactCorruptError(path, f"has a line that is no record of a step ({error})", "Do not use it") from None


def _by_number(name: str) -> list[tuple[int, str]]:
    """Return a sort key that puts blocks.2 before blocks.10."""
    return [(int(part), "") if part.isdecimal() and len(part) < 10 else (-1, part) for part in name.split(".")]


def _tensor(file: str, name: str, tensor: Tensor) -> dict[str, Any]:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"file": file, "name": name, "shape": list(tensor.shape), "dtype": dtype, "bytes": tensor.nbytes}


def stack_page(document: dict[str, Any]) -> str:
    """Return the page of the document of a sealed stack."""
    curves = _curves(document["metrics"]) if document["metrics"] else []
    return artifact_page("stack.html.j2", document, curves=curves)


def _curves(metrics: list[dict[str, Any]]) -> list[tuple[Markup, str]]:
    captions = {
        "loss": ("loss [nats per loss position]", "The loss of each step's batch."),
        "learning_rate": ("learning rate", "The schedule of the optimizer."),
        "gradient_norm": ("norm of the gradient", "Before clipping, on a logarithmic scale."),
    }
    steps = [record["step"] for record in metrics]
    curves: list[tuple[Markup, str]] = []
    for name, (label, caption) in captions.items():
        log = name == "gradient_norm"
        values = [record.get(name) for record in metrics]
        plot = Plot(places(steps[0], steps[-1]), scale_of(values, log=log, zero=name == "learning_rate"), "step", label)
        plot.line(steps, [value if value is None or value > 0 or not log else None for value in values])
        curves.append((plot.svg(), caption))
    return curves

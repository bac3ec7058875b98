"""What there is to say of a sealed stack: its tensors, and how it was trained; as sections of a document and a page."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from torch import Tensor

from flows.pages import parts
from flows.pages.markup import Child, element, page
from flows.pages.plots import Plot
from flows.pages.scales import places, scale_of
from flows.pages.style import STYLE
from flows.run.numbers import parameters, size
from storage.activations.sampling import evenly_spaced
from storage.checkpoints import METRICS, load_tensors
from storage.manifest import Manifest

_MOST_STEPS = 1000


def describe_stack(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """Return the sections `tensors` and `metrics`, at most a thousand steps, of the document of a sealed stack.

    Raises:
        ArtifactCorruptError: a file is no safetensors file.
    """
    files = sorted(name for name in manifest.files if name.endswith(".safetensors"))
    held = {file: load_tensors(folder / file) for file in files}
    tensors = [_tensor(file, name, held[file][name]) for file in files for name in sorted(held[file], key=_by_number)]
    lines = (folder / METRICS).read_text().splitlines() if METRICS in manifest.files else []
    return {"tensors": tensors, "metrics": [json.loads(lines[at]) for at in evenly_spaced(len(lines), _MOST_STEPS)]}


def _by_number(name: str) -> list[tuple[int, str]]:
    """Return what sorts blocks.2 before blocks.10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def _tensor(file: str, name: str, tensor: Tensor) -> dict[str, Any]:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"file": file, "name": name, "shape": list(tensor.shape), "dtype": dtype, "bytes": tensor.nbytes}


def stack_page(document: dict[str, Any]) -> str:
    """Return the page of the document of a sealed stack."""
    facts = document["facts"]
    summary = (
        f"{parameters(facts['trainable_parameters'])} parameters trained for {facts['steps']:,} steps, in a rack of "
        f"{parameters(facts['rack_parameters'])}."
    )
    shown = [
        (f"{facts['train_loss']:.4f}", "loss at the last step [nats]", False),
        (parameters(facts["stack_parameters"]), "parameters of the stack", False),
        (f"{facts['tokens_per_second']:,}", "tokens per second", False),
    ]
    children: list[Child] = [parts.heading(document, "Stack", summary), parts.tiles(*shown)]
    if document["metrics"]:
        children.append(parts.section("Training", parts.figures(*_curves(document["metrics"]))))
    children += [_tensors(document["tensors"]), parts.provenance(document), parts.recipe(document)]
    return page(parts.name_of(document), STYLE, *children)


def _curves(metrics: list[dict[str, Any]]) -> list[tuple[Element, str]]:
    captions = {
        "loss": ("loss [nats per loss position]", "The loss of each step's batch."),
        "learning_rate": ("learning rate", "The schedule of the optimizer."),
        "gradient_norm": ("norm of the gradient", "Before clipping, on a logarithmic scale."),
    }
    steps = [record["step"] for record in metrics]
    curves: list[tuple[Element, str]] = []
    for name, (label, caption) in captions.items():
        values = [record.get(name) for record in metrics]
        log = name == "gradient_norm"
        plot = Plot(places(steps[0], steps[-1]), scale_of(values, log=log, zero=name == "learning_rate"), "step", label)
        plot.line(steps, [value if value is None or value > 0 or not log else None for value in values])
        curves.append((plot.svg(), caption))
    return curves


def _tensors(tensors: list[dict[str, Any]]) -> Element:
    rows = [
        [
            element("code", tensor["name"]),
            parts.shape(tensor["shape"]) or "scalar",
            tensor["dtype"],
            f"{prod(tensor['shape']):,}",
            size(tensor["bytes"]),
            tensor["file"],
        ]
        for tensor in tensors
    ]
    return parts.section("Tensors", parts.table(("tensor", "shape", "type", "|values", "|bytes", "file"), rows))

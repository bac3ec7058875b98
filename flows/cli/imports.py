"""`stackwise import`: a Hugging Face checkpoint as a run, to grow on."""

from __future__ import annotations

import argparse
from typing import Any

from flows.cli.arguments import add_common, print_waiting
from flows.run.numbers import parameters, size
from flows.run.say import say, say_json
from stackwise_core.config.schema import ProgressiveConfig, RunConfig
from stackwise_core.errors import ConfigError, Fault
from storage.artifacts import artifacts_at
from storage.collect import without_gc


def add_import(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `import`."""
    add_common(parser, _import, json=True)
    help_text = "a folder with config.json, safetensors and tokenizer.json: Llama, Mistral, Qwen, SmolLM3, OLMo2"
    parser.add_argument("folder", metavar="DIR", help=help_text)
    parser.add_argument("--name", required=True, metavar="NAME", help="what the run will be called")
    help_text = "blocks of a stack (default: as many as give at most 8 stacks)"
    parser.add_argument("--blocks-per-stack", type=int, metavar="N", help=help_text)
    help_text = "how the matrices of the stacks are stored (default: in the type that they have)"
    precisions = ("full", "half", "bfloat16", "nvfp4", "qlora")
    parser.add_argument("--precision", choices=precisions, help=help_text)


def _import(options: argparse.Namespace) -> None:
    _check_name(options.name)
    from stackwise_core.interop.checkpoint import Checkpoint

    checkpoint = Checkpoint(options.folder)
    artifacts = artifacts_at(options.artifacts).open()
    from storage.imports import import_checkpoint  # imports torch

    with without_gc(artifacts, print_waiting):
        found = import_checkpoint(artifacts, options.name, checkpoint, options.blocks_per_stack, options.precision)
    stages = found.plan.stages
    names = [stage.ref("stack").name for stage in stages]
    stacks = [artifacts.manifest(stage.ref("stack")) for stage in stages]
    described, spec, shape = checkpoint.described, stages[-1].spec, stages[-1].shape
    shared = shape.vocab_size * shape.d_model if checkpoint.is_tied else 0
    document: dict[str, Any] = {
        "run": options.name,
        "artifacts": artifacts.uri,
        "was_there": found.was_there,
        "family": described.family.name,
        "sha256": found.digest,
        "blocks": [stage.spec.n_blocks for stage in stages],
        "precision": spec.new.precision,
        "parameters": stacks[-1].facts["rack_parameters"] - shared,
        "bytes": sum(stack.n_bytes for stack in stacks),
        "stacks": names,
    }
    if options.json:
        say_json(document)
        return
    n_stacks = len(stages)
    target = f"training.progressive.target_stacks: {n_stacks + 1}"
    target += f", max_stacks: {n_stacks + 1}" if n_stacks >= ProgressiveConfig().max_stacks else ""
    counts = f"{described.n_layers} blocks in {n_stacks} {'stack' if n_stacks == 1 else 'stacks'}"
    what = f"{described.family.name}, {counts}, {parameters(document['parameters'])} parameters"
    say(
        f"{options.name} {'was there already' if found.was_there else 'is imported'}: {what}, "
        f"{spec.new.precision}, {size(document['bytes'])}, in {artifacts.uri}",
        f"grow: model.from: {options.name} and {target} in a configuration",
    )


def _check_name(name: str) -> None:
    try:
        RunConfig(name=name)
    except ValueError:
        allowed = "letters, digits, '.', '_' and '-', at most 64, with a letter or digit first"
        raise ConfigError([Fault("--name", repr(name), allowed)]) from None

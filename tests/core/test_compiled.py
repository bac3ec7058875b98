"""Blocks that are recomputed in the backward pass, or compiled, against the same blocks run as they are."""

from __future__ import annotations

import gc
import json
import logging
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stackwise_core.config import StackWiseConfig
from stackwise_core.config.schema import Precision
from stackwise_core.model.adapters import add_adapter
from stackwise_core.model.blocks import Block, Stack, initialise
from stackwise_core.model.precision import convert_storage
from stackwise_core.model.rack_builder import ProgressiveRackBuilder
from stackwise_core.stages.resolve import ModelShape
from stackwise_core.training import hardware, stage_model, trainer
from stackwise_core.training.hardware import many_kinds_of_code
from stackwise_core.training.trainer import ProgressiveTrainer
from support.growth import batch_of, built, model_of
from support.training import STEPS, loader_of, same_bits, tiny, weights

pytestmark = pytest.mark.usefixtures("one_thread_per_module")

SHAPE = ModelShape(vocab_size=40, d_model=32, n_heads=2, n_kv_heads=1, d_ff=48, causal=True)
TOLERANCE = 1e-5


def stack_of(precision: Precision, n_adapters: int, n_blocks: int = 1) -> Stack:
    stack = Stack(SHAPE, n_blocks)
    initialise(stack, 0)
    convert_storage(stack, precision)
    for name in ("stack", "progressive")[:n_adapters]:
        add_adapter(stack, name, 4, 8.0, seed=1)
    with torch.no_grad():
        for parameter in stack.parameters():  # nothing is zero by construction, as B of an adapter is
            parameter.add_(0.02)
    return stack


def pass_of(stack: Stack, how: dict[str, Any]) -> list[Tensor]:
    """Return a stack's output, and the gradients of its input and of all that trains."""
    x = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(2)).requires_grad_()
    stack.zero_grad()
    out = stack(x, **how)
    out.square().sum().backward()
    return [out.detach(), *(each.grad.clone() for each in (x, *stack.parameters()) if each.grad is not None)]


def in_parts() -> dict[str, Any]:
    """Documents of 5 and 3 tokens, half of what a new stack would add, and recomputation."""
    documents = torch.tensor([[0] * 5 + [1] * 3] * 2)
    return {"documents_BT": documents, "share": torch.tensor(0.5), "recompute": True}


QUICK = [("full", 0, dict[str, Any]), ("qlora", 0, in_parts)]
KINDS = [("full", 0), ("half", 1), ("bfloat16", 0), ("nvfp4", 0), ("nvfp4", 1)]
KINDS += [("qlora", 0), ("qlora", 1), ("qlora", 2)]
CASES = [(*kind, how) for kind in KINDS for how in (dict[str, Any], in_parts)]


@pytest.mark.parametrize(
    ("precision", "n_adapters", "how"),
    [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
    ids=[f"{name} {n} {'plain' if how is not in_parts else 'all at once'}" for name, n, how in CASES],
)
def test_a_compiled_block_is_one_graph_and_computes_the_same(
    precision: Precision, n_adapters: int, how: Callable[[], dict[str, Any]]
) -> None:
    stack = stack_of(precision, n_adapters)
    expected = pass_of(stack, how())
    with many_kinds_of_code():
        for block in stack.blocks:
            block.compile(backend="aot_eager", fullgraph=True)  # a graph break is an error
        found = pass_of(stack, how())
    assert len(found) == len(expected)
    for here, there in zip(found, expected, strict=True):
        torch.testing.assert_close(here, there, rtol=TOLERANCE, atol=TOLERANCE)


# ---------------------------------------------------------------- a stage


def grown(config: StackWiseConfig) -> tuple[ProgressiveRackBuilder, list[float]]:
    builder = ProgressiveRackBuilder(config)
    results = ProgressiveTrainer(config).train_progressively(builder, loader_of())
    return builder, [record["loss"] for result in results for record in result.records]


def test_what_trains_is_compiled_block_by_block_and_nothing_else_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against blocks run as they are; of the compiler itself only the calls are counted."""
    config = tiny()
    config.model.blocks_per_stack = 2
    expected, losses = grown(config)
    compiled, calls = list[Any](), list[int]()

    def compiling(run: Any, *, backend: str) -> Callable[..., Tensor]:
        block = run.__self__
        compiled.append(block)

        def counted(*args: Any) -> Tensor:
            calls.append(compiled.index(block))
            return run(*args)

        return counted

    monkeypatch.setattr(trainer, "compiler_fault", lambda device: "")
    monkeypatch.setattr(stage_model, "compiler_fault", lambda device: "")
    monkeypatch.setattr(torch, "compile", compiling)
    config.hardware.compile = True
    builder, found = grown(config)
    blocks = [block for stack in builder.build_rack().stacks for block in stack.blocks]
    assert compiled == blocks
    assert calls == [0, 1] * STEPS + [2, 3] * STEPS  # not where the trunk computes what the second stage reads
    assert all(block._compiled_call_impl is None for block in blocks)
    assert found == losses
    assert same_bits(weights(builder.build_rack()), weights(expected.build_rack()))


def test_without_a_compiler_it_says_so_once_and_trains(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected, losses = grown(tiny())

    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no C++ compiler found\nand more about it")

    monkeypatch.setattr(hardware, "BACKEND", broken)
    config = tiny()
    config.hardware.compile = True
    with caplog.at_level(logging.WARNING, "stackwise"):
        builder, found = grown(config)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "stackwise"]
    assert line.startswith("hardware.compile: torch.compile does not work here, so blocks run as they are (")
    assert "no C++ compiler found" in line
    assert "more about it" not in line
    assert found == losses
    assert same_bits(weights(builder.build_rack()), weights(expected.build_rack()))


def test_one_block_at_a_time_is_computed_again() -> None:
    """Of four blocks, the widest tensor: none is kept for the backward pass, and then there is one at a time."""
    config = tiny()
    config.model.blocks_per_stack, config.training.activation_checkpointing = 4, True
    model = model_of(built(config, 1), config, 0)
    alive: list[weakref.ref[Tensor]] = []
    most: list[int] = []

    def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        alive.append(weakref.ref(inputs[0]))
        gc.collect()
        most.append(sum(each() is not None for each in alive))

    for block in model.live_stacks()[0].blocks:
        assert isinstance(block, Block)
        block.ffn.down_proj.register_forward_pre_hook(count)
    loss, _ = model.summed_loss(batch_of(config, 0))
    gc.collect()
    assert [each() for each in alive] == [None] * 4
    loss.backward()
    assert most == [1] * 8


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["shards", "replicas"])
def test_processes_that_train_together_compile_their_blocks(kind: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "support.compiled_ranks", kind, str(tmp_path / "store")]
    tests = Path(__file__).parents[1]  # where `support` is found
    done = subprocess.run(command, cwd=tests, capture_output=True, text=True, check=True, timeout=600)
    found = json.loads(done.stdout)
    assert found["together"] == pytest.approx(found["alone"], abs=TOLERANCE)
    assert (found["graphs"], found["breaks"]) == (1, 0)  # both blocks are one


# ---------------------------------------------------------------- the compiler itself


@pytest.mark.filterwarnings("ignore")  # dynamo looks at gradients of what has none
@pytest.mark.slow
def test_inductor_trains_to_the_same_losses() -> None:
    config = tiny("clm", activation_checkpointing=True)
    _, losses = grown(config)
    config.hardware.compile = True
    assert hardware.compiler_fault(torch.device("cpu")) == ""
    _, found = grown(config)
    assert found == pytest.approx(losses, rel=1e-4)


@pytest.mark.slow
def test_a_machine_without_a_compiler_is_found_out(tmp_path: Path) -> None:
    script = "import torch; from stackwise_core.training.hardware import compiler_fault as fault\n"
    script += "print(fault(torch.device('cpu')))"
    nothing = {**os.environ, "PATH": "", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=nothing, capture_output=True, text=True, check=True)
    assert "blocks run as they are (InvalidCxxCompiler: No working C++ compiler found" in done.stdout
    assert len(done.stdout.splitlines()) == 1

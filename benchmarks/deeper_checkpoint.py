"""A pretrained model with a new stack of two blocks against LoRA on the same model, at equal compute.

Both train on the same text and are judged on the same text held out of it, in bits per byte. Everything is charged:
the new stack for the pass of the frozen model that fills its cache, too. The rate of each is the best of a grid on an
eighth of the compute, told if it is at the edge of the grid.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from torch.nn import functional as F

from benchmarks.harness import Measure
from flows.run.run import grow
from stackwise_core.config import StackWiseConfig
from stackwise_core.data.masks import FloatArray, IntArray
from stackwise_core.data.sequences import PackedSequences
from stackwise_core.data.tokenizer import load_tokenizer
from stackwise_core.generation.judging import TextOf, token_nats
from stackwise_core.interop.checkpoint import TOKENIZER, Checkpoint
from stackwise_core.stages.costs import n_adapter_parameters, stack_flops, stage_flops
from storage.adopt import plan_in
from storage.artifacts import artifacts_at
from storage.imports import import_checkpoint
from storage.racks import load_rack
from storage.sequences import load_sequences

SEQ_LEN, BATCH, STEPS = 256, 8, 100
"""Of the new stack: 204,800 tokens."""
PILOT = 8
"""The grid of rates is tried on this part of the compute."""
NEW, LORA = "new stack", "LoRA"
RATES = {NEW: (1e-4, 3e-4, 1e-3), LORA: (3e-4, 1e-3, 3e-3)}
RANK = 16
"""Of LoRA, on every linear layer of the blocks."""
N_JUDGED = 64
"""Held-out sequences."""
THREADS = 1
_PREDICTED = (SEQ_LEN - 1) / SEQ_LEN


def measure(quick: bool, checkpoint: str, source: str, artifacts: str = "") -> list[Measure]:
    """Train both on a folder of a checkpoint and a text; what a folder of artifacts holds is not made again."""
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as scratch:
        trial = Trial(Path(artifacts or scratch), Path(checkpoint), source)
        measures = [Measure("as it came", "loss", "bits/byte", [trial.as_it_came()])]
        for side, rates in RATES.items():
            steps = STEPS // 10 if quick else STEPS
            pilots = {rate: trial.loss(side, rate, max(2, steps // PILOT)) for rate in rates}
            best = min(pilots, key=pilots.__getitem__)
            measures += [Measure(side, f"loss of the pilot at {rate:g}", "bits/byte", [pilots[rate]]) for rate in rates]
            measures += [
                Measure(side, "loss", "bits/byte", [trial.loss(side, best, steps)]),
                Measure(side, "trained on", "tokens", [float(trial.steps(side, steps) * BATCH * SEQ_LEN)]),
                Measure(side, "compute", "TFLOP", [trial.flops(side, steps) / 1e12]),
            ]
        return measures


class Trial:
    """One checkpoint and one text, for both sides. Letters: B sequences, T positions."""

    def __init__(self, work: Path, checkpoint: Path, source: str) -> None:
        """Import the checkpoint, unless the folder has it."""
        work.mkdir(parents=True, exist_ok=True)
        self.work, self.checkpoint, self.source = work, checkpoint, source
        self.artifacts = artifacts_at(work).open()
        self.n_stacks = len(import_checkpoint(self.artifacts, "base", Checkpoint(checkpoint)).plan.stages)
        self.text = TextOf(load_tokenizer(str(checkpoint / TOKENIZER)))

    def as_it_came(self) -> float:
        """Return the loss of the checkpoint itself [bits per byte]."""
        rack = load_rack(self.work, "base")
        return self._judged(lambda rows: token_nats(rack, rows[:, :-1], rows[:, 1:]))

    def loss(self, side: str, rate: float, steps: int) -> float:
        """Return the loss of a side at a rate, after the compute of `steps` of the new stack [bits per byte]."""
        kept = self.work / f"{side}-{rate:g}-{steps}.json".replace(" ", "-")
        if not kept.exists():
            nats = self._grown(rate, steps) if side == NEW else self._adapted(rate, steps)
            kept.write_text(json.dumps(self._judged(nats)))
        found: float = json.loads(kept.read_text())
        print(f"{side}, rate {rate:g}, {self.steps(side, steps)} steps: {found:.4f} bits per byte", flush=True)
        return found

    # ---------------------------------------------------------------- the two sides

    def _grown(self, rate: float, steps: int) -> Callable[[IntArray], FloatArray]:
        config = self._config(rate, steps)
        grow(config, str(self.work))
        rack = load_rack(self.work, config.run.name)
        return lambda rows: token_nats(rack, rows[:, :-1], rows[:, 1:])

    def _adapted(self, rate: float, steps: int) -> Callable[[IntArray], FloatArray]:
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_pretrained(self.checkpoint, dtype=torch.float32)
        lora = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, lora)
        _train(model, self._split[0], rate, self.steps(LORA, steps))

        def nats_of(rows_BT: IntArray) -> FloatArray:
            with torch.inference_mode():
                return _nats(model, rows_BT).numpy()

        return nats_of

    def _judged(self, nats_of: Callable[[IntArray], FloatArray]) -> float:
        held_out, nats, n_bytes = self._split[1], 0.0, 0
        for first in range(0, min(len(held_out), N_JUDGED), BATCH):
            rows_BT, _ = held_out.take(np.arange(first, min(first + BATCH, len(held_out)), dtype=np.int64))
            with torch.inference_mode():
                nats += float(nats_of(rows_BT)[self.text.is_text(rows_BT[:, 1:])].sum())
            n_bytes += sum(self.text.n_bytes(row, 1) for row in rows_BT)
        return nats / (math.log(2) * n_bytes)

    # ---------------------------------------------------------------- what both share

    @cached_property
    def _split(self) -> tuple[PackedSequences, PackedSequences]:
        """Training and held-out sequences, which a first short run packs."""
        config = self._config(RATES[NEW][0], max(2, STEPS // 10 // PILOT))
        grow(config, str(self.work))
        _, plan = plan_in(self.artifacts, config)
        return load_sequences(self.artifacts, plan.data_ref)

    def _config(self, rate: float, steps: int) -> StackWiseConfig:
        growth = {"training_objective": "clm", "target_stacks": self.n_stacks + 1, "train_head": False}
        training = {
            "batch_size": BATCH,
            "steps_per_stack": steps,
            "warmup_steps": steps // 10,
            "learning_rate": rate,
            "min_learning_rate": rate / 10,
            "progressive": growth,
        }
        return StackWiseConfig.from_dict(
            {
                "run": {"name": f"new-{rate:g}-{steps}"},
                "data": {"source": self.source, "seq_len": SEQ_LEN, "max_sequences": STEPS * BATCH, "sample": "first"},
                "model": {"from": "base", "blocks_per_stack": 2},
                "training": training,
                "validation": {"max_sequences": N_JUDGED},
                "hardware": {"device": "cpu", "threads": THREADS},
            }
        )

    def steps(self, side: str, steps: int) -> int:
        """Return the steps of a side whose FLOPs are those of `steps` of the new stack."""
        return steps if side == NEW else round(self.flops(NEW, steps) / self._step_flops())

    def flops(self, side: str, steps: int) -> float:
        """Return the FLOPs of a side: of the new stack with the pass of the frozen model."""
        if side == LORA:
            return self.steps(LORA, steps) * self._step_flops()
        _, plan = plan_in(self.artifacts, self._config(RATES[NEW][0], steps))
        return sum(stage_flops(plan.stages[-1].shape, plan.stages[-1].spec, SEQ_LEN, _PREDICTED))

    def _step_flops(self) -> float:
        """FLOPs of a step of LoRA: frozen matrices need no gradient of their own, so two products of three."""
        _, plan = plan_in(self.artifacts, self._config(RATES[NEW][0], STEPS))
        shape, n_blocks = plan.stages[-1].shape, sum(stack.n_blocks for stack in plan.stages[-1].spec.stacks[:-1])
        head = 2.0 * SEQ_LEN * _PREDICTED * shape.d_model * shape.vocab_size
        adapters = 2.0 * SEQ_LEN * n_adapter_parameters(shape, n_blocks, RANK)
        return BATCH * (2.0 * (stack_flops(shape, n_blocks, SEQ_LEN) + head) + 3.0 * adapters)


def _train(model: peft.PeftModel, rows: PackedSequences, rate: float, steps: int) -> None:
    """Train adapters with AdamW on batches without repetition, a warm-up of a tenth and a cosine to a tenth."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    warmup, order = steps // 10, np.random.default_rng(0).permutation(len(rows))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda n: (
            (n + 1) / warmup
            if n < warmup
            else 0.1 + 0.45 * (1 + math.cos(math.pi * (n - warmup) / max(1, steps - warmup)))
        ),
    )
    model.train()
    for n in range(steps):
        rows_BT, _ = rows.take(order[n * BATCH : (n + 1) * BATCH])
        loss = _nats(model, rows_BT).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()


def _nats(model: peft.PeftModel, rows_BT: IntArray) -> torch.Tensor:
    tokens = torch.from_numpy(rows_BT)
    logits_BTV = model(tokens[:, :-1]).logits.float()
    return F.cross_entropy(logits_BTV.transpose(1, 2), tokens[:, 1:], reduction="none")

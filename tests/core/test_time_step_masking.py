"""The masks of a configuration: every objective, every kind of time, every form of a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import BatchEncoding

from stackwise_core import ProgressiveRackBuilder, ProgressiveTrainer
from stackwise_core.config import StackWiseConfig
from stackwise_core.data.masks import MaskSpec, content_ids, hash_uniform
from stackwise_core.errors import ConfigError
from stackwise_core.objectives.dataloader import ProgressiveDataLoader
from stackwise_core.objectives.time_step_masking import TimeStepMasking

N, T, SEED = 6, 9, 2
TOKENS = torch.randint(0, 256, (N, T), generator=torch.Generator().manual_seed(8))
SPEC = MaskSpec(seed=SEED, ratio=0.5, corruption="bert", mask_token=256, n_regular_tokens=256)
_SALT_TIME = 6


def config_of(training: dict[str, Any] | None = None, **growth: Any) -> StackWiseConfig:
    values = {"time_interpretation": "depth", "max_stacks": 4, "time_per_stack": 3, **growth}
    return StackWiseConfig.model_validate(
        {
            "run": {"seed": SEED},
            "model": {"d_model": 16, "n_heads": 2, "blocks_per_stack": 1},
            "training": {"progressive": values, "steps_per_stack": 2, "warmup_steps": 0, **(training or {})},
            "hardware": {"device": "cpu", "threads": 1},
        }
    )


def timed(sampling: str = "per_batch", **training: Any) -> StackWiseConfig:
    given = {"time_sampling": sampling, **training}
    return config_of(given, time_interpretation="input", num_time_steps=20)


def masked_at(ratio: float, ids: Any, view: int = 0) -> list[list[bool]]:
    return SPEC.model_copy(update={"ratio": ratio}).masks(ids, view, T).tolist()


CONTENT = content_ids(TOKENS.numpy())


# ---------------------------------------------------------------- one ratio


@pytest.mark.parametrize("ratio", [0.15, 0.6])
def test_without_time_masks_have_the_ratio(ratio: float) -> None:
    strategy = TimeStepMasking(config_of({"mask_ratio": ratio}, time_interpretation="none"))
    expected = masked_at(ratio, CONTENT)
    assert strategy.generate_masks(TOKENS).tolist() == expected
    assert [strategy.generate_masks_for_stack(TOKENS, stack_idx).tolist() for stack_idx in (0, 7)] == [expected] * 2
    (batch,) = ProgressiveDataLoader([TOKENS], strategy)
    assert batch["masks"].tolist() == expected
    assert batch["time_step"] is None
    for ask in (strategy.time_steps, lambda batch: strategy.generate_masks_for_time_step(batch, 0)):
        with pytest.raises(ConfigError, match="time_interpretation: got 'none'; there are time steps only with"):
            ask(TOKENS)
    with pytest.raises(ConfigError, match="got 'none'; a stack has a time step only with depth"):
        strategy.get_time_step_for_stack(0)


# ---------------------------------------------------------------- objectives that mask nothing


@pytest.mark.parametrize("objective", ["clm", "custom"])
@pytest.mark.parametrize("interpretation", ["none", "depth"])
def test_other_objectives_mask_nothing_and_record_the_step(objective: str, interpretation: str) -> None:
    strategy = TimeStepMasking(config_of(time_interpretation=interpretation, training_objective=objective))
    assert strategy.spec_for_stack(2) is None
    for masks in (strategy.generate_masks(TOKENS), strategy.generate_masks_for_stack(TOKENS, stack_idx=2)):
        assert (masks.shape, masks.dtype, masks.any().item()) == (TOKENS.shape, torch.bool, False)
    raw = {"input_ids": TOKENS, **({"targets": TOKENS.flip(1)} if objective == "custom" else {})}
    (batch,) = ProgressiveDataLoader(base_dataloader=[raw], masking_strategy=strategy, stack_idx=2)
    assert batch["training_objective"] == objective
    assert batch["input_ids"].equal(TOKENS)
    assert batch["time_step"] == (6 if interpretation == "depth" else None)
    if interpretation == "depth":
        assert strategy.get_time_step_for_stack(stack_idx=2) == 6
        assert not strategy.generate_masks_for_time_step(TOKENS, 11).any()
        assert strategy.time_steps({"input_ids": TOKENS, "stack_idx": 2}).tolist() == [6] * N


def test_the_documents_loop_over_clm() -> None:
    """Its loss is that of every token but the first, by torch."""
    loader = ProgressiveDataLoader(
        base_dataloader=list(TOKENS.split(4)),
        masking_strategy=TimeStepMasking(config_of(training_objective="clm")),
        stack_idx=0,
        trunk_activations=None,
        cache_activations=True,
    )
    logits_of = torch.randn(N, T, 256, generator=torch.Generator().manual_seed(1))
    sums, counts, first = 0.0, 0, 0
    for batch in loader:
        assert batch["training_objective"] == "clm"
        assert batch["clm_mask"].tolist() == [[True] * (T - 1) + [False]] * len(batch["input_ids"])
        loss_mask = batch["combined_masks"]
        logits = logits_of[first : first + len(loss_mask)]
        first += len(loss_mask)
        sums += nn.functional.cross_entropy(logits[loss_mask], batch["targets"][loss_mask], reduction="sum").item()
        counts += int(loss_mask.sum())
    expected = nn.functional.cross_entropy(logits_of[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    assert len(loader) == 2
    assert sums / counts == pytest.approx(expected.item(), rel=1e-5)


# ---------------------------------------------------------------- depth


def test_masks_by_stack_and_by_step() -> None:
    strategy, ids = TimeStepMasking(config_of()), np.arange(N, dtype=np.int64) - 3
    for stack_idx in range(4):
        step = strategy.get_time_step_for_stack(stack_idx)
        spec = strategy.spec_for_stack(stack_idx)
        ratio = 0.15 + 0.75 * 3 * stack_idx / 11
        assert step == 3 * stack_idx
        assert spec is not None
        assert spec.ratio == pytest.approx(ratio, rel=1e-12)
        assert spec == SPEC.model_copy(update={"ratio": spec.ratio})
        masks = strategy.generate_masks_for_stack(TOKENS, stack_idx, torch.from_numpy(ids), 5)
        assert masks.dtype == torch.bool
        assert masks.tolist() == masked_at(ratio, ids, 5)
        assert strategy.generate_masks_for_time_step(TOKENS, step, ids, 5).equal(masks)
        batch = {"input_ids": TOKENS, "sequence_ids": ids, "view": 5, "stack_idx": stack_idx}
        assert strategy.generate_masks(batch).equal(masks)
        assert strategy.time_steps(batch).tolist() == [step] * N
        (loaded,) = ProgressiveDataLoader([batch], strategy, stack_idx)
        assert loaded["masks"].equal(masks)
        assert (loaded["time_step"], loaded["stack_idx"], loaded["training_objective"]) == (step, stack_idx, "mlm")
    lightest, heaviest = (strategy.generate_masks_for_time_step(TOKENS, step) for step in (0, 11))
    assert not (lightest & ~heaviest).any()
    assert heaviest.sum() > lightest.sum()


def test_depth_needs_to_know_the_stack() -> None:
    strategy = TimeStepMasking(config_of())
    for ask in (strategy.generate_masks, strategy.time_steps):
        with pytest.raises(ConfigError, match=r"batch: got no stack_idx; .*call generate_masks_for_stack\(batch"):
            ask({"input_ids": TOKENS})


# ---------------------------------------------------------------- an input


def test_steps_are_drawn_as_in_training() -> None:
    """s = floor(u T), u the hash of the batch's number and view; stratified adds each row's place."""
    for view, number in ((0, 0), (0, 1), (3, 1)):
        batch = {"input_ids": TOKENS, "view": view, "batch": number}
        u = hash_uniform(SEED, _SALT_TIME, number, view)[0]
        assert TimeStepMasking(timed()).time_steps(batch).tolist() == [int(u * 20)] * N
        spread = [int((u + row / N) % 1.0 * 20) for row in range(N)]
        assert TimeStepMasking(timed("stratified")).time_steps(batch).tolist() == spread
        u_B = hash_uniform(SEED, _SALT_TIME, CONTENT, view)
        assert TimeStepMasking(timed("per_sequence")).time_steps(batch).tolist() == (u_B * 20).astype(int).tolist()


def test_a_batch_without_a_number_has_a_step_of_its_own() -> None:
    """The same for the same rows; over many batches every step comes equally often."""
    strategy = TimeStepMasking(timed())
    tokens = torch.randint(0, 256, (600, 2, 3), generator=torch.Generator().manual_seed(0))
    steps = torch.stack([strategy.time_steps(batch) for batch in tokens])
    assert steps[:, 0].equal(steps[:, 1])
    counts = steps[:, 0].bincount(minlength=20)
    assert (counts - 30).abs().max() < 5 * (600 * 0.05 * 0.95) ** 0.5
    assert strategy.time_steps(tokens[7]).equal(steps[7])
    assert strategy.time_steps(tokens[7].flip(0)).equal(steps[7])
    assert not torch.stack([strategy.time_steps(batch, view=1) for batch in tokens[:50]]).equal(steps[:50])


@pytest.mark.parametrize("elbo", [False, True])
def test_masks_of_drawn_steps_have_their_ratios(elbo: bool) -> None:
    how = {"loss_weighting": "elbo", "corruption": "mask"} if elbo else {}
    strategy = TimeStepMasking(timed("per_sequence", **how))
    steps = strategy.time_steps(TOKENS)
    ratios = 0.999 * (steps + 0.5) / 20 + 1e-3 if elbo else 0.15 + 0.75 * steps / 19
    u = torch.from_numpy(hash_uniform(SEED, 1, CONTENT[:, None], 0, np.arange(T)[None]))
    expected = u < ratios[:, None]
    assert strategy.generate_masks(TOKENS).equal(expected)
    assert strategy.generate_masks_for_stack(TOKENS, stack_idx=3).equal(expected)
    assert strategy.generate_masks_for_time_step(TOKENS, steps).equal(expected)
    for row, step in enumerate(steps):
        masks = strategy.generate_masks_for_time_step(TOKENS[row : row + 1], step)  # a tensor without dimensions
        assert masks.equal(expected[row : row + 1])
    with pytest.raises(ConfigError, match="time_interpretation: got 'input'; a stack has a time step only"):
        strategy.get_time_step_for_stack(0)


# ---------------------------------------------------------------- what a loader makes, and what users write


CONFIGURATIONS = {
    "none": lambda: config_of(time_interpretation="none"),
    "depth": config_of,
    "per batch": timed,
    "per sequence": lambda: timed("per_sequence"),
    "stratified": lambda: timed("stratified"),
}


@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_a_batch_of_a_loader_has_the_masks_it_was_made_with(kind: str) -> None:
    """From its own fields, although its inputs are corrupted and its number is gone."""
    strategy = TimeStepMasking(CONFIGURATIONS[kind]())
    loader = ProgressiveDataLoader(TOKENS.split(2), strategy, stack_idx=2, views=2)
    for batch in [*loader, *loader]:
        assert strategy.generate_masks(batch).equal(batch["masks"])
        if isinstance(batch["time_step"], Tensor):
            assert strategy.time_steps(batch).equal(batch["time_step"])


FORMS: list[Any] = [
    TOKENS.int(),
    TOKENS.numpy(),
    TOKENS.tolist(),
    {"input_ids": TOKENS},
    {"input_ids": TOKENS.tolist(), "token_type_ids": torch.zeros(N, T), "text": ["x"] * N},
    BatchEncoding({"input_ids": TOKENS, "attention_mask": torch.ones(N, T, dtype=torch.int64)}),
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: type(form).__name__)
def test_forms_of_a_batch(form: Any) -> None:
    strategy = TimeStepMasking(timed())
    expected = strategy.generate_masks(TOKENS)
    assert strategy.generate_masks(form).equal(expected)
    assert strategy.generate_masks_for_stack(form, stack_idx=2).equal(expected)
    assert strategy.generate_masks_for_time_step(form, 19).sum() > strategy.generate_masks_for_time_step(form, 0).sum()


def test_masks_stay_off_padding_and_special_tokens() -> None:
    """[CLS] at the front, padding at the back, as a tokenizer of Hugging Face says it."""
    attended, special = torch.ones(N, T, dtype=torch.int64), torch.zeros(N, T, dtype=torch.int64)
    attended[:, 6:], special[:, 0] = 0, 1
    batch = {"input_ids": TOKENS, "attention_mask": attended, "special_tokens_mask": special}
    for config in (config_of(time_interpretation="none"), timed()):
        config.training.mask_ratio, config.training.mask_ratio_table = 1.0, [1.0] * 20
        masks = TimeStepMasking(config).generate_masks(batch)
        assert masks.equal((attended == 1) & (special == 0))


# ---------------------------------------------------------------- configurations that change, or make no sense


def test_edits_of_the_configuration_take_effect() -> None:
    config, computed = config_of(time_interpretation="none"), list[int]()

    def trunk(input_ids: Tensor) -> Tensor:
        computed.append(len(input_ids))
        return input_ids[..., None].float()

    strategy = TimeStepMasking(config)
    loader = ProgressiveDataLoader([TOKENS], strategy, 1, trunk, cache_activations=True)
    for change in ({}, {"mask_ratio": 0.9}, {"time_interpretation": "depth"}, {"training_objective": "clm"}):
        for name, value in change.items():
            setattr(config.training if name == "mask_ratio" else config.training.progressive, name, value)
        for batch in [*loader, *loader]:
            assert batch["trunk_activations"][..., 0].equal(batch["input_ids"].float())
            assert batch["training_objective"] == config.training.progressive.training_objective
            if strategy.objective == "mlm":
                assert batch["masks"].equal(strategy.generate_masks(batch))
    assert batch["time_step"] == 3
    assert computed == [N] * 4
    config.training.progressive.time_interpretation = "input"
    for ask in (lambda: strategy.generate_masks(TOKENS), lambda: list(loader)):
        with pytest.raises(ConfigError, match="time as an input needs corrupted inputs"):
            ask()


def test_no_such_stack_or_step() -> None:
    strategy = TimeStepMasking(config_of())
    for stack_idx in (-1, 4):
        with pytest.raises(ConfigError, match=f"stack_idx: got {stack_idx}"):
            strategy.generate_masks_for_stack(TOKENS, stack_idx)
    for step in (-1, 12, torch.tensor([0, 1, 2, 3, 4, 12])):
        with pytest.raises(ConfigError, match=rf"time_step: got {12 if isinstance(step, Tensor) else step};"):
            strategy.generate_masks_for_time_step(TOKENS, step)
    with pytest.raises(ConfigError, match="time_step: got 2 steps; one, or one for each of 6 rows"):
        strategy.generate_masks_for_time_step(TOKENS, torch.tensor([0, 1]))
    with pytest.raises(ConfigError, match="input_ids of float32"):
        strategy.generate_masks_for_time_step(torch.rand(2, 3), 0)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_time_steps": 4}, "stack 2 gets the step 6"),
        ({"time_interpretation": "input", "training_objective": "clm"}, "time as an input needs corrupted inputs"),
    ],
)
def test_a_strategy_without_sense_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        TimeStepMasking(config_of(**changes))


def test_mlm_needs_a_token_to_mask_with(tmp_path: Path) -> None:
    Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    config = config_of()
    config.data.tokenizer = str(tmp_path / "tokenizer.json")
    with pytest.raises(ConfigError, match=r"data.tokenizer: got .*neither \[MASK\] nor <mask>, which mlm needs"):
        TimeStepMasking(config).generate_masks_for_stack(TOKENS, 0)


def test_a_loader_and_its_strategy_agree() -> None:
    strategy = TimeStepMasking(config_of())
    assert ProgressiveDataLoader([TOKENS], strategy, 2, time_step=6, objective="mlm").time_step == 6
    with pytest.raises(ConfigError, match="time_step: got 5; the masking strategy gives stack 2 the step 6"):
        ProgressiveDataLoader([TOKENS], strategy, 2, time_step=5)
    with pytest.raises(ConfigError, match="objective: got 'clm'; the masking strategy's configuration says mlm"):
        ProgressiveDataLoader([TOKENS], strategy, objective="clm")


# ---------------------------------------------------------------- a wrapped loader in the trainer


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("objective", "interpretation"), [("mlm", "none"), ("mlm", "input"), ("clm", "depth"), ("custom", "depth")]
)
def test_a_wrapped_loader_trains_as_the_loader_it_wraps(objective: str, interpretation: str) -> None:
    config = config_of(training_objective=objective, time_interpretation=interpretation)
    loader = [{"input_ids": rows} for rows in TOKENS.split(3)]
    if objective == "custom":
        loader = [{**batch, "labels": batch["input_ids"].flip(1)} for batch in loader]
    wrapped = ProgressiveDataLoader(base_dataloader=loader, masking_strategy=TimeStepMasking(config))
    losses: list[list[float]] = []
    for dataloader in (loader, wrapped):
        results = ProgressiveTrainer(config).train_progressively(
            ProgressiveRackBuilder(config=config), dataloader, target_stacks=2, validation=dataloader
        )
        losses.append([record["loss"] for result in results for record in result.records])
        losses[-1] += [result.validation_loss or 0.0 for result in results]
    assert losses[0] == losses[1]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_a_wrapped_loader_that_names_no_objective_fits_every_one(objective: str) -> None:
    config, loader = config_of(training_objective=objective), ProgressiveDataLoader([TOKENS])
    builder = ProgressiveRackBuilder(config=config)
    assert len(ProgressiveTrainer(config).train_progressively(builder, loader, target_stacks=1)) == 1


@pytest.mark.parametrize(("wrapped", "trained"), [("clm", "mlm"), ("mlm", "clm"), ("custom", "clm")])
def test_a_wrapped_loader_of_another_objective_is_refused(wrapped: str, trained: str) -> None:
    strategy = TimeStepMasking(config_of(training_objective=wrapped))
    loader = ProgressiveDataLoader([{"input_ids": TOKENS, "targets": TOKENS}], strategy)
    config = config_of(training_objective=trained)
    builder = ProgressiveRackBuilder(config=config)
    with pytest.raises(ConfigError, match="make the two equal"):
        ProgressiveTrainer(config).train_progressively(builder, loader, target_stacks=1)

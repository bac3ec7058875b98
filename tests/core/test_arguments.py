"""The library's front door: whatever a caller gets wrong is told with the argument, its value and what is allowed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from stackwise_core import (
    MaskSpec,
    ProgressiveDataLoader,
    ProgressiveRackBuilder,
    ProgressiveTrainer,
    StackWiseConfig,
    TimeStepMasking,
    create_stack_from_config,
)
from stackwise_core.errors import ConfigError

pytestmark = pytest.mark.usefixtures("one_thread")

N, T, BATCH = 24, 12, 8
TOKENS = torch.randint(0, 256, (N, T), generator=torch.Generator().manual_seed(0))
BATCHES = list(TOKENS.split(BATCH))
MASKS = MaskSpec(seed=0, ratio=0.3, corruption="bert", mask_token=256, n_regular_tokens=256)


def config_of(**growth: Any) -> StackWiseConfig:
    config = StackWiseConfig()
    config.model.d_model, config.model.n_heads, config.model.blocks_per_stack = 16, 2, 1
    config.training.steps_per_stack, config.training.warmup_steps, config.training.batch_size = 4, 1, BATCH
    config.hardware.threads, config.hardware.device = 1, "cpu"
    for name, value in growth.items():
        setattr(config.training.progressive, name, value)
    return config


def builder_of(n_stacks: int = 0) -> ProgressiveRackBuilder:
    builder = ProgressiveRackBuilder(config_of())
    for _ in range(n_stacks):
        builder.append_stack()
    return builder


def loaded(**arguments: Any) -> Any:
    return next(iter(ProgressiveDataLoader(**{"base_dataloader": BATCHES, **arguments})))


def trained(**arguments: Any) -> Any:
    given = {"rack_builder": builder_of(), "dataloader": BATCHES, "target_stacks": 1, **arguments}
    return ProgressiveTrainer(config_of()).train_progressively(**given)


def masking() -> TimeStepMasking:
    return TimeStepMasking(config_of(time_interpretation="depth"))


ANY: Any = None
"""What a type checker would not let pass."""

CALLS: list[tuple[str, Callable[[], object]]] = [
    ("base_dataloader: got None; anything that yields", lambda: ProgressiveDataLoader(base_dataloader=ANY)),
    ("base_dataloader: got 3; anything that yields", lambda: loaded(base_dataloader=3)),
    ("base_dataloader: got 'abc'; anything that yields", lambda: loaded(base_dataloader="abc")),
    ("base_dataloader: got dict; anything that yields", lambda: loaded(base_dataloader={"input_ids": TOKENS})),
    (r"base_dataloader: got Tensor of torch.int64 and shape \(24, 12\); rows", lambda: loaded(base_dataloader=TOKENS)),
    ("got input_ids of int64 and shape .12,.; .*one row: group", lambda: loaded(base_dataloader=[TOKENS[0]])),
    ("base_dataloader: got no batch from list; every epoch", lambda: list(ProgressiveDataLoader([]))),
    (
        "base_dataloader: view: got 'x'; one integer",
        lambda: loaded(base_dataloader=[{"input_ids": TOKENS, "view": "x"}]),
    ),
    ("views: got 0; an integer of at least 1", lambda: loaded(views=0)),
    ("views: got '2'; an integer", lambda: loaded(views="2")),
    ("views: got 1.5; an integer", lambda: loaded(views=1.5)),
    ("views: got True; an integer", lambda: loaded(views=True)),
    ("stack_idx: got -1; an integer of at least 0", lambda: loaded(stack_idx=-1)),
    ("stack_idx: got '1'; an integer", lambda: loaded(stack_idx="1")),
    ("masking_strategy: got 'bert'; a MaskSpec, a TimeStepMasking", lambda: loaded(masking_strategy="bert")),
    ("objective: got 'CLM'; 'mlm' or 'clm' or 'custom'", lambda: loaded(objective="CLM")),
    ("time_step: got '3'; an integer", lambda: loaded(masking_strategy=MASKS, time_step="3")),
    ("cache_activations: got 'no'; True or False", lambda: loaded(cache_activations="no")),
    ("max_cache_bytes: got -1; an integer of at least 0", lambda: loaded(max_cache_bytes=-1)),
    ("max_cache_bytes: got 1.5; an integer", lambda: loaded(max_cache_bytes=1.5)),
    (
        r"trunk_activations: got Tensor .*\(24, 12\); a tensor \[N, T, D\]",
        lambda: loaded(trunk_activations=TOKENS.float()),
    ),
    ("trunk_activations: got Tensor of torch.int64", lambda: loaded(trunk_activations=TOKENS[..., None])),
    ("trunk_activations: got ndarray of float64", lambda: loaded(trunk_activations=np.zeros((N, T, 16)))),
    (r"got Tensor .*\(8, 11, 16\); .* here \(8, 12, D\)", lambda: loaded(trunk_activations=torch.zeros(N, 11, 16))),
    (r"trunk_activations: got Tensor .*\(8, 12\); a", lambda: loaded(trunk_activations=lambda tokens: tokens)),
    (
        r"trunk_activations: got None; a tensor \[B, T, D\]",
        lambda: loaded(trunk_activations=lambda tokens: None, cache_activations=True),
    ),
    ("rack_builder: got None; a ProgressiveRackBuilder", lambda: trained(rack_builder=None)),
    ("rack_builder: got None; a ProgressiveRackBuilder", lambda: ProgressiveTrainer().train_rack(ANY, BATCHES)),
    ("dataloader: got None; anything that yields", lambda: trained(dataloader=None)),
    ("dataloader: got None; anything that yields", lambda: ProgressiveTrainer().train_rack(builder_of(1), ANY)),
    ("target_stacks: got 0; a number of stacks from 1 to 12", lambda: trained(target_stacks=0)),
    ("target_stacks: got '3'; a number of stacks from 1 to 12", lambda: trained(target_stacks="3")),
    ("target_stacks: got True; a number", lambda: trained(target_stacks=True)),
    ("the rack has no stack yet", lambda: ProgressiveTrainer(config_of()).train_rack(builder_of(), BATCHES)),
    ("cache: got list; a mapping", lambda: trained(cache=[1])),
    (r"cache\[1\]: got 3; an object with rows", lambda: trained(cache={1: 3})),
    ("hooks: got builtin_function_or_method; a Hooks", lambda: trained(hooks=print)),
    (r"config: got 'run.yaml'; a StackWiseConfig .* from_yaml", lambda: ProgressiveTrainer("run.yaml")),  # pyright: ignore
    ("config: got dict; a StackWiseConfig", lambda: ProgressiveRackBuilder({})),  # pyright: ignore
    ("config: got None; a StackWiseConfig", lambda: create_stack_from_config(ANY)),
    ("config: got None; a StackWiseConfig", lambda: TimeStepMasking(ANY)),
    ("configuration: got None; nested mappings", lambda: StackWiseConfig.from_dict(ANY)),
    ("stack_id: got 12; an integer from 0 to 11", lambda: create_stack_from_config(config_of(), 12)),
    ("stack_id: got -1; an integer", lambda: create_stack_from_config(config_of(), -1)),
    ("n_blocks: got 0; an integer from 1", lambda: create_stack_from_config(config_of(), n_blocks=0)),
    ("precision: got 'int4'; 'full' or", lambda: create_stack_from_config(config_of(), precision=cast(Any, "int4"))),
    ("building_mode: got 'middle'; 'append'", lambda: ProgressiveRackBuilder(building_mode=cast(Any, "middle"))),
    ("default_precision: got 16; 'full' or", lambda: ProgressiveRackBuilder(default_precision=cast(Any, 16))),
    ("model.d_model: got '32'", lambda: ProgressiveRackBuilder(d_model="32")),
    ("width: got 32; there is no such dimension", lambda: ProgressiveRackBuilder(width=32)),
    ("n_blocks: got '2'; an integer from 1 to 128", lambda: builder_of().append_stack(n_blocks="2")),  # pyright: ignore
    ("n_blocks: got 0; an integer from 1 to 128", lambda: builder_of().prepend_stack(n_blocks=0)),
    ("precision: got ''; 'full' or", lambda: builder_of().append_stack(precision="")),  # pyright: ignore
    ("precision: got dtype; 'full' or", lambda: builder_of().append_stack(precision=torch.half)),  # pyright: ignore
    ("indices: got 0; a list of creation indices", lambda: builder_of(2).freeze_trunk(0)),  # pyright: ignore
    ("index: got '0'; the rack has stacks 0 to 1", lambda: builder_of(2).freeze_trunk(["0"])),  # pyright: ignore
    ("indices: got 0; a list of creation indices", lambda: builder_of(2).freeze_all_but_qlora(0)),  # pyright: ignore
    ("index: got 3; the rack has no stack yet", lambda: builder_of().stack(3)),
    ("stack_idx: got '1'; an integer from 0 to 11", lambda: masking().get_time_step_for_stack("1")),  # pyright: ignore
    ("stack_idx: got 12; an integer from 0 to 11", lambda: masking().generate_masks_for_stack(TOKENS, 12)),
    ("time_step: got 1.0; an integer", lambda: masking().generate_masks_for_time_step(TOKENS, 1.0)),  # pyright: ignore
    ("time_step: got 99; an integer from 0 to 11", lambda: masking().generate_masks_for_time_step(TOKENS, 99)),
    ("view: got 'x'; an integer", lambda: masking().generate_masks_for_stack(TOKENS, 1, view="x")),  # pyright: ignore
    ("batch: got input_ids of int64 and shape .12,.", lambda: masking().generate_masks_for_stack(TOKENS[0], 1)),
    (
        "got 3 sequence_ids for 24 rows",
        lambda: masking().generate_masks_for_stack(TOKENS, 1, torch.arange(3)),
    ),
]


@pytest.mark.parametrize(("says", "call"), CALLS, ids=[f"{n}: {says[:40]}" for n, (says, _) in enumerate(CALLS)])
def test_a_wrong_argument_is_named(says: str, call: Callable[[], object]) -> None:
    with pytest.raises(ConfigError, match=says):
        call()


@pytest.mark.parametrize(
    "change",
    [{"ratio": 1.5}, {"ratio": -0.1}, {"seed": -1}, {"mask_token": -1}, {"n_regular_tokens": 0}, {"corruption": "x"}],
)
def test_a_mask_that_cannot_be_is_no_mask(change: dict[str, Any]) -> None:
    (name,) = change
    with pytest.raises(ValidationError, match=name):
        MaskSpec(**{**MASKS.model_dump(), **change})


def test_nothing_is_frozen_if_one_of_the_indices_is_wrong() -> None:
    builder = builder_of(2)
    with pytest.raises(ConfigError, match="index: got 5"):
        builder.freeze_trunk([0, 5])
    assert all(parameter.requires_grad for parameter in builder.stack(0).parameters())


def test_a_stack_of_a_librarys_own_vocabulary() -> None:
    """No tokenizer is asked: the caller brings tokens."""
    config = config_of(training_objective="clm")
    config.model.vocab_size = 100
    assert len(create_stack_from_config(config, stack_id=3).blocks) == 1


# ---------------------------------------------------------------- loaders


def one_shot(n_batches: int) -> Iterator[Tensor]:
    yield from itertools.islice(itertools.cycle(BATCHES), n_batches)


@pytest.mark.parametrize("n_batches", [0, 3, 4])
@pytest.mark.parametrize("make", [one_shot, lambda n: map(torch.clone, one_shot(n)), lambda n: zip(one_shot(n))])
def test_a_loader_that_can_be_read_once_is_told(make: Callable[[int], Any], n_batches: int) -> None:
    """Three batches end within the first stage of four steps, four at its end."""
    builder = builder_of()
    says = r"base_dataloader: got an exhausted iterator; every epoch .* give a list of batches, .* __iter__"
    with pytest.raises(ConfigError, match=says):
        trained(rack_builder=builder, dataloader=make(n_batches), target_stacks=2)
    assert builder.n_trained == n_batches // 4
    wrapped = ProgressiveDataLoader(make(3))
    assert len(list(wrapped)) == 3
    with pytest.raises(ConfigError, match=says):
        list(wrapped)


def test_a_stream_without_an_end_is_no_loader_that_can_be_read_once() -> None:
    assert len(trained(dataloader=itertools.cycle(BATCHES), target_stacks=2)) == 2


ROWS = [{"input_ids": row} for row in TOKENS]


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_of_torch_give_the_same_batches(workers: int) -> None:
    """Of tensors, tuples and dicts, in this process and in others."""
    for dataset in (TOKENS, TensorDataset(TOKENS, TOKENS), ROWS):
        base: DataLoader[Any] = DataLoader(dataset, batch_size=BATCH, num_workers=workers)  # pyright: ignore
        wrapped = ProgressiveDataLoader(base_dataloader=base, masking_strategy=MASKS, stack_idx=1)
        for found, wanted in zip(wrapped, ProgressiveDataLoader(BATCHES, MASKS, 1), strict=True):
            assert found["input_ids"].equal(wanted["input_ids"])
            assert found["targets"].equal(wanted["targets"])
            assert found["sequence_ids"].equal(wanted["sequence_ids"])

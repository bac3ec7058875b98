"""Batches as users of torch and Hugging Face write them: their forms, padding, and labels of -100.

Losses are compared with torch's cross-entropy and its `ignore_index`, or with that of transformers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding, DataCollatorForLanguageModeling, PreTrainedTokenizerFast
from transformers.loss.loss_utils import ForCausalLMLoss

from stackwise_core import ProgressiveRackBuilder, ProgressiveTrainer, TimeStepMasking
from stackwise_core.config import StackWiseConfig
from stackwise_core.data.masks import MaskSpec, TimeInput
from stackwise_core.errors import ConfigError
from stackwise_core.model.blocks import Head, initialise
from stackwise_core.model.rack import Rack
from stackwise_core.objectives.dataloader import ProgressiveDataLoader
from stackwise_core.objectives.losses import loss_normaliser, loss_positions, summed_loss
from stackwise_core.objectives.make_batch import make_batch
from stackwise_core.stages.resolve import ModelShape

pytestmark = pytest.mark.usefixtures("one_thread")

B, T, D = 4, 8, 16
TOKENS = torch.randint(0, 256, (B, T), generator=torch.Generator().manual_seed(3))
LENGTHS = [8, 5, 1, 0]
RIGHT = (torch.arange(T) < torch.tensor(LENGTHS)[:, None]).long()
MIDDLE = torch.tensor([[1, 1, 0, 1, 1, 1, 1, 1]]).expand(B, T)
MASKS = MaskSpec(seed=4, ratio=0.5, corruption="mask", mask_token=256, n_regular_tokens=256)


def config_of(objective: str, attention: str = "auto", **training: Any) -> StackWiseConfig:
    return StackWiseConfig.model_validate(
        {
            "model": {"d_model": D, "n_heads": 2, "blocks_per_stack": 1, "attention": attention},
            "training": {
                "progressive": {"training_objective": objective},
                "steps_per_stack": 1,
                "warmup_steps": 0,
                "min_learning_rate": 0.0,
                "learning_rate": 1e-30,  # so that the rack afterwards is the one whose loss was computed
                **training,
            },
            "hardware": {"device": "cpu", "threads": 1},
        }
    )


def trained(config: StackWiseConfig, batch: Any, target: int = 2) -> tuple[Rack, list[float]]:
    """The rack, and the losses of its last stage: of the step and of the validation."""
    builder = ProgressiveRackBuilder(config=config)
    last = ProgressiveTrainer(config).train_progressively(builder, [batch], target, validation=[batch])[-1]
    assert last.validation_loss is not None
    return builder.build_rack(), [last.loss, last.validation_loss]


def batch_of(objective: Any, raw: dict[str, Any]) -> dict[str, Any]:
    return make_batch(raw, MASKS if objective == "mlm" else None, objective)


# ---------------------------------------------------------------- padding


def shifted(attention: Tensor) -> Tensor:
    """The targets that torch is given: the next token, unless one of the two is padding."""
    next_token = F.pad(TOKENS[:, 1:], (0, 1), value=-100)
    return next_token.where(attention.bool() & F.pad(attention[:, 1:], (0, 1)).bool(), -100)


@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.bool])
def test_padding_on_the_right_is_as_if_it_were_not_there(kind: torch.dtype) -> None:
    raw = {"input_ids": TOKENS, "attention_mask": RIGHT.to(kind)}
    rack, losses = trained(config_of("clm"), raw)
    with torch.no_grad():
        dense = F.cross_entropy(rack(TOKENS).flatten(0, 1), shifted(RIGHT).flatten(), ignore_index=-100)
        alone = [F.cross_entropy(rack(TOKENS[n : n + 1, :-1])[0, : k - 1], TOKENS[n, 1:k], reduction="sum")
                 for n, k in enumerate(LENGTHS) if k > 1]  # fmt: skip
    assert losses == pytest.approx([dense.item()] * 2, rel=1e-5)
    assert dense.item() == pytest.approx(sum(loss.item() for loss in alone) / (7 + 4), rel=1e-5)
    other_padding = {**raw, "input_ids": TOKENS.where(RIGHT.bool(), 9)}
    assert trained(config_of("clm"), other_padding)[1] == losses


@pytest.mark.parametrize("objective", ["clm", "mlm", "custom"])
def test_a_loss_beside_padding_equals_that_of_torch(objective: Any) -> None:
    """With gradients, and the number that it is divided by."""
    targets = {"clm": shifted(RIGHT), "mlm": TOKENS, "custom": TOKENS.flip(1)}[objective]
    raw = {"input_ids": TOKENS, "attention_mask": RIGHT, **({"targets": targets} if objective == "custom" else {})}
    batch = batch_of(objective, raw)
    expected = targets.where(RIGHT.bool(), -100)
    if objective == "mlm":
        drawn = torch.from_numpy(MASKS.masks(batch["sequence_ids"].numpy(), 0, T))
        expected = expected.where(drawn, -100)
        assert batch["input_ids"].equal(torch.where(drawn & RIGHT.bool(), 256, TOKENS))
        assert (drawn & ~RIGHT.bool()).any()
    head = Head(ModelShape(vocab_size=257, d_model=D, n_heads=2, n_kv_heads=2, d_ff=16, causal=True))
    initialise(head, 3)
    hidden = [torch.randn(B, T, D, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2)]
    total, count = summed_loss(hidden[0], head, batch)
    dense = F.cross_entropy(head(hidden[1]).flatten(0, 1), expected.flatten(), ignore_index=-100)
    assert count == int((expected != -100).sum()) > 5
    torch.testing.assert_close(total / count, dense)
    for loss in (total / count, dense):
        loss.backward()
    torch.testing.assert_close(hidden[0].grad, hidden[1].grad)


def test_a_loss_of_clm_needs_two_tokens() -> None:
    batch = batch_of("clm", {"input_ids": TOKENS, "attention_mask": MIDDLE})
    wanted = [[True, False, False, True, True, True, True]] * B
    assert batch["masks"].tolist() == [[*row, True] for row in wanted]
    assert loss_positions(batch).tolist() == [[*row, False] for row in wanted]
    ends = batch_of("clm", {"input_ids": TOKENS, "attention_mask": RIGHT})
    assert ends["masks"][:, -1].equal(RIGHT[:, -1].bool())


def test_padding_changes_no_id_and_no_mask_of_the_tokens() -> None:
    plain, padded = (batch_of("mlm", {"input_ids": TOKENS, **more}) for more in ({}, {"attention_mask": RIGHT}))
    assert padded["sequence_ids"].equal(plain["sequence_ids"])
    assert padded["masks"].equal(plain["masks"] & RIGHT.bool())
    assert padded["attention_mask"].equal(RIGHT.bool())


@pytest.mark.parametrize("objective", ["clm", "mlm", "custom"])
def test_without_padding_an_attention_mask_says_nothing(objective: Any) -> None:
    raw = {"input_ids": TOKENS, **({"targets": TOKENS} if objective == "custom" else {})}
    plain, ones, none = (
        batch_of(objective, {**raw, **more})
        for more in ({}, {"attention_mask": torch.ones(B, T).long()}, {"attention_mask": None})
    )
    assert plain.keys() == ones.keys() == none.keys()
    assert all(ones[name].equal(value) and none[name].equal(value) for name, value in plain.items())
    trained(config_of(objective), {**raw, "attention_mask": np.ones((B, T), dtype=bool)})


BIDIRECTIONAL = r"attention_mask: got padding; attention is bidirectional .*pack sequences .* clm with padding on the"
BEFORE = "attention_mask: got padding before a token; blocks take no padding mask.*pad on the right"


@pytest.mark.parametrize(
    ("objective", "attention", "mask", "says"),
    [
        ("clm", "auto", RIGHT.flip(1), BEFORE),
        ("clm", "auto", MIDDLE, BEFORE),
        ("mlm", "auto", RIGHT, BIDIRECTIONAL),
        ("mlm", "causal", MIDDLE, BEFORE),
        ("custom", "auto", MIDDLE, BEFORE),
        ("custom", "bidirectional", RIGHT, BIDIRECTIONAL),
        ("mlm", "causal", RIGHT, None),
        ("custom", "auto", RIGHT, None),
    ],
)
@pytest.mark.parametrize("where", ["training", "validation", "strategy"])
def test_padding_that_a_token_would_see_is_refused(
    objective: str, attention: str, mask: Tensor, says: str | None, where: str
) -> None:
    config = config_of(objective, attention, mask_ratio=0.9)
    good = {"input_ids": TOKENS, **({"targets": TOKENS.flip(1)} if objective == "custom" else {})}
    bad, builder = {**good, "attention_mask": mask}, ProgressiveRackBuilder(config=config)

    def use() -> None:
        if where == "strategy":
            list(ProgressiveDataLoader([bad], TimeStepMasking(config)))
        else:
            loaders = {"dataloader": [good], "validation": [good]}
            loaders["dataloader" if where == "training" else "validation"] = [bad]
            ProgressiveTrainer(config).train_progressively(builder, target_stacks=1, **loaders)

    if says is None:
        use()
    else:
        with pytest.raises(ConfigError, match=says):
            use()


def test_a_loader_knows_that_clm_is_causal() -> None:
    with pytest.raises(ConfigError, match=BEFORE):
        list(ProgressiveDataLoader([{"input_ids": TOKENS, "attention_mask": MIDDLE}]))


def test_the_bound_counts_what_may_be_masked() -> None:
    """Its weights stand for the positions that were drawn from: neither padding nor special tokens."""
    time = TimeInput(n_steps=8, sampling="per_sequence", ratio_min=0.0, ratio_max=0.0, elbo=True)
    spec = MASKS.model_copy(update={"time": time})
    special = torch.zeros(B, T, dtype=torch.int64)
    special[:, 0] = 1
    raw = {"input_ids": TOKENS, "attention_mask": RIGHT, "special_tokens_mask": special}
    assert loss_normaliser(make_batch({"input_ids": TOKENS}, spec, "mlm")) == B * T
    batch = make_batch(raw, spec, "mlm")
    assert loss_normaliser(batch) == sum(max(0, length - 1) for length in LENGTHS)
    assert not (loss_positions(batch) & ((RIGHT == 0) | (special == 1))).any()


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (RIGHT[:, 1:], r"attention_mask: got \(4, 7\); the shape of input_ids, \(4, 8\)"),
        (RIGHT[:, None, None], r"attention_mask: got \(4, 1, 1, 8\)"),
        (RIGHT.float(), "attention_mask of float32; booleans, or zeros and ones"),
        (RIGHT * 2, "attention_mask of int64; booleans, or zeros and ones"),
        ([[1], [1, 0]], "attention_mask of rows that differ in length"),
    ],
)
def test_another_attention_mask_is_refused(mask: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        batch_of("clm", {"input_ids": TOKENS, "attention_mask": mask})


# ---------------------------------------------------------------- labels


PROMPT = TOKENS.where(torch.arange(T) >= 3, -100)
"""Labels as for a model of Hugging Face, which shifts them: no loss for the first three tokens."""


def test_labels_of_a_prompt_carry_no_loss() -> None:
    """As transformers computes it from the same labels; labels that are shifted already say the same."""
    rack, losses = trained(config_of("clm"), {"input_ids": TOKENS, "labels": PROMPT})
    with torch.no_grad():
        expected = ForCausalLMLoss(rack(TOKENS), PROMPT, 264).item()
    assert losses == pytest.approx([expected] * 2, rel=1e-5)
    by_hand = F.pad(PROMPT[:, 1:], (0, 1), value=7)
    shifted_batch = batch_of("clm", {"input_ids": TOKENS, "labels": by_hand})
    assert loss_positions(shifted_batch).equal(torch.arange(T).expand(B, T).clamp(2, 6) == torch.arange(T))


@pytest.mark.parametrize("first", [False, True])
def test_mlm_masks_no_token_without_a_label(first: bool) -> None:
    """In labels that are shifted the first token has none, and is not excluded by it."""
    labels = F.pad(PROMPT[:, 1:], (0, 1), value=7) if first else PROMPT
    batch = batch_of("mlm", {"input_ids": TOKENS, "labels": labels})
    drawn = torch.from_numpy(MASKS.masks(batch["sequence_ids"].numpy(), 0, T))
    kept = (torch.arange(T) >= 3) | (torch.arange(T) == 0) & first
    assert batch["masks"].equal(drawn & kept)
    assert batch["input_ids"].equal(torch.where(drawn & kept, 256, TOKENS))


@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_labels_of_sequences_are_no_labels_of_tokens(objective: Any) -> None:
    plain, labelled = (batch_of(objective, {"input_ids": TOKENS, **more}) for more in ({}, {"labels": torch.ones(B)}))
    assert all(labelled[name].equal(value) for name, value in plain.items())


@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_labels_of_another_loss_are_refused(objective: Any) -> None:
    for labels in (TOKENS.flip(0), TOKENS.roll(2, 1)):
        with pytest.raises(ConfigError, match=r"got labels that are not the tokens of input_ids; .* custom objective"):
            batch_of(objective, {"input_ids": TOKENS, "labels": labels})


@pytest.mark.parametrize("name", ["labels", "targets"])
def test_custom_labels_of_minus_100_carry_no_loss(name: str) -> None:
    """Where they stand: custom shifts nothing."""
    labels = TOKENS.flip(1).where(torch.arange(T) % 3 > 0, -100)
    rack, losses = trained(config_of("custom"), {"input_ids": TOKENS, name: labels})
    with torch.no_grad():
        expected = F.cross_entropy(rack(TOKENS).flatten(0, 1), labels.flatten(), ignore_index=-100).item()
    assert losses == pytest.approx([expected] * 2, rel=1e-5)


# ---------------------------------------------------------------- forms


class Named(NamedTuple):
    labels: Any
    input_ids: Any


class Pair(NamedTuple):
    x: Any
    y: Any


FORMS: dict[str, Any] = {
    "int32": TOKENS.int(),
    "rows": TOKENS.tolist(),
    "array": TOKENS.numpy(),
    "lists in a dict": {"input_ids": TOKENS.tolist()},
    "encoding": BatchEncoding({"input_ids": TOKENS, "token_type_ids": torch.zeros(B, T, dtype=torch.int64)}),
    "encoding of arrays": BatchEncoding({"input_ids": TOKENS.numpy(), "attention_mask": np.ones((B, T), dtype=int)}),
    "other keys": {"input_ids": TOKENS, "text": ["a"] * B, 5: None, "masks": None, "targets": None, "view": 0},
    "named": Named(labels=torch.zeros(B), input_ids=TOKENS),
    "pair": Pair(TOKENS, torch.zeros(B)),
    "tuple": (TOKENS, RIGHT),
    "list in a list": [TOKENS.tolist()],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("spec", [None, MASKS])
def test_forms_of_one_batch(form: str, spec: MaskSpec | None) -> None:
    (expected,) = ProgressiveDataLoader([TOKENS], spec)
    (found,) = ProgressiveDataLoader([FORMS[form]], spec)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].equal(value) if isinstance(value, Tensor) else found[name] == value


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("spec", [None, MASKS])
def test_a_batch_may_lie_on_a_gpu(spec: MaskSpec | None) -> None:
    (expected,) = ProgressiveDataLoader([{"input_ids": TOKENS, "attention_mask": RIGHT}], spec)
    (found,) = ProgressiveDataLoader([{"input_ids": TOKENS.cuda(), "attention_mask": RIGHT.cuda()}], spec)
    for name, value in expected.items():
        assert found[name].equal(value) if isinstance(value, Tensor) else found[name] == value


def test_the_second_item_of_a_tuple_is_the_target_of_custom() -> None:
    """As `TensorDataset(x, y)` gives it, in the loader and in the trainer."""
    loader = DataLoader(TensorDataset(TOKENS, TOKENS.flip(1)), batch_size=B)
    (batch,) = ProgressiveDataLoader(loader, objective="custom")
    assert batch["targets"].equal(TOKENS.flip(1))
    assert trained(config_of("custom"), (TOKENS, TOKENS.flip(1)))[1] == pytest.approx(
        trained(config_of("custom"), {"input_ids": TOKENS, "targets": TOKENS.flip(1)})[1]
    )
    with pytest.raises(ConfigError, match=r"got a batch with \['input_ids'\]; the custom objective needs targets"):
        list(ProgressiveDataLoader([(TOKENS, TOKENS, RIGHT)], objective="custom"))


def test_given_masks_are_left_as_they_are() -> None:
    masks = torch.ones(B, T, dtype=torch.bool)
    raw = {"input_ids": TOKENS, "targets": TOKENS, "masks": masks, "attention_mask": RIGHT}
    assert batch_of("custom", raw)["masks"].equal(RIGHT.bool())
    assert masks.all()


# ---------------------------------------------------------------- collators of Hugging Face


def collator(**how: Any) -> DataCollatorForLanguageModeling:
    words = Tokenizer(WordLevel({"[PAD]": 0, "[MASK]": 1, **{f"w{n}": n for n in range(2, 99)}}, unk_token="[PAD]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", mask_token="[MASK]")
    return DataCollatorForLanguageModeling(tokenizer, **how)


ROWS = [{"input_ids": (row % 97 + 2).tolist()[:length]} for row, length in zip(TOKENS, (8, 5, 2, 3), strict=True)]


def test_a_collator_of_causal_models_gives_the_loss_of_transformers() -> None:
    """It pads on the right, with an attention mask and labels of -100."""
    loader: DataLoader[Any] = DataLoader(ROWS, batch_size=B, collate_fn=collator(mlm=False))  # pyright: ignore
    (batch,) = loader
    assert not isinstance(batch, dict)
    rack, losses = trained(config_of("clm"), batch)
    with torch.no_grad():
        expected = ForCausalLMLoss(rack(batch["input_ids"]), batch["labels"], 264).item()
    assert losses == pytest.approx([expected] * 2, rel=1e-5)


@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_inputs_that_a_collator_has_masked_are_not_masked_again(objective: Any) -> None:
    torch.manual_seed(0)
    (batch,) = DataLoader([ROWS[0]] * 8, batch_size=8, collate_fn=collator(mlm=True))  # pyright: ignore
    with pytest.raises(ConfigError, match="input_ids, which no collator may have masked before"):
        batch_of(objective, dict(batch))
    found = batch_of("custom", dict(batch))  # trains as the collator says
    assert loss_positions(found).equal(batch["labels"] != -100)

"""Ids: what changes them, what does not, and what they were when artifacts were first written."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stackwise_core.config import StackWiseConfig
from stackwise_core.stages.identity import NUMERICS, Kind, Recipe, Ref, canonical_json
from stackwise_core.stages.plan import RunPlan, plan_run
from support.configurations import CORPUS, KINDS, ids

G = "training.progressive."


def nested(settings: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for path, value in settings.items():
        *parents, last = path.split(".")
        section = values
        for part in parents:
            section = section.setdefault(part, {})
        section[last] = value
    return values


def plan(settings: dict[str, Any] | None = None, corpus: str = CORPUS) -> RunPlan:
    return plan_run(StackWiseConfig.from_dict(nested(settings or {})), corpus)


def changed(settings: dict[str, Any], base: dict[str, Any] | None = None) -> set[str]:
    """The artifacts whose id differs from the base's, or that only one of the two has."""
    before, after = ids(plan(base)), ids(plan({**(base or {}), **settings}))
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


EVERYTHING = set(ids(plan()))
TRAINED = {f"{kind}-{n}" for kind in KINDS for n in range(3)} - {"activations-2"}
FROM_STACK_0 = TRAINED - {"build-0", "trunk-0"}


def test_a_run_has_these_artifacts() -> None:
    assert {"data"} | TRAINED == EVERYTHING  # the last stage writes no cache: nothing reads it


# ---------------------------------------------------------------- what changes no id


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("run.name", "another"),
        ("training.checkpoint_every", 7),
        ("training.checkpoint_minutes", 0.5),
        ("validation.every", 3),
        ("hardware.device", "cpu"),
        ("hardware.compile", True),
        ("hardware.deterministic", False),
        ("hardware.threads", 3),
        ("hardware.tf32", True),
        ("tracking", "wandb"),
        ("cache.keep", "all"),
        ("cache.max_gb", 1.0),
        ("cache.fill_workers", 4),
        ("training.progressive.max_stacks", 5),
        # Two spellings of the same thing.
        ("cache.views", 8),
        ("model.n_kv_heads", 4),
        ("model.d_ff", 352),
        ("model.attention", "bidirectional"),
        ("training.new_stack_init", "copy"),
        ("training.progressive.stacks", [{"n_blocks": 2, "steps": 200, "precision": "full", "mode": "append"}]),
        ("training.gradient_clip", 1),
    ],
)
def test_what_changes_no_result_changes_no_id(path: str, value: Any) -> None:
    assert changed({path: value}) == set()


def test_the_source_enters_by_its_content() -> None:
    assert changed({"data.source": "texts/*.txt"}) == set()
    other = ids(plan(corpus="1" * 64))
    assert {name for name, value in ids(plan()).items() if other[name] == value} == {"build-0", "trunk-0"}


def test_raising_the_target_keeps_what_is_there() -> None:
    """Only the cache that the next stage reads is new, and with it the check of that cache."""
    three, five = ids(plan()), ids(plan({"training.progressive.target_stacks": 5}))
    kept = {name for name, value in three.items() if five[name] == value}
    assert kept == EVERYTHING - {"validation-2"}
    new = {f"{kind}-{n}" for kind in KINDS for n in (3, 4)}
    assert five.keys() - three.keys() == {"activations-2", *new} - {"activations-4"}


def test_caching_changes_no_trained_artifact() -> None:
    """Time, not results: without a cache there is none to name, and no check of one."""
    gone = {"activations-0", "activations-1", "validation-0", "validation-1"}
    assert changed({"training.progressive.cache_activations": False}) == gone


def test_what_nobody_samples_is_in_no_id() -> None:
    for change in ({"training.progressive.cache_activations": False}, {"training.progressive.enabled": False}):
        assert changed({"validation.sampled_rows": 2}, change) == set()


@pytest.mark.parametrize("objective", ["clm", "custom"])
def test_a_time_step_that_is_only_recorded_is_in_no_id(objective: str) -> None:
    """Without masks the depth's step changes no number: it stands in the plan alone."""
    base = {f"{G}training_objective": objective}
    assert changed({f"{G}time_interpretation": "depth"}, base) == set()
    depth = {**base, f"{G}time_interpretation": "depth"}
    assert changed({f"{G}time_per_stack": 3}, depth) == set()
    assert [stage.spec.time_step for stage in plan({**depth, f"{G}time_per_stack": 3}).stages] == [0, 3, 6]
    assert changed({f"{G}time_per_stack": 3, f"{G}num_time_steps": 60}, {f"{G}time_interpretation": "depth"})


def test_the_first_stage_is_the_same_whatever_later_ones_do_with_it() -> None:
    """It has no trunk that a strategy could train, no other end to grow at, nothing to be an NF4 copy of."""
    first = {"build-0", "trunk-0", "stack-0"}
    adapted = {f"{G}qlora_enabled": True}
    assert not first & changed({f"{G}trunk_strategy": "qlora"}, adapted)
    assert not first & changed({f"{G}trunk_strategy": "full"})
    assert not first & changed({f"{G}building_mode": "prepend"})
    assert first & changed({f"{G}new_stack_precision": "qlora"}, adapted) == {"stack-0"}  # quantised at its end


def test_a_store_is_corrupted_as_its_reader_asks() -> None:
    run = plan({f"{G}time_interpretation": "depth", f"{G}max_stacks": 3})
    stored = [stage.activations.mask.ratio for stage in run.stages if stage.activations and stage.activations.mask]
    assert stored == pytest.approx([0.525, 0.9])


# ---------------------------------------------------------------- what does


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("run.seed", 1, TRAINED - {"trunk-0"}),
        ("data.seq_len", 64, {"data"} | FROM_STACK_0),
        ("data.max_sequences", 100, {"data"} | FROM_STACK_0),
        ("data.validation_fraction", 0.1, {"data"} | FROM_STACK_0),
        *(
            (f"training.{name}", value, FROM_STACK_0)
            for name, value in {
                "batch_size": 16,
                "accumulation_steps": 2,
                "steps_per_stack": 201,
                "learning_rate": 1e-3,
                "min_learning_rate": 1e-4,
                "warmup_steps": 10,
                "weight_decay": 0.0,
                "beta1": 0.8,
                "beta2": 0.9,
                "gradient_clip": 0.0,
                "mask_ratio": 0.2,
                "corruption": "mask",
            }.items()
        ),
        ("cache.views", 4, FROM_STACK_0),
        *(
            (f"model.{name}", value, TRAINED - {"trunk-0"})
            for name, value in {
                "vocab_size": 300,
                "d_model": 64,
                "n_heads": 2,
                "n_kv_heads": 2,
                "d_ff": 100,
                "blocks_per_stack": 3,
                "tie_embeddings": False,
                "rope_theta": 5e4,
                "norm_eps": 1e-6,
                "attention": "causal",
            }.items()
        ),
        # From the second stack on.
        ("training.new_stack_init", "random", FROM_STACK_0 - {"stack-0", "activations-0", "validation-0", "trunk-1"}),
        ("cache.dtype", "float16", FROM_STACK_0 - {"stack-0", "build-1", "trunk-1"}),
        # The judgement, and the validation rows that a store holds for it.
        ("validation.max_sequences", 10, {"activations-0", "activations-1"} | {f"validation-{n}" for n in range(3)}),
        ("validation.sampled_rows", 2, {"validation-0", "validation-1"}),  # the last stage has no store to sample
    ],
)
def test_what_changes_results_changes_their_ids(path: str, value: Any, expected: set[str]) -> None:
    assert changed({path: value}) == expected


def test_the_objective_changes_every_trained_id() -> None:
    assert changed({"training.progressive.training_objective": "clm"}) == TRAINED - {"trunk-0"}


def test_a_sweep_over_stage_3_shares_stages_0_to_2() -> None:
    base = {"training.progressive.target_stacks": 4}
    steps = changed({"training.progressive.stacks": [{}, {}, {}, {"steps": 50}]}, base)
    assert steps == {"stack-3", "validation-3", "activations-2", "validation-2"}  # its cache holds the rows it visits
    blocks = changed({"training.progressive.stacks": [{}, {}, {}, {"n_blocks": 7}]}, base)
    assert blocks == {"build-3", "stack-3", "validation-3"}


def test_a_change_runs_up_the_chain_and_not_down() -> None:
    """A stage's own steps: that stack and what stands on it, and the cache that it reads."""
    got = changed({"training.progressive.stacks": [{}, {"steps": 50}]})
    assert got == FROM_STACK_0 - {"stack-0", "trunk-1", "build-1"}


def test_what_a_stack_begins_as_is_in_the_id_of_its_build() -> None:
    """Its adapter, and whether it is NF4 from the start: the build holds the hash of its first tensors."""
    adapted = {"training.progressive.qlora_enabled": True}
    assert {"build-0", "build-1", "build-2"} <= changed({"training.progressive.qlora_rank": 4}, adapted)
    quantised = changed({"training.progressive.stacks": [{}, {"precision": "qlora"}]}, adapted)
    assert "build-1" in quantised
    assert not quantised & {"build-0", "trunk-1", "stack-0"}


TOP = {f"{G}trunk_strategy": "qlora", f"{G}qlora_enabled": True, f"{G}trunk_trainable_top": 1}


@pytest.mark.parametrize("precision", ["half", "bfloat16", "nvfp4", "qlora"])
def test_what_a_stack_is_stored_as_is_in_its_id(precision: str) -> None:
    got = changed({f"{G}stacks": [{}, {"precision": precision}]}, {f"{G}qlora_enabled": True})
    assert {"stack-1", "activations-1", "validation-1", "stack-2"} <= got
    assert not got & {"build-0", "stack-0", "trunk-1"}


def test_how_much_of_a_trunk_trains_is_in_the_id() -> None:
    got = changed({f"{G}trunk_trainable_top": 2}, {**TOP, f"{G}target_stacks": 4})
    assert {"trunk-2", "stack-2", "trunk-3", "stack-3"} <= got
    assert not got & {"trunk-1", "stack-1"}  # a trunk of one stack trains whole either way


def test_the_progressive_adapter_is_in_the_id_where_it_trains() -> None:
    base = {f"{G}progressive_qlora": True}
    for change in ({f"{G}progressive_qlora_rank": 4}, {"training.adapter_learning_rate": 1e-4}):
        assert changed(change, base) == set()
        got = changed(change, {**base, f"{G}trunk_strategy": "qlora"})
        assert {"stack-1", "stack-2"} <= got
        assert "stack-0" not in got


QLORA = {f"{G}trunk_strategy": "qlora"}
OF_PROGRESSIVE = {f"{G}progressive_qlora_rank": 3, f"{G}progressive_qlora_alpha": 5.0}


@pytest.mark.parametrize("more", [{}, OF_PROGRESSIVE, {f"{G}building_mode": "prepend"}, {"training.joint_steps": 5}])
def test_a_trunk_of_adapters_gives_one_to_each_stack_as_if_asked_to(more: dict[str, Any]) -> None:
    assert changed({f"{G}progressive_qlora": True}, {**QLORA, **more}) == set()
    assert {"stack-1", "stack-2"} <= changed(QLORA, more)


def test_a_stack_with_an_adapter_of_its_own_is_given_no_other() -> None:
    mixed = {**QLORA, f"{G}stacks": [{}, {"precision": "qlora"}], f"{G}target_stacks": 4}
    specs = [stage.spec for stage in plan(mixed).stages]
    assert [[*stack.adapters] for stack in specs[3].stacks] == [["progressive"], ["stack"], ["progressive"], []]
    assert [spec.anatomy.trains for spec in specs[1:3]] == [
        ("adapters", "adapters"),
        ("adapters", "adapters", "everything"),
    ]
    assert {"stack-2", "stack-3"} <= changed({f"{G}progressive_qlora_rank": 4}, mixed)  # though stack 1 has none
    every = {**QLORA, f"{G}qlora_enabled": True}
    assert all([*stack.adapters] == ["stack"] for stack in plan(every).stages[2].spec.stacks)


def test_adapters_of_a_trunk_do_not_depend_on_how_far_it_is_to_grow() -> None:
    """Also where the stacks that have adapters of their own are still to come."""
    mixed = {**QLORA, f"{G}stacks": [{}, {}, {}, {"precision": "qlora"}]}
    assert changed({f"{G}target_stacks": 6}, mixed) <= {f"{kind}-{n}" for kind in KINDS for n in (3, 4, 5)} | {
        "activations-2",
        "validation-2",
    }


def test_ranks_that_no_layer_can_use_are_one() -> None:
    """A rank is capped at d_model in ids; what narrower layers have follows from the shape, which is in them too."""
    for key, more in (("qlora_rank", {f"{G}qlora_enabled": True}), ("progressive_qlora_rank", QLORA)):
        for sizes in ({}, {"model.n_kv_heads": 1}):
            assert changed({f"{G}{key}": 4096}, {**more, **sizes, f"{G}{key}": 128}) == set()
            assert {"stack-1", "stack-2"} <= changed({f"{G}{key}": 128}, {**more, **sizes, f"{G}{key}": 127})
    rank = {f"{G}qlora_enabled": True, f"{G}qlora_rank": 4096}
    assert plan(rank).stages[0].spec.stacks[0].adapters["stack"].rank == 128


def test_a_store_is_named_after_the_last_stage_that_trained_what_it_holds() -> None:
    """Stage 1 trains adapters of stack 0, whose output it stores for stage 2."""
    assert "activations-1" in changed({f"{G}stacks": [{}, {"steps": 50}]}, TOP)


def test_a_copy_of_another_stack_that_one_stage_trained_is_another_build() -> None:
    """Appended, it is a copy of stack 1; prepended, of stack 0; stage 1 trained both."""
    base = {f"{G}trunk_strategy": "full", "training.new_stack_init": "copy"}
    got = changed({f"{G}stacks": [{}, {}, {"mode": "prepend"}]}, base)
    assert "build-2" in got
    assert not got & {"build-1", "stack-1"}


def test_an_anneal_scales_every_rate_and_warms_up_no_longer_than_it_lasts() -> None:
    gentle = {"training.joint_steps": 10, "training.joint_learning_rate": 1e-4, f"{G}qlora_enabled": True}
    *grown, anneal = (stage.spec.optim for stage in plan(gentle).stages)
    assert {(optim.steps, optim.warmup_steps, optim.min_learning_rate) for optim in grown} == {(200, 20, 2e-4)}
    assert (anneal.steps, anneal.warmup_steps, anneal.learning_rate, anneal.min_learning_rate) == (10, 10, 1e-4, 1e-4)
    assert anneal.adapter_learning_rate == pytest.approx(1e-3 * 1e-4 / 2e-3)


def test_joint_training_from_scratch_has_the_rates_of_growth_and_the_steps_of_every_stack() -> None:
    (whole,) = plan({f"{G}enabled": False, f"{G}max_stacks": 3, f"{G}time_interpretation": "depth"}).stages
    assert (whole.spec.optim.steps, whole.spec.optim.learning_rate) == (200, 2e-3)
    assert [step for step, _ in whole.stack.joint_times] == [0, 1, 2]
    assert [ratio for _, ratio in whole.stack.joint_times] == pytest.approx([0.15, 0.525, 0.9])
    assert whole.build is not None
    assert [part.index for part in whole.build.parts] == [0, 1, 2]
    assert whole.build.adapter is None


def test_joint_training_names_its_stacks_in_data_flow_order() -> None:
    (whole,) = plan({f"{G}enabled": False, f"{G}building_mode": "prepend", f"{G}new_stack_precision": "half"}).stages
    assert whole.build is not None
    assert [part.index for part in whole.build.parts] == [2, 1, 0]
    assert whole.stack.precision == "full"  # of one stack; here each part has its own


# ---------------------------------------------------------------- which caches pay


def reasons(corpus_bytes: int, **more: Any) -> list[str]:
    """Why each stage but the last writes no cache where that is left to the costs; '' where it writes one."""
    values = {"cache.mode": "auto", **{key.replace("__", "."): value for key, value in more.items()}}
    run = plan_run(StackWiseConfig.from_dict(nested(values)), CORPUS, corpus_bytes)
    assert all((stage.activations is None) == bool(stage.no_cache_reason) for stage in run.stages)
    return [stage.no_cache_reason for stage in run.stages[:-1]]


def test_rows_that_are_read_again_and_again_are_cached() -> None:
    assert reasons(4000) == ["", ""]
    too_much = reasons(4000, cache__max_gb=1e-6)
    assert all("exceed cache.max_gb" in reason for reason in too_much)


def test_rows_that_are_read_once_are_cached_where_a_store_can_be_advanced() -> None:
    """The first boundary would cost what it saves; the second costs one stack and saves two."""
    for unbounded in (0, 10**9):
        first, second = reasons(unbounded)
        assert "costs as much as running the trunk" in first
        assert second == ""
    # Where each stage masks at a ratio of its own, no store is advanced.
    depth = reasons(0, training__progressive__time_interpretation="depth")
    assert all("costs as much as running the trunk" in reason for reason in depth)


@pytest.mark.parametrize(
    ("more", "rows"),
    [  # 4000 bytes in sequences of 128, less what is held out, under as many mask draws as there are
        ({}, 29 * 8),
        ({"cache__views": 2}, 29 * 2),
        ({"data__validation_fraction": 0.4}, 18 * 8),
        ({"data__max_sequences": 10}, 10 * 8),
        ({"training__progressive__stacks": [{}, {"steps": 20}, {"steps": 20}]}, 29 * 8),
    ],
)
def test_a_store_pays_up_to_the_last_byte_of_its_budget(more: dict[str, Any], rows: int) -> None:
    n_gib = rows * 128 * 128 * 2 / 2**30  # positions, channels, bfloat16
    assert reasons(4000, cache__max_gb=n_gib, **more) == ["", ""]
    assert all("exceed" in reason for reason in reasons(4000, cache__max_gb=n_gib * 0.999, **more))


def test_a_stage_without_a_cache_says_why() -> None:
    said = {
        f"{G}trunk_strategy": ("full", "stage 1 streams from tokens: the whole trunk trains"),
        f"{G}building_mode": (
            "prepend",
            "stage 1 streams from tokens: gradients flow through the trunk to the prepended",
        ),
        f"{G}cache_activations": (False, "training.progressive.cache_activations is false: the trunk runs live"),
    }
    for key, (value, reason) in said.items():
        assert plan({key: value}).stages[0].no_cache_reason.startswith(reason)
    adapted = plan({f"{G}trunk_strategy": "qlora", f"{G}qlora_enabled": True}).stages
    assert adapted[0].no_cache_reason == "stage 1 streams from tokens: adapters of every trunk stack train"
    assert adapted[2].no_cache_reason == "last stage: no stage reads it; raising target_stacks fills it"
    annealed = plan({"training.joint_steps": 20}).stages
    assert annealed[2].no_cache_reason == "stage 3 streams from tokens: it trains everything together"
    assert annealed[3].no_cache_reason == "last stage: no stage reads it"


# ---------------------------------------------------------------- how ids are made


class Old(Recipe):
    kind = "data"
    corpus: str
    ratio: float = 0.5


class New(Old):
    added: int = 7
    also: tuple[str, ...] = ()
    note: str | None = None


def test_a_new_field_at_its_default_renames_nothing() -> None:
    assert New(corpus="x").ref(-1) == Old(corpus="x").ref(-1)
    assert New(corpus="x", ratio=0.25).ref(-1) == Old(corpus="x", ratio=0.25).ref(-1)
    others = [New(corpus="x", added=8), New(corpus="x", also=("y",)), New(corpus="x", note="")]
    assert len({recipe.ref(-1) for recipe in (*others, Old(corpus="x"))}) == 4


def test_kind_and_numerics_are_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Old(corpus="x")
    before = recipe.ref(-1)
    monkeypatch.setitem(NUMERICS, "data", NUMERICS["data"] + 1)
    assert Old(corpus="x").ref(-1).sha256 != before.sha256

    class Elsewhere(Old):
        kind = "stack"

    assert Elsewhere(corpus="x").ref(-1).sha256 not in (before.sha256, Old(corpus="x").ref(-1).sha256)


@pytest.mark.parametrize("kind", sorted(NUMERICS.keys() - {"optimizer", "cooldown"}))
def test_a_bump_of_numerics_renames_what_is_made_from_it(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    before = ids(plan())
    monkeypatch.setitem(NUMERICS, kind, NUMERICS[kind] + 1)
    renamed = {name for name, value in ids(plan()).items() if before[name] != value}
    assert {name for name in EVERYTHING if name.split("-")[0] == kind} <= renamed
    below = {
        "data": {"build-0", "trunk-0"},
        "build": {"data", "trunk-0"},
        "trunk": {"data", "build-0"},
        "stack": {"data", "build-0", "trunk-0"},
        "activations": EVERYTHING - {"activations-0", "activations-1", "validation-0", "validation-1"},
        "validation": EVERYTHING - {f"validation-{n}" for n in range(3)},
    }
    assert EVERYTHING - renamed == below[kind]


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        ("cooldown", {"validation.cooldown_steps": 3}, {"cooldown-0", "cooldown-1"}),
        # What goes on from a state is named by it.
        (
            "optimizer",
            {"training.optimizer_state": "keep"},
            {"optimizer-0", "stack-1", "validation-1", "optimizer-1"}
            | {"trunk-2", "build-2", "stack-2", "validation-2"},
        ),
    ],
)
def test_a_bump_renames_what_only_some_runs_have(
    kind: Kind, settings: dict[str, Any], expected: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"training.schedule": "one_clock", f"{G}trunk_strategy": "full", **settings}
    before = ids(plan(settings))
    monkeypatch.setitem(NUMERICS, kind, NUMERICS[kind] + 1)
    renamed = {name for name, value in ids(plan(settings)).items() if before[name] != value}
    assert renamed == expected


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), JSON, max_size=4))
def test_canonical_json_does_not_depend_on_the_order_of_keys(value: dict[str, Any]) -> None:
    text = canonical_json(value)
    assert text == canonical_json(dict(reversed(value.items())))
    assert text.isascii()


def test_names_are_readable() -> None:
    sha = "0123456789abcdef" * 4
    assert Ref(kind="stack", stage=2, sha256=sha).name == "stack-2-0123456789ab"
    assert Ref(kind="data", stage=-1, sha256=sha).name == "data-0123456789ab"


def test_golden_ids_of_the_default_configuration() -> None:
    """If these move, every artifact on every disk is orphaned: only a bump of NUMERICS or a new default may do it."""
    run = plan()
    found = [run.data_ref.name] + [stage.ref(kind).name for stage in run.stages[:2] for kind in KINDS]
    assert found == [
        "data-5c77be235d95",
        "build-0-19a954571636",
        "trunk-0-78a5247dda4b",
        "stack-0-ca9fe08a51f9",
        "activations-0-0f41b20e63e3",
        "validation-0-5f1d7f3e16ea",
        "build-1-c6c626aa51be",
        "trunk-1-6bd33b8a9809",
        "stack-1-21172e2cfe17",
        "activations-1-71cb7ab509ef",
        "validation-1-62d4617fdfef",
    ]

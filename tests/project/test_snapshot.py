"""The code does what it did when the snapshot was written: ids, bits, numbers, documents and exit codes."""

from __future__ import annotations

import copy

import pytest

from support.snapshot import PARTS, SLOW, differences, made_on, read_fixture

pytestmark = pytest.mark.usefixtures("quick_disk", "one_thread")

FIXTURE = read_fixture()
PARAMETERS = [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in PARTS]
SAME_NUMERICS = FIXTURE["made on"] == made_on()


@pytest.mark.parametrize("name", PARAMETERS)
def test_what_it_does_is_what_it_did(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    found = differences(FIXTURE[name], PARTS[name](), same_numerics=SAME_NUMERICS)
    if found:
        listed = "\n".join(found[:12])
        pytest.fail(
            f"{name}: {len(found)} places differ from the snapshot, the first of them\n{listed}\n"
            "If that is meant, write it anew as tests/support/snapshot.py says, and commit its diff.",
            pytrace=False,
        )


def test_nothing_else_is_in_the_fixture() -> None:
    assert FIXTURE.keys() == {"made on", *PARTS}


@pytest.mark.parametrize(
    ("change", "seen_by_the_same", "seen_by_another"), [(1.0, True, True), (1e-5, True, False), (0.0, False, False)]
)
def test_a_change_is_seen_and_named(change: float, seen_by_the_same: bool, seen_by_another: bool) -> None:
    """A machine with other kernels is allowed other bits, and no other ids."""
    before = FIXTURE["prepend"]
    now = copy.deepcopy(before)
    now["status RUN"]["json"]["stage_list"][0]["train_loss"] += change
    for same_numerics, seen in ((True, seen_by_the_same), (False, seen_by_another)):
        lines = differences(before, now, same_numerics=same_numerics)
        assert [line.split(":")[0] for line in lines] == ["status RUN > json > stage_list > 0 > train_loss"] * seen
    name = next(iter(now["ids"]))
    now["ids"][name] = "0" * 64
    assert any(line.startswith(f"ids > {name}: ") for line in differences(before, now, same_numerics=False))

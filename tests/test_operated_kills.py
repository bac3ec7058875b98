"""The whole matrix of kills and recoveries, and what is made again on purpose: minutes each, with `make test-slow`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import digests, subset
from kills import Trial, kill_and_recover, places_of, shifted
from operating import Site

pytestmark = [pytest.mark.flow, pytest.mark.slow, pytest.mark.usefixtures("quick_disk")]

Reference = Callable[..., Path]


@pytest.mark.parametrize("shift", range(4))
def test_every_kill_and_every_recovery(
    shift: int, site: Site, tmp_path: Path, reference: Reference, record_property: Any
) -> None:
    links = shifted(shift)
    # The flow whose server is killed asks for it four times, not six: it gives up in one minute, not five.
    trial = Trial(site, tmp_path, places_of(links), PREFECT_CLIENT_MAX_RETRIES="3")
    kill_and_recover(trial, links, digests(reference()), record_property)


@pytest.mark.parametrize(
    ("parameters", "kinds"),
    [
        ({"from_stack": 1}, "build-1 build-2 trunk-1 trunk-2 stack-1 stack-2 activations validation-1 validation-2"),
        ({"force": "train"}, "stack activations-0 activations-1"),  # what a stage trains on is filled again
    ],
)
def test_redone_on_purpose(
    parameters: dict[str, Any], kinds: str, site: Site, tmp_path: Path, reference: Reference
) -> None:
    trial = Trial(site, tmp_path)
    shutil.copytree(reference(), trial.root)
    before = trial.sealed()
    trial.start(**parameters)
    trial.site.wait_for(trial.run_id, "COMPLETED")
    redone = {name for name, stat in trial.sealed().items() if stat != before[name]}
    assert redone == subset(before, *kinds.split())
    assert digests(trial.root) == digests(reference())

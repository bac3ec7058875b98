"""What an operator does and sees, with a real server, a worker and a browser: runs started, read, killed, recovered."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from support.kills import RECOVERIES, Trial, each_once, kill_and_recover, places_of
from support.operating import Site, until
from support.runs import digests, folder_of, manifests, tiny_values, write_corpus

pytestmark = [pytest.mark.flow, pytest.mark.usefixtures("quick_disk")]


def test_a_killed_run_goes_on_when_it_is_retried(site: Site, tmp_path: Path, reference: Callable[..., Path]) -> None:
    trial = Trial(site, tmp_path, ("train:6:KILL",))
    trial.start()
    trial.wait_for_failpoint()
    site.wait_for(trial.run_id, "CRASHED")
    RECOVERIES["flow-run retry"](trial)
    site.wait_for(trial.run_id, "COMPLETED")
    assert digests(trial.root) == digests(reference())
    assert manifests(trial.root)[folder_of(trial.root, "stack", 0).name]["facts"]["first_step"] == 4


@pytest.mark.slow
def test_a_run_survives_every_kill(
    site: Site, tmp_path: Path, reference: Callable[..., Path], record_property: Any
) -> None:
    links = each_once()
    kill_and_recover(Trial(site, tmp_path, places_of(links)), links, digests(reference()), record_property)


@pytest.fixture
def page() -> Generator[Any]:
    """Open a page of the system's Chromium; every wait on it ends when what it waits for is there."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(120_000)
        yield page
        browser.close()


def deployment_of_a_tiny_run(site: Site, folder: Path) -> str:
    """Deploy train-rack/local again with a form that a run of seconds is filled in; return its id."""
    parameters = {"config": tiny_values(write_corpus(folder / "corpus.txt")), "artifacts": str(folder / "artifacts")}
    job = {"command": f"{sys.executable} -m prefect.engine"}
    return site.copy_deployment("train-rack/local", name="tiny", parameters=parameters, job_variables=job)


def test_a_run_is_started_by_a_form_followed_and_read(site: Site, page: Any, tmp_path: Path) -> None:
    deployment = deployment_of_a_tiny_run(site, tmp_path)
    page.goto(site.pages)
    page.get_by_role("link", name="Deployments").click()
    page.locator(f'a[href*="{deployment}"]').first.click()
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Custom run").click()

    # The form: what each field means, literals as a choice, the deployment's values filled in.
    page.get_by_text("Name of the run: letters, digits").wait_for()
    page.get_by_role("button", name="Select training_objective").click()
    page.get_by_role("option", name="clm", exact=True).click()
    page.get_by_label("name (Optional)", exact=True).first.fill("by-form")
    stacks = page.get_by_label("target_stacks (Optional)")
    assert stacks.input_value() == "3"
    stacks.fill("2")
    run_id = until(lambda: _submit(page), "run that the form started")

    # The run's page: its names are sentences, its log is short.
    page.goto(f"{site.pages}/v2/runs/flow-run/{run_id}")
    page.get_by_text("Completed", exact=True).first.wait_for()
    run = site.wait_for(run_id)
    assert (run["name"], run["state_name"]) == ("grow by-form to 2 stacks", "Completed")
    end = "stage 1: validation loss"
    until(lambda: any(line.startswith(end) for line in site.logs(run_id)), "end of the log: it comes after the run's")
    page.reload()  # a page asks for no more lines once it knows that the run has ended
    page.get_by_text("Oldest to newest").click()
    page.get_by_role("option", name="Newest to oldest").click()  # a page shows the first lines of its order
    page.get_by_text(end).wait_for()
    assert not [line for line in site.logs(run_id) if re.search("step [1-9]/", line)]

    # Its artifacts, each opened from the run.
    known = manifests(tmp_path / "artifacts")
    losses = [
        known[folder_of(tmp_path / "artifacts", "validation", n).name]["facts"]["validation_loss"] for n in (0, 1)
    ]
    home = page.url
    _open(page, home, "by-form-stages")
    assert _cells(page, "val. loss") == [f"{loss:.4f}" for loss in losses]
    _open(page, home, "by-form-report")
    page.get_by_role("heading", name="by-form", exact=True).wait_for()
    assert _cells(page, "val. loss") == [f"{loss:.4f}" for loss in losses]
    _is_drawn(page)
    page.get_by_role("cell").get_by_role("link", name="1", exact=True).click()
    page.wait_for_url("**/v2/runs/flow-run/*")  # in the same version of the pages
    page.get_by_text("add stack 1 (append, frozen, full)").first.wait_for()
    _open(page, home, "by-form-loss")
    _is_drawn(page)


def _submit(page: Any) -> str | None:
    """Press Submit and return the new run's id, or nothing if SQLite was busy: the page says so, and stays."""
    with page.expect_response("**/create_flow_run") as answer:
        page.get_by_role("button", name="Submit").click()
    assert answer.value.status in (200, 201, 503), answer.value.text()
    return answer.value.json()["id"] if answer.value.ok else None


def _open(page: Any, run: str, key: str) -> None:
    """Go from a run's page to the newest version of an artifact."""
    page.goto(run)
    page.get_by_role("tab", name="Artifacts").click()
    page.locator(f'a[href$="/artifacts/key/{key}"]').first.click()
    page.locator('a[href*="/artifacts/artifact/"]').first.click()


def _cells(page: Any, column: str) -> list[str]:
    """Return the texts below a heading of the page's table."""
    page.get_by_role("columnheader", name=column, exact=True).wait_for()
    names = page.get_by_role("columnheader").all_inner_texts()
    rows = page.get_by_role("row").all()[1:]
    return [row.get_by_role("cell").all_inner_texts()[names.index(column)] for row in rows]


def _is_drawn(page: Any) -> None:
    """The plot is loaded and as wide as it was made: a browser that refuses an image gives it no width."""
    plot = page.get_by_alt_text("Validation loss by stage")
    plot.wait_for()
    assert plot.evaluate("image => image.decode().then(() => image.naturalWidth)") == 500

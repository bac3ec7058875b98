"""A comparison as an operator runs it: real processes, stopped in between, against a real server and worker."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import yaml

from support.operating import Site, until
from support.processes import processes_with
from support.runs import digests, tiny_values, write_corpus

pytestmark = [pytest.mark.flow, pytest.mark.slow, pytest.mark.usefixtures("quick_disk")]


def test_a_comparison_is_stopped_gone_on_with_and_found_there(site: Site, tmp_path: Path) -> None:
    """SIGTERM reaches both runs at work, which keep their checkpoints; a deployment goes on; a command only prints."""
    values = tiny_values(write_corpus(tmp_path / "corpus.txt"))
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(values))
    root, met = tmp_path / "artifacts", tmp_path / "met"
    met.mkdir()
    words = ["compare", str(tmp_path / "tiny.yaml"), "--artifacts", str(root), "--rates", "1", "--seeds", "1"]
    held = {"STACKWISE_FAILPOINT": "train:5:HOLD", "STACKWISE_FAILPOINTS_MET": str(met)}
    command = site.begin("stackwise", *words, "--jobs", "2", **held)
    until(lambda: len(processes_with(f"STACKWISE_FAILPOINTS_MET={met}")) >= 3 and any(met.iterdir()), "two runs")
    command.send_signal(signal.SIGTERM)
    assert command.wait() == 1
    assert not processes_with(f"STACKWISE_FAILPOINTS_MET={met}")
    assert any((root / "work").iterdir())

    parameters = {"config": values, "artifacts": str(root), "rates": [1.0], "seeds": 1}
    site.wait_for(site.start(parameters, "compare/against"), "COMPLETED")
    made = digests(root)
    found = json.loads((root / "comparisons" / "tiny" / "comparison.json").read_text())
    assert {arm["arm"]: arm["budgets"][0]["runs"][0]["state"] for arm in found["arms"]} == dict.fromkeys(
        ("configured", "end-to-end", "flat-1/3", "flat-2/3"), "done"
    )
    assert site.begin("stackwise", *words).wait() == 0
    assert digests(root) == made

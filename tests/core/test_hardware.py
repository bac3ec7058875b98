"""The threads, the device and the determinism that a configuration asks for; the cards are made up."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch

from stackwise_core import ProgressiveRackBuilder, ProgressiveTrainer
from stackwise_core.config.schema import HardwareConfig
from stackwise_core.errors import ConfigError
from stackwise_core.training import in_memory
from stackwise_core.training.hardware import threads_of_rank, torch_restored, use_hardware
from storage.manifest import fingerprint
from support.runs import tiny

DETERMINISTIC: Any = torch.utils.deterministic
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@pytest.fixture
def two_cards(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Generator[None]:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", "NVIDIA H200 {}".format)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv(WORKSPACE, "")  # noted, so that what is set in its place goes with the test
    monkeypatch.delenv(WORKSPACE)
    with torch_restored():
        yield


def test_processes_share_out_the_threads(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    hardware = HardwareConfig(device="cpu", processes=2, threads=5)
    use_hardware(hardware)
    assert torch.get_num_threads() == 5  # what is done by one process
    monkeypatch.setenv("LOCAL_RANK", "1")
    use_hardware(hardware)
    assert torch.get_num_threads() == 2
    assert threads_of_rank(HardwareConfig(processes=4, threads=2)) == 1


@pytest.mark.usefixtures("two_cards")
def test_each_process_has_a_cuda_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    hardware = HardwareConfig(device="auto", processes=2, threads=2)
    assert use_hardware(hardware) == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert use_hardware(hardware) == torch.device("cuda:1")
    with pytest.raises(ConfigError, match=r"hardware.processes: got 3; this machine has 2 CUDA devices, and each"):
        use_hardware(HardwareConfig(device="auto", processes=3))
    assert use_hardware(HardwareConfig(device="cpu", processes=3, threads=3)) == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"hardware.device: got 'cuda:2'; this machine has 2 CUDA devices; use auto"):
        use_hardware(HardwareConfig(device="cuda:2"))


@pytest.mark.usefixtures("two_cards")
def test_training_on_a_card_is_deterministic_unless_it_is_given_up() -> None:
    use_hardware(HardwareConfig(device="cpu", threads=1))
    assert not torch.are_deterministic_algorithms_enabled()
    assert WORKSPACE not in os.environ
    use_hardware(HardwareConfig(device="cuda", threads=1))
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not DETERMINISTIC.fill_uninitialized_memory
    assert os.environ[WORKSPACE] == ":4096:8"
    use_hardware(HardwareConfig(device="cuda", threads=1, deterministic=False))
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.usefixtures("two_cards")
def test_a_workspace_of_the_user_counts_if_cublas_is_deterministic_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WORKSPACE, ":16:8")
    use_hardware(HardwareConfig(device="cuda", threads=1))
    assert os.environ[WORKSPACE] == ":16:8"
    monkeypatch.setenv(WORKSPACE, ":0:0")
    with pytest.raises(ConfigError, match=r"hardware.deterministic: got true; cuBLAS is not .*CONFIG=:0:0; unset it"):
        use_hardware(HardwareConfig(device="cuda", threads=1))
    use_hardware(HardwareConfig(device="cuda", threads=1, deterministic=False))


@pytest.mark.usefixtures("two_cards")
def test_the_library_leaves_torch_as_deterministic_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[bool] = []

    def on_a_card(hardware: HardwareConfig) -> torch.device:
        use_hardware(hardware.model_copy(update={"device": "cuda"}))
        found.append(torch.are_deterministic_algorithms_enabled())
        return torch.device("cpu")

    monkeypatch.setattr(in_memory, "use_hardware", on_a_card)
    config = tiny(tmp_path, {"training.steps_per_stack": 1})
    builder, batches = ProgressiveRackBuilder(config), [torch.zeros(4, 16, dtype=torch.long)]
    DETERMINISTIC.fill_uninitialized_memory = True
    ProgressiveTrainer(config).train_rack(builder, batches, 1)
    ProgressiveTrainer(config).train_rack(builder, batches)
    assert found == [True, True]
    assert not torch.are_deterministic_algorithms_enabled()
    assert DETERMINISTIC.fill_uninitialized_memory


@pytest.mark.usefixtures("two_cards")
def test_products_are_rounded_to_tf32_only_where_that_is_asked_for() -> None:
    matmul = torch.backends.cuda.matmul
    with torch_restored():
        use_hardware(HardwareConfig(device="cpu", threads=1, tf32=True))
        assert not matmul.allow_tf32
        use_hardware(HardwareConfig(device="cuda", threads=1, tf32=True))
        assert matmul.allow_tf32
        assert fingerprint(1, "cuda", False)["tf32"]
        use_hardware(HardwareConfig(device="cuda", threads=1))
        assert not matmul.allow_tf32
        use_hardware(HardwareConfig(device="cuda", threads=1, tf32=True))
    assert not matmul.allow_tf32  # a library's setting is not the whole program's


@pytest.mark.usefixtures("two_cards")
def test_the_fingerprint_names_the_card() -> None:
    use_hardware(HardwareConfig(device="cuda", threads=1))
    card = {"device": "cuda:1", "gpu": "NVIDIA H200 cuda:1", "cuda": "13.0", "deterministic": True, "tf32": False}
    assert card.items() <= fingerprint(1, "cuda:1", False).items()
    assert card.keys() & fingerprint(1, "cpu", False) == {"device"}

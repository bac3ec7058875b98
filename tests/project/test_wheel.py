"""The wheel: every module and template of the packages is in it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("flows", "storage", "stackwise_core")


def test_the_wheel_has_every_module_and_template(tmp_path: Path) -> None:
    copy = tmp_path / "checkout"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy)
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=copy, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    files = {path.relative_to(copy) for package in PACKAGES for path in (copy / package).rglob("*.*")}
    wanted = {str(path) for path in files if path.suffix in (".py", ".j2")}
    assert "flows/pages/page.html.j2" in wanted
    assert wanted <= set(zipfile.ZipFile(wheel).namelist())

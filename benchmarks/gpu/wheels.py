"""Download what an image with torch and transformers lacks, as wheels for Python 3.12, and print how to use them."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Collection
from pathlib import Path

from benchmarks.harness import ROOT, commit

CARRIED = (
    "annotated-types",
    "bitsandbytes",
    "donfig",
    "google-crc32c",
    "numcodecs",
    "obstore",
    "peft",
    "pydantic",
    "pydantic-core",
    "torchao",
    "typing-inspection",
    "zarr",
)
"""What StackWise imports in the sections, apart from what such an image has: see docs/gpu.md."""
MOST_BYTES = 64 * 2**20
LIBRARIES = ("libbitsandbytes_cpu.so", "libbitsandbytes_cuda130.so")
"""Of bitsandbytes, whose wheel has one for every version of CUDA and ROCm."""
FOLDER = ROOT / "wheels"


def main() -> int:
    """Fill the folder of wheels; 1 if there are too many bytes of them."""
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("*.whl"):
        old.unlink()
    platforms = [f"--platform=manylinux_2_{n}_x86_64" for n in (17, 24, 27, 28, 31, 34)]
    kind = ["--only-binary=:all:", "--implementation=cp", "--python-version=3.12", *platforms]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    done = subprocess.run([*pip, *kind, "-c", str(ROOT / "constraints.txt"), "-d", str(FOLDER), *CARRIED])
    if done.returncode:
        return done.returncode
    for wheel in FOLDER.glob("bitsandbytes-*.whl"):
        repack(wheel, LIBRARIES)
    n_bytes = sum(wheel.stat().st_size for wheel in FOLDER.glob("*.whl"))
    print(f"{FOLDER.name}/ holds {len(CARRIED)} wheels, {n_bytes / 2**20:.0f} MiB.")
    if n_bytes > MOST_BYTES:
        print(f"That is more than {MOST_BYTES // 2**20} MiB, which is what can be carried along.", file=sys.stderr)
        return 1
    print(f"Take this folder to the machine with the card, {FOLDER.name}/ with it, and run in it:\n\n{command()}")
    return 0


def repack(wheel: Path, libraries: Collection[str]) -> None:
    """Leave out of a wheel every shared library that is not named."""
    smaller = wheel.with_suffix(".smaller")
    with zipfile.ZipFile(wheel) as whole, zipfile.ZipFile(smaller, "w", zipfile.ZIP_DEFLATED) as kept:
        for entry in whole.infolist():
            name = entry.filename.rsplit("/", 1)[-1]
            if not name.endswith(".so") or name in libraries:
                kept.writestr(entry, whole.read(entry), zipfile.ZIP_DEFLATED)
    smaller.replace(wheel)


def command() -> str:
    """Return the command that unpacks the wheels beside the image's packages and runs every section."""
    unpack = f'for wheel in {FOLDER.name}/*.whl; do python3 -m zipfile -e "$wheel" /tmp/stackwise-site; done'
    run = f"PYTHONPATH=/tmp/stackwise-site:$PWD python3 -m benchmarks.gpu --out gpu-results --commit {commit()}"
    return f"{unpack}; {run}"


if __name__ == "__main__":
    sys.exit(main())

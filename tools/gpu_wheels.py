"""Pack what `python -m benchmarks.gpu` needs on a bare card into one folder: wheels that are unpacked, no installation.

    python tools/gpu_wheels.py gpu-site                          # for Python 3.12 and CUDA 13.0
    PYTHONPATH=gpu-site python -m benchmarks.gpu                 # there, in a copy of this checkout

For a machine that has torch, triton, transformers, accelerate and peft, and cannot reach a package index. Of
bitsandbytes' libraries only the one for that CUDA is kept: 5 MB of 60.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

#: Nothing here brings a torch of its own: dependencies that the machine has are left out.
PACKAGES = (
    "pydantic", "pydantic_core", "annotated_types", "typing_inspection", "pluggy", "trl", "datasets", "dill",
    "multiprocess", "xxhash", "bitsandbytes", "liger-kernel",
)  # fmt: skip


def arguments() -> argparse.ArgumentParser:
    """What may be asked for on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="version of Python there")
    parser.add_argument("--cuda", default="130", help="version of CUDA there, as bitsandbytes names its libraries")
    parser.add_argument("--packages", nargs="*", default=list(PACKAGES))
    return parser


def main() -> int:
    """Download, unpack, and print the size."""
    chosen = arguments().parse_args()
    pydantic = [name for name in chosen.packages if name.replace("-", "_") != "pydantic_core"]
    with tempfile.TemporaryDirectory() as wheels:
        # pydantic wants one very version of its core, so that the two are resolved together
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", wheels, "--only-binary=:all:"]
        download += ["--python-version", chosen.python, "--no-deps"]
        for platform in ("manylinux2014", "manylinux_2_17", "manylinux_2_24", "manylinux_2_28"):
            download += ["--platform", f"{platform}_x86_64"]
        subprocess.run([*download, *pydantic], check=True)
        if "pydantic" in pydantic:
            subprocess.run([*download, _core(Path(wheels))], check=True)
        chosen.folder.mkdir(parents=True, exist_ok=True)
        for wheel in sorted(Path(wheels).glob("*.whl")):
            with zipfile.ZipFile(wheel) as packed:
                unwanted = {name for name in packed.namelist() if "libbitsandbytes" in name}
                unwanted = {name for name in unwanted if not name.endswith(f"cuda{chosen.cuda}.so")}
                packed.extractall(chosen.folder, [name for name in packed.namelist() if name not in unwanted])
            print(wheel.name)
    size = sum(file.stat().st_size for file in chosen.folder.rglob("*") if file.is_file())
    print(f"{chosen.folder}: {size / 1e6:.0f} MB")
    return 0


def _core(wheels: Path) -> str:
    """`pydantic_core==...`, as the pydantic that was downloaded asks for it."""
    (wheel,) = wheels.glob("pydantic-*.whl")
    with zipfile.ZipFile(wheel) as packed:
        (about,) = (name for name in packed.namelist() if name.endswith(".dist-info/METADATA"))
        lines = packed.read(about).decode().splitlines()
    (found,) = (line for line in lines if line.startswith("Requires-Dist: pydantic-core"))
    return found.removeprefix("Requires-Dist: ").split(";")[0].replace(" ", "")


if __name__ == "__main__":
    sys.exit(main())

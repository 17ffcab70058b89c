"""Virtual environments of the peers, one each: they pin torch and transformers against each other.

    python benchmarks/peers/environments.py [NAME]...

Made under cache/peers/NAME from requirements/NAME.txt, which pins every package. torch 2.13.0 goes
in first, from wherever pip finds it: a range such as `torch>=2.14.1` would fetch gigabytes of CUDA
libraries, which a CPU has no use for. GPTQModel asks for 2.14.1 and runs on 2.13.0, so it is
installed without its dependencies, which the same file lists.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1] / "cache" / "peers"
TORCH = "torch==2.13.0"
PEERS = {
    "llm-compressor": "llmcompressor==0.14.0.1",
    "gptqmodel": "gptqmodel==7.7.0",
    "auto-round": "auto-round==0.16.1",
}


def python_of(name: str) -> Path:
    """Interpreter of a peer's environment."""
    return ROOT / name / "bin" / "python"


def create(name: str) -> None:
    """Make the environment of a peer, or complete one that an interruption left."""
    folder, python = ROOT / name, python_of(name)
    if (folder / "ready").is_file():
        return
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    install = [str(python), "-m", "pip", "install", "--quiet"]
    subprocess.run([*install, TORCH], check=True)
    subprocess.run([*install, "-r", str(HERE / "requirements" / f"{name}.txt"), TORCH], check=True)
    subprocess.run([*install, "--no-deps", "--no-build-isolation", PEERS[name]], check=True)
    (folder / "ready").touch()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PEERS)}")
    for name in parser.parse_args().names or PEERS:
        create(name)


if __name__ == "__main__":
    main()

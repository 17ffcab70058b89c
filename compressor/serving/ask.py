"""What an engine is asked, and what it answers; the same for every engine.

A question travels as JSON on standard input of a driver that runs in the engine's environment, and
the answer comes back on its standard output, so that the two sides share no package.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from compressor.programs import EngineFailed, run
from compressor.text import evaluation_documents, evaluation_domains

WINDOW = 256  # tokens
WINDOWS = 4
TOKENS = 16  # written greedily after each prompt
TIMED = 32  # written to measure speed
PROMPTS = ("The history of the", "def main():\n", "It is a truth universally")
_CHARACTERS = 4000  # of each domain
_DRIVER = Path(__file__).resolve().parent / "drivers" / "answer.py"


@dataclass(frozen=True)
class Question:
    """What is asked about a checkpoint.

    Attributes:
        text: that the windows are cut from.
        windows: token ids, every one of the same length; a window begins with the token that
            begins texts, where the tokenizer has one.
        prompts: to be continued greedily.
        prompt_ids: their tokens.
        tokens: how many to write after each.
        timed: how many to write to measure the speed; 0 for no measurement.
        clock: that the speed is measured by: `wall`, or `processor` time, which other work on the
            machine changes less.
        dtype: to compute in, as torch writes it; `auto` is the checkpoint's.
        options: of the engine itself, as its Python class takes them.
    """

    text: str
    windows: tuple[tuple[int, ...], ...]
    prompts: tuple[str, ...]
    prompt_ids: tuple[tuple[int, ...], ...]
    tokens: int = TOKENS
    timed: int = TIMED
    clock: Literal["wall", "processor"] = "wall"
    dtype: str = "auto"
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Longest text that the engine must hold, tokens."""
        longest = max((len(ids) for ids in self.prompt_ids), default=0)
        return max(len(self.windows[0]) + 1, longest + max(self.tokens, self.timed, 1))


@dataclass(frozen=True)
class Answer:
    """What the engine says.

    Attributes:
        version: of the engine.
        dtype: it computed in: `bfloat16`, `float16`, `float32`, or `int8` for a program that rounds
            the inputs of matrices to 8 bits.
        load_seconds: until it could be asked.
        logprobs: natural logarithms, for each window, of its tokens from `first` on.
        greedy: tokens written after each prompt.
        tokens_per_second: written, one text at a time, after its first token.
        counters: what it counted of speculative decoding.
        first: place in a window of the first token that was scored.
        retokenized: the engine wrote text, whose tokens may be others than it had in mind.
    """

    version: str
    dtype: str
    load_seconds: float
    logprobs: Sequence[Sequence[float]]
    greedy: Sequence[Sequence[int]]
    tokens_per_second: float | None
    counters: Mapping[str, float] = field(default_factory=dict)
    first: int = 1
    retokenized: bool = False


def make_question(
    tokenizer: Any, positions: int, *, window: int = WINDOW, **options: Any
) -> Question:
    """The question that every check asks, from the evaluation text of all domains.

    Args:
        tokenizer: of the checkpoint.
        positions: that the model has, tokens.
        window: longest window; half of the positions at most.
        options: other fields of the question.
    """
    text = "\n\n".join(
        evaluation_documents(domain)[0].text[:_CHARACTERS] for domain in evaluation_domains()
    )
    ids = tokenizer(text, verbose=False).input_ids
    length = min(window, positions // 2, len(ids) // 2)
    begins = ids[0] == tokenizer.bos_token_id
    windows = [ids[at : at + length] for at in range(0, len(ids) - length + 1, length)][:WINDOWS]
    if begins:
        windows = [[tokenizer.bos_token_id, *row[1:]] for row in windows]
    prompt_ids = tuple(tuple(tokenizer(prompt).input_ids) for prompt in PROMPTS)
    return Question(text, tuple(map(tuple, windows)), PROMPTS, prompt_ids, **options)


def ask_python(driver: Sequence[str], python: Path, checkpoint: Path, question: Question) -> Answer:
    """Put the question to an engine that is a Python package.

    Args:
        driver: module in `drivers`, and its arguments before the checkpoint.
        python: interpreter of the engine's environment.

    Raises:
        EngineFailed: it did not answer.
    """
    request = {
        "dtype": question.dtype,
        "length": question.length,
        "texts": question.windows,
        "prompts": question.prompt_ids,
        "tokens": question.tokens,
        "timed": question.timed,
        "clock": question.clock,
        "options": dict(question.options),
    }
    done = run([python, _DRIVER, *driver, checkpoint.absolute()], stdin=json.dumps(request))
    try:
        return Answer(**json.loads(done.stdout))
    except (ValueError, TypeError):
        raise EngineFailed("it did not give an answer that can be read", done.stderr) from None

"""A few words of any deliverable: by transformers, or by the only engine that runs it."""

from __future__ import annotations

import math
from pathlib import Path

from compressor import reload
from compressor.errors import VerificationError
from compressor.formats.capabilities import ENVIRONMENTS
from compressor.model.load import load_tokenizer
from compressor.programs import PROGRAMS
from compressor.serving.ask import Question
from compressor.serving.check import ask


def require_engine(form: str) -> None:
    """Make sure that what a deliverable's words need is there.

    Raises:
        ResourceError: only an engine runs this format, and it is not installed.
    """
    if form in ENVIRONMENTS:
        PROGRAMS[ENVIRONMENTS[form]].find()


def continued(folder: Path) -> str:
    """Load a deliverable and let it write a few tokens; what it wrote, the prompt included.

    Raises:
        ResourceError: only an engine runs it, and that is not installed.
        EngineFailed: the engine did not answer.
        ModelError: it cannot be loaded.
        VerificationError: it computes NaN or infinity.
    """
    engine = ENVIRONMENTS.get(reload.form_of(folder))
    if engine is None:
        return reload.continued(folder)
    program, tokenizer = PROGRAMS[engine], load_tokenizer(folder)
    prompt = tuple(tokenizer(reload.PROMPT).input_ids)
    twice = (*prompt, *prompt)  # the first token of a text is not scored
    question = Question("", (twice,), (reload.PROMPT,), (prompt,), reload.TOKENS, timed=0)
    answer = ask(program, program.find(), folder, tokenizer, question)
    if not all(math.isfinite(value) for row in answer.logprobs for value in row):
        raise VerificationError(f"{folder} computes NaN or infinity")
    return str(tokenizer.decode([*prompt, *answer.greedy[0]]))

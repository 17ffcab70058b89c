"""Measure models side by side outside of a run: `compress eval` and `compress compare`."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from compressor.diagnose import diagnose, nearest
from compressor.errors import RecipeError, UsageError
from compressor.evaluation.config import EvaluateConfig
from compressor.evaluation.gates import Gates, judge, overall_verdict
from compressor.evaluation.results import Evaluation, GateVerdict
from compressor.evaluation.session import BASE
from compressor.formats.files import checkpoint_bytes
from compressor.model.load import ModelSource, load_tokenizer, resolve
from compressor.progress import Observer
from compressor.sessions import open_session
from compressor.source import read_source, read_text


def compare_models(
    models: Sequence[str], config: EvaluateConfig, observer: Observer
) -> list[Evaluation]:
    """Score the first model, then every other one against it.

    Args:
        models: as typed; the base first.
        config: text, protocol, statistics.
        observer: told of progress.

    Returns:
        One evaluation a model, in order, named as typed.

    Raises:
        ModelError: a model is missing or broken.
        UsageError: a model cannot be paired with the base.
    """
    sources = [resolve(model) for model in models]
    with tempfile.TemporaryDirectory(prefix="compress-eval-") as work:
        session = open_session(
            sources[0].path,
            config,
            folder=Path(work) / "results",
            cache=Path(work) / "states",
            observer=observer,
        )
        for source in sources[1:]:
            _require_same_tokens(session.tokenizer, sources[0], source)
        names = [BASE, *models[1:]]
        results = [session.measure(name, s.path) for name, s in zip(names, sources, strict=True)]
    return [
        result.model_copy(update={"variant": model})
        for result, model in zip(results, models, strict=True)
    ]


def _require_same_tokens(tokenizer: Any, base: ModelSource, variant: ModelSource) -> None:
    """Token by token, two models can be compared only if a token means the same to both."""
    own, others = tokenizer.get_vocab(), load_tokenizer(variant.path).get_vocab()
    if own != others:
        raise UsageError(
            f"{variant.id} and {base.id} have different tokenizers: their distributions cannot be "
            "compared",
            "measure each alone with `compress eval`: bits per byte do not depend on the tokenizer",
        )


def read_gates(entries: Sequence[str]) -> Gates:
    """Limits from `NAME=LIMIT` options and YAML files of such; options win, then later files.

    Raises:
        UsageError: an entry is neither.
        RecipeError: a limit is unknown or senseless; carries every problem found.
    """
    for entry in entries:
        if "=" not in entry and not Path(entry).is_file():
            raise UsageError(
                f"--gate {entry}: neither NAME=LIMIT nor a file of limits",
                f"--gate {nearest(entry, Gates.model_fields) or 'max_kl'}=LIMIT",
            )
    limits = Gates.model_validate({})
    for path in (Path(entry) for entry in entries if "=" not in entry):
        limits = _limits(read_text(path), str(path), [], limits)
    return _limits("{}", "--gate", [entry for entry in entries if "=" in entry], limits)


def _limits(text: str, file: str, options: Sequence[str], before: Gates) -> Gates:
    source = read_source(text, file, options, option="--gate")
    try:
        found = Gates.model_validate_json(json.dumps(source.data), strict=True)
    except ValidationError as error:
        raise RecipeError(diagnose(error, Gates, source, root="gates")) from None
    return before.model_copy(update=found.model_dump(exclude_unset=True))


def judge_models(gates: Gates, evaluation: Evaluation, model: str) -> tuple[list[GateVerdict], str]:
    """Verdict of every limit that is set, and of all together.

    Args:
        gates: the limits.
        evaluation: of the variant against the base.
        model: the variant as typed; its files are weighed.
    """
    verdicts = judge(gates, evaluation, checkpoint_bytes(resolve(model).path))
    return verdicts, overall_verdict(verdicts) if verdicts else "NO GATES"

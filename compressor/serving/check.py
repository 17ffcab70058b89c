"""`compress serve-check`: does an engine compute from our files what we measured?

Three things are asked of the engine about every deliverable that it loads: the log-probability of
every token of a short text, the text that it writes greedily after three prompts, and how fast.

The verdict is PASS where, against transformers in fp32 on the weights that were measured, the mean
absolute difference of log-probabilities is at most `TIMES` what the engine's arithmetic alone
causes (`reference.own_error`), or `FLOOR` where it computes in fp32; and where it never writes a
token that is less likely than the best one by more than twice the largest difference seen.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from compressor.errors import CompressorError, ModelError, UsageError, VerificationError
from compressor.formats.capabilities import ENGINES
from compressor.model.architecture import Architecture
from compressor.model.load import load_model, load_tokenizer, read_config, resolve
from compressor.programs import PROGRAMS, EngineFailed, Program
from compressor.progress import Observer
from compressor.provenance import combined_sha256, hash_files
from compressor.reload import as_checkpoint
from compressor.report.render import load_report
from compressor.report.schema import EngineCheck
from compressor.serving.ask import Answer, Question, ask_python, make_question
from compressor.serving.llama_cpp import ask_llama_cpp
from compressor.serving.reference import (
    container_of,
    expected,
    greedy,
    greedy_steps,
    own_error,
)

TIMES = 4.0
FLOOR = 1e-4  # nats; sums in another order differ by a hundredth of it
_CHANGED = "its files are not those that the run left; see compress verify RUN"
_DRIVERS: Mapping[str, tuple[str, ...]] = {
    "vllm": ("serve_vllm",),
    "transformers": ("serve_hugging_face", "transformers"),
    "gptqmodel": ("serve_hugging_face", "gptqmodel"),
    "onnxruntime": ("serve_hugging_face", "onnxruntime"),
    "openvino": ("serve_hugging_face", "openvino"),
}


@dataclass(frozen=True)
class Subject:
    """Files that an engine is asked about.

    Attributes:
        folder: the deliverable.
        form: its format.
        measured: checkpoint with the weights that were measured, where a run has it.
        original: the model before any stage, where it is on this machine.
        like: checkpoint whose configuration and tokenizer the files have, where another quantizer
            rounded their weights.
        sha256: of the files as the run left them, where one did.
    """

    folder: Path
    form: str
    measured: Path | None = None
    original: Path | None = None
    like: Path | None = None
    sha256: str | None = None

    @property
    def name(self) -> str:
        """What tells it from others of a run: `gguf-Q4_K_M`; else its format."""
        return self.folder.name if self.folder.name.startswith(f"{self.form}-") else self.form


def serve_check(
    folder: Path,
    engine: str,
    observer: Observer,
    *,
    at: Path | None = None,
    form: str | None = None,
) -> list[EngineCheck]:
    """Ask an engine about a checkpoint, or about every deliverable of a run that it loads.

    Args:
        folder: of a run or of a checkpoint.
        engine: of `PROGRAMS`.
        observer: told of progress.
        at: where the engine is, if not where it is looked for.
        form: look at the deliverable of this format only.

    Raises:
        ResourceError: the engine is not there.
        UsageError: there is nothing here that it loads.
    """
    program = PROGRAMS[engine]
    where = program.find(at)
    subjects = subjects_of(folder, program, form)
    found = []
    for subject in subjects:
        observer.event("ask", engine=program.title, about=subject.name)
        found.append(check(program, where, subject, observer))
    return found


def prove(
    engine: str, checkpoint: Path, folder: Path, original: Path, observer: Observer
) -> EngineCheck:
    """Ask the only engine that loads a deliverable whether it computes what the checkpoint does.

    Raises:
        ResourceError: the engine is not there.
        VerificationError: it does not.
    """
    program = PROGRAMS[engine]
    subject = Subject(folder, folder.name, checkpoint, original)
    found = check(program, program.find(), subject, observer)
    if found.verdict == "FAIL":
        raise VerificationError(f"{program.title} and {folder.name}: {found.detail}")
    return found


def subjects_of(folder: Path, program: Program, form: str | None = None) -> list[Subject]:
    """What the engine can load of a run, or the checkpoint itself.

    Raises:
        UsageError: nothing.
    """
    subjects = list(_subjects(folder))
    if form:
        subjects = [subject for subject in subjects if subject.form == form]
        if not subjects:
            raise UsageError(f"{folder} has no {form}", f"compress export {folder} --as {form}")
    loads = ENGINES[_limits(program)].containers
    fitting = [s for s in subjects if set(container_of(s.folder)) <= set(loads)]
    if not fitting:
        held = ", ".join(dict.fromkeys(c for s in subjects for c in container_of(s.folder)))
        raise UsageError(
            f"{program.title} loads {', '.join(loads)}, and {folder} holds {held or 'none'}",
            "compress export RUN --as FORMAT adds a deliverable; compress ls engines",
        )
    return fitting


def _limits(program: Program) -> str:
    """What the engine loads depends on where it computes."""
    return program.limits[1 if torch.cuda.is_available() else 0]


def _subjects(folder: Path) -> Iterator[Subject]:
    if not (folder / "report.json").is_file():
        yield Subject(folder, _form(folder))
        return
    report = load_report(folder)
    artifacts = report.deliverables or tuple(v.artifact for v in report.variants if v.artifact)
    stages = (folder / "stages" / variant.id for variant in reversed(report.variants))
    last = next((stage for stage in stages if stage.is_dir()), None)
    original = _local(report.base.id)
    for artifact in artifacts:
        ours = artifact.quantizer is None
        measured, like = (last, None) if ours else (None, last)
        path = folder / artifact.path
        yield Subject(path, artifact.format, measured, original, like, artifact.sha256)


def _form(folder: Path) -> str:
    return (
        "compressed-tensors" if "quantized" in container_of(folder)[0] else container_of(folder)[0]
    )


def _local(model: str) -> Path | None:
    """The original, unless it would have to be fetched."""
    if "/" in model and not Path(model).is_dir():
        return None
    try:
        return resolve(model).path
    except ModelError:
        return None


def check(program: Program, where: Path, subject: Subject, observer: Observer) -> EngineCheck:
    """Ask, compare, judge."""
    facts: dict[str, Any] = {
        "engine": program.name,
        "title": program.title,
        "format": subject.name,
        "sha256": combined_sha256(hash_files(subject.folder)),
    }
    if subject.sha256 not in (None, facts["sha256"]):
        return EngineCheck(**facts, verdict="FAIL", detail=_CHANGED)
    with as_checkpoint(subject.measured or subject.folder, subject.like) as checkpoint:
        tokenizer = load_tokenizer(checkpoint)
        architecture = Architecture.from_config(read_config(checkpoint))
        question = make_question(tokenizer, architecture.max_positions)
        try:
            answer = ask(program, where, subject.folder, tokenizer, question)
        except EngineFailed as error:
            observer.event("failed", engine=program.title, log=_kept(error.log))
            return EngineCheck(**facts, verdict="FAIL", detail=error.message)
        found = compare(checkpoint, question, answer, subject.original)
    verdict, detail = judge(found)
    return EngineCheck(
        **facts,
        verdict=verdict,
        detail=detail,
        version=answer.version,
        arithmetic=answer.dtype,
        load_seconds=answer.load_seconds,
        tokens_per_second=answer.tokens_per_second,
        **found,
    )


def _kept(log: str) -> str:
    """The file with all that an engine wrote."""
    with tempfile.NamedTemporaryFile(
        "w", prefix="compress-engine-", suffix=".log", delete=False, encoding="utf-8"
    ) as file:
        file.write(log)
    return file.name


def ask(program: Program, where: Path, folder: Path, tokenizer: Any, question: Question) -> Answer:
    """Put a question to an engine.

    Raises:
        EngineFailed: it did not answer.
    """
    if program.name == "llama.cpp":
        (file,) = folder.glob("*.gguf")
        return ask_llama_cpp(where, file, tokenizer, question)
    return ask_python(_DRIVERS[program.name], where, folder, question)


def compare(
    checkpoint: Path, question: Question, answer: Answer, original: Path | None = None
) -> dict[str, Any]:
    """How far an answer is from what the checkpoint says; fields of `EngineCheck`."""
    model = load_model(checkpoint, dtype=torch.float32)
    ours = expected(model, question, answer.first)
    theirs = torch.tensor(answer.logprobs, dtype=torch.float64)
    told = ~theirs.isnan()
    error = own_error(checkpoint, model, question, answer.first, answer.dtype)[told]
    difference = (theirs - ours)[told]
    same, gap = _greedy(model, question, answer)
    return {
        "tokens": int(told.sum()),
        "difference": float(difference.abs().mean()),
        "largest": float(difference.abs().max()),
        "bias": float(difference.mean()),
        "allowed": max(TIMES * float(error.mean()), FLOOR),
        "to_original": _distance(original, question, answer.first, theirs, told),
        "prompts": len(question.prompts),
        "same_text": same,
        "gap": gap,
        "gap_allowed": 2 * max(float(difference.abs().max()), float(error.max()), FLOOR),
    }


def _greedy(model: Any, question: Question, answer: Answer) -> tuple[int, float]:
    """Prompts continued as here, and the largest step away from the most likely token, nats."""
    same, gap = 0, 0.0
    for prompt, written in zip(question.prompt_ids, answer.greedy, strict=True):
        ours = greedy(model, prompt, question.tokens)
        length = min(len(ours), len(written))
        apart = next((i for i in range(length) if ours[i] != written[i]), length)
        same += apart == length > 0
        # Tokens of a text that was split anew are those of the engine up to the first other one.
        kept = written[: apart + 1] if answer.retokenized else written
        if len(kept):
            gap = max(gap, float(greedy_steps(model, prompt, kept).max()))
    return same, gap


def _distance(
    original: Path | None, question: Question, first: int, theirs: Tensor, told: Tensor
) -> float | None:
    """Mean |Δ log p| between the engine and the model before any stage: what the check can see."""
    if original is None:
        return None
    try:
        model = load_model(original, dtype=torch.float32)
    except CompressorError:
        return None
    return float((theirs - expected(model, question, first))[told].abs().mean())


def judge(found: Mapping[str, Any]) -> tuple[Literal["PASS", "FAIL"], str]:
    """PASS or FAIL, and the reason; the rule is that of the module."""
    difference, allowed = found["difference"], found["allowed"]
    if not difference <= allowed:  # NaN fails
        return "FAIL", (
            f"its log-probabilities are {difference:.3g} nats from ours on average, where its "
            f"arithmetic explains {allowed:.3g}"
        )
    if not found["gap"] <= found["gap_allowed"]:
        return "FAIL", (
            f"it wrote a token {found['gap']:.3g} nats less likely than the best one, where "
            f"{found['gap_allowed']:.3g} are explained"
        )
    return "PASS", "it computes what was measured"

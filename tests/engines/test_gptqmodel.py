"""Our `gptq` and `awq` files in GPTQModel on CPU, in its own environment.

`tools/engines/install.py gptqmodel` installs it once; it compiles its kernels at the first load.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compressor.formats import exporters
from compressor.formats.capabilities import ENGINES
from compressor.formats.exporters import Source
from compressor.model.load import load_tokenizer
from compressor.programs import PROGRAMS
from compressor.progress import SilentObserver
from compressor.resources import builtin_model
from compressor.serving.ask import Question, make_question
from compressor.serving.check import Subject, ask, check, compare, judge
from compressor.types import WeightScheme
from tests.formats.helpers import quantize_checkpoint
from tools.engines import install

pytestmark = pytest.mark.engines
ENGINE = PROGRAMS["gptqmodel"]


@pytest.fixture(scope="session")
def python() -> Path:
    return install.install("gptqmodel")


@pytest.fixture(scope="module")
def question() -> Question:
    return replace(make_question(load_tokenizer(builtin_model("tiny")), 512), timed=0)


def written(folder: Path, form: Any, choose: Any) -> tuple[Path, Path]:
    """A dense checkpoint of rounded weights, and its codes as a deliverable."""
    dense, codes = quantize_checkpoint(builtin_model("tiny"), folder / "d", choose)
    exporters.exporter(form).write(Source(dense, codes, 1, form), folder / "out")
    return dense, folder / "out"


@pytest.mark.parametrize(
    ("form", "scheme"),
    [
        ("gptq", WeightScheme(4, 64)),
        ("gptq", WeightScheme(4, 64, "asymmetric")),
        ("gptq", WeightScheme(8, None)),
        ("gptq", WeightScheme(8, 64, "asymmetric")),
        ("gptq", WeightScheme(3, 64)),
        ("gptq", WeightScheme(3, 64, "asymmetric")),
        ("gptq", WeightScheme(2, 64, "asymmetric")),
        ("awq", WeightScheme(4, 64, "asymmetric")),
    ],
    ids=[
        "W4",
        "W4 asymmetric, v2",
        "W8 by channel",
        "W8 asymmetric, v2",
        "W3",
        "W3 asymmetric, v2",
        "W2 asymmetric, v2",
        "W4 AWQ",
    ],
)
def test_it_computes_the_rounded_weights(
    python: Path, tmp_path: Path, question: Question, form: Any, scheme: WeightScheme
) -> None:
    dense, out = written(tmp_path, form, lambda m: scheme if ".layers." in m else None)
    answer = ask(ENGINE, python, out, load_tokenizer(dense), question)
    found = compare(dense, question, answer, builtin_model("tiny"))
    print(form, scheme, answer.dtype, found)
    assert judge(found)[0] == "PASS", found
    assert abs(found["bias"]) < found["allowed"] / 4
    assert scheme.bits in ENGINES["gptqmodel"].containers[form].bits
    if scheme.bits < 8:
        assert found["to_original"] > 3 * found["difference"]


@pytest.mark.parametrize(
    ("form", "scheme"),
    [
        ("gptq", WeightScheme(4, 64)),
        ("gptq", WeightScheme(4, 64, "asymmetric")),
        ("awq", WeightScheme(4, 64, "asymmetric")),
    ],
    ids=["W4", "W4 asymmetric, v2", "W4 AWQ"],
)
def test_transformers_loads_it_through_gptqmodel(
    python: Path, tmp_path: Path, question: Question, form: Any, scheme: WeightScheme
) -> None:
    """`AutoModelForCausalLM.from_pretrained`, with optimum and GPTQModel's kernels beside it."""
    dense, out = written(tmp_path, form, lambda m: scheme if ".layers." in m else None)
    answer = ask(PROGRAMS["transformers"], python, out, load_tokenizer(dense), question)
    found = compare(dense, question, answer, builtin_model("tiny"))
    print(form, scheme, answer.version, answer.dtype, found)
    assert judge(found)[0] == "PASS", found
    assert found["to_original"] > 3 * found["difference"]
    assert ENGINES["transformers"].containers[form].evidence == "run"


def test_mixed_grids_are_looked_up_by_name(
    python: Path, tmp_path: Path, question: Question
) -> None:
    """What `dynamic` says is what GPTQModel does: 8 bits here, dense there."""

    def choose(module: str) -> WeightScheme | None:
        if "layers.1.mlp.down_proj" in module or ".layers." not in module:
            return None
        return WeightScheme(8, 64) if "layers.1.self_attn" in module else WeightScheme(4, 64)

    dense, out = written(tmp_path, "gptq", choose)
    answer = ask(ENGINE, python, out, load_tokenizer(dense), question)
    assert judge(compare(dense, question, answer))[0] == "PASS"


def test_other_zero_points_fail(python: Path, tmp_path: Path) -> None:
    """The mutant: words of version 1 in a file that says version 2, one step off everywhere."""
    dense, out = written(
        tmp_path, "gptq", lambda m: WeightScheme(4, 64) if ".layers." in m else None
    )
    for name in ("config.json", "quantize_config.json"):
        text = (out / name).read_text()
        right = '"checkpoint_format": "gptq"'
        assert right in text
        (out / name).write_text(text.replace(right, '"checkpoint_format": "gptq_v2"'))
    found = check(ENGINE, python, Subject(out, "gptq", dense), SilentObserver())
    assert found.verdict == "FAIL"
    assert found.difference is not None, found.detail
    assert found.allowed is not None
    assert found.difference > 3 * found.allowed


def test_what_it_refuses_to_load_fails_with_its_reason(python: Path, tmp_path: Path) -> None:
    """Asymmetric words under the name of version 1: GPTQModel takes those from itself only."""
    dense, out = written(
        tmp_path, "gptq", lambda m: WeightScheme(4, 64, "asymmetric") if ".layers." in m else None
    )
    for name in ("config.json", "quantize_config.json"):
        (out / name).write_text((out / name).read_text().replace("gptq_v2", "gptq"))
    found = check(ENGINE, python, Subject(out, "gptq", dense), SilentObserver())
    assert found.verdict == "FAIL"
    assert "sym=False" in found.detail

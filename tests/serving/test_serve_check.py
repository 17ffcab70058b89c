"""What `compress serve-check` asks, compares and writes; the engine here is transformers."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.cli import main
from compressor.engine import RunOutcome, export_run
from compressor.errors import ModelError, ResourceError, UsageError
from compressor.formats import exporters
from compressor.formats.exporters import Source
from compressor.formats.shards import CheckpointReader
from compressor.model.load import load_model, load_tokenizer
from compressor.programs import PROGRAMS, EngineFailed
from compressor.programs import run as run_program
from compressor.progress import SilentObserver
from compressor.publish import plan_publication
from compressor.reload import as_checkpoint
from compressor.report.render import load_report, stale_files
from compressor.report.schema import EngineCheck
from compressor.report.text import to_text
from compressor.resources import builtin_model
from compressor.sections import ExportConfig
from compressor.serving import check as checking
from compressor.serving.ask import Answer, Question, ask_python, make_question
from compressor.serving.check import Subject, compare, judge, subjects_of
from compressor.serving.record import record
from compressor.serving.reference import container_of
from compressor.types import WeightScheme
from tests import runs
from tests.formats.helpers import quantize_checkpoint

RECIPE = """\
stages:
  - {method: quantize.rtn, bits: 4, group_size: 64}
evaluate: {documents: 1, length: 128, noise_floor: false, resamples: 200}
"""
DRIVER = ("serve_hugging_face", "transformers")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunOutcome:
    return runs.run(tmp_path_factory.mktemp("run"), RECIPE)


@pytest.fixture(scope="module")
def question() -> Question:
    asked = make_question(load_tokenizer(builtin_model("tiny")), 512, window=128)
    return dataclasses.replace(asked, timed=0)


@pytest.fixture(scope="module")
def answer(finished: RunOutcome, question: Question) -> Answer:
    """What transformers says about the deliverable, in a process of its own."""
    folder = finished.folder / "deliverable" / "compressed-tensors"
    return ask_python(DRIVER, Path(sys.executable), folder, question)


@pytest.fixture(scope="module")
def measured(finished: RunOutcome) -> Path:
    return finished.folder / "stages" / "01-quantize.rtn"


@pytest.fixture(scope="module")
def found(measured: Path, question: Question, answer: Answer) -> dict[str, Any]:
    return compare(measured, question, answer, builtin_model("tiny"))


@pytest.fixture(scope="module")
def passed(found: dict[str, Any], answer: Answer, finished: RunOutcome) -> EngineCheck:
    return EngineCheck(
        engine="transformers",
        title="Transformers",
        version=answer.version,
        format="compressed-tensors",
        sha256=finished.report.deliverables[0].sha256,
        verdict="PASS",
        detail="it computes what was measured",
        arithmetic=answer.dtype,
        load_seconds=answer.load_seconds,
        tokens_per_second=123.4,
        **found,
    )


def test_an_engine_that_computes_our_weights_passes(
    found: dict[str, Any], answer: Answer, question: Question
) -> None:
    """bf16 in another process is bf16 here; the original model is ten times as far."""
    assert judge(found) == ("PASS", "it computes what was measured")
    assert found["tokens"] == 127 * len(question.windows)
    assert answer.dtype == "bfloat16"
    assert found["difference"] == pytest.approx(found["allowed"] / checking.TIMES, rel=0.05)
    assert found["to_original"] > 5 * found["difference"]
    assert abs(found["bias"]) < found["difference"]
    assert found["same_text"] >= 1
    assert found["gap"] <= found["gap_allowed"]


def test_other_weights_fail(question: Question, answer: Answer) -> None:
    """The original's weights are 4-bit noise away, and that is seen."""
    verdict, why = judge(compare(builtin_model("tiny"), question, answer))
    assert verdict == "FAIL"
    assert "nats from ours on average" in why


@pytest.mark.parametrize("wrong", ["one token late", "sharpened", "not a number"])
def test_wrong_log_probabilities_fail(
    measured: Path, question: Question, answer: Answer, wrong: str
) -> None:
    changed = {
        "one token late": [[*row[1:], row[0]] for row in answer.logprobs],
        "sharpened": [[1.05 * p for p in row] for row in answer.logprobs],
        "not a number": [[float("inf"), *row[1:]] for row in answer.logprobs],
    }[wrong]
    compared = compare(measured, question, dataclasses.replace(answer, logprobs=changed))
    assert judge(compared)[0] == "FAIL"


def test_a_token_that_is_not_the_best_one_fails(
    measured: Path, question: Question, answer: Answer
) -> None:
    written = [list(row) for row in answer.greedy]
    written[1][3] = (written[1][3] + 1000) % 4096
    compared = compare(measured, question, dataclasses.replace(answer, greedy=written))
    verdict, why = judge(compared)
    assert verdict == "FAIL"
    assert "less likely than the best one" in why
    # Text that was split into tokens anew says nothing after the first other token.
    late = [list(row) for row in answer.greedy]
    late[1] = [*late[1][:2], 7, 8, 9]
    again = dataclasses.replace(answer, greedy=late, retokenized=True)
    compared = compare(measured, question, again)
    model = load_model(measured, dtype=torch.float32)
    step = checking.greedy_steps(model, question.prompt_ids[1], late[1][:3])[2]
    assert compared["gap"] == pytest.approx(float(step))


def test_arithmetic_in_fp32_has_a_floor(measured: Path, question: Question, answer: Answer) -> None:
    model = load_model(measured, dtype=torch.float32)
    exact = checking.expected(model, question, 1).tolist()
    said = dataclasses.replace(answer, logprobs=exact, dtype="float32")
    compared = compare(measured, question, said)
    assert compared["difference"] < 1e-9
    assert compared["allowed"] == checking.FLOOR
    off = [[p + 2e-4 for p in row] for row in exact]
    assert judge(compare(measured, question, dataclasses.replace(said, logprobs=off)))[0] == "FAIL"


def test_8_bit_inputs_are_coarser_than_bf16(
    measured: Path, question: Question, answer: Answer
) -> None:
    model = load_model(measured, dtype=torch.float32)
    before = checking.expected(model, question, 1)
    errors = {
        dtype: float(checking.own_error(measured, model, question, 1, dtype).mean())
        for dtype in ("bfloat16", "int8", "float32")
    }
    assert errors["float32"] == 0 < errors["bfloat16"] < errors["int8"] < 0.1
    assert torch.equal(checking.expected(model, question, 1), before)  # the hooks are gone


def test_the_result_is_part_of_the_report(
    finished: RunOutcome, passed: EngineCheck, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished.folder, tmp_path / "run"))
    before = load_report(run)
    report = record(run, [passed])
    assert load_report(run) == report
    assert report.engine_checks == (passed,)
    assert report.run.seconds == before.run.seconds
    assert not stale_files(run)
    assert "Checked in engines" in (run / "report.html").read_text()
    card = (run / "README.md").read_text()
    assert "computes from compressed-tensors what was measured" in card
    assert "123" in to_text(report)
    record(run, [passed.model_copy(update={"tokens_per_second": 99.0})])
    assert [check.tokens_per_second for check in load_report(run).engine_checks] == [99.0]
    later = export_run(run, [ExportConfig(format="gptq")]).report
    assert later.engine_checks[0].tokens_per_second == 99.0
    first, second = plan_publication(run, "me/x", public=False).repositories
    published = [json.loads(str(r.files["report.json"])) for r in (first, second)]
    assert [len(report["engine_checks"]) for report in published] == [1, 0]


def test_a_failure_is_a_warning_and_another_file_is_not_meant(
    finished: RunOutcome, passed: EngineCheck, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished.folder, tmp_path / "run"))
    bad = EngineCheck(
        engine="vllm",
        title="vLLM",
        format="compressed-tensors",
        sha256=passed.sha256,
        verdict="FAIL",
        detail="it ended with code 1: no",
    )
    report = record(run, [bad, passed.model_copy(update={"sha256": "0" * 64})])
    assert report.engine_checks == (bad,)
    assert any("vLLM does not compute" in warning.text for warning in report.warnings)
    assert not any("vLLM" in claim.text for claim in report.claims)


def test_files_that_were_changed_since_fail_unasked(finished: RunOutcome, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished.folder, tmp_path / "run"))
    program = PROGRAMS["transformers"]
    (subject,) = subjects_of(run, program, "compressed-tensors")
    (file,) = subject.folder.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    found = checking.check(program, Path("nowhere"), subject, SilentObserver())
    assert (found.verdict, "not those that the run left" in found.detail) == ("FAIL", True)


def test_what_an_engine_loads_is_chosen(finished: RunOutcome) -> None:
    folder = finished.folder
    assert [s.form for s in subjects_of(folder, PROGRAMS["vllm"])] == ["compressed-tensors"]
    (subject,) = subjects_of(folder, PROGRAMS["transformers"], "compressed-tensors")
    assert subject.measured == folder / "stages" / "01-quantize.rtn"
    assert subject.original == builtin_model("tiny")
    with pytest.raises(UsageError, match=r"llama\.cpp loads gguf, .* holds pack-quantized"):
        subjects_of(folder, PROGRAMS["llama.cpp"])
    with pytest.raises(UsageError, match="has no gptq"):
        subjects_of(folder, PROGRAMS["vllm"], "gptq")
    names = ("gguf", "gguf-Q4_K_M", "gguf-embedding-Q8_0", "some-folder")
    told = [Subject(Path("run") / name, "gguf").name for name in names]
    assert told == [*names[:3], "gguf"]
    (bare,) = subjects_of(builtin_model("tiny"), PROGRAMS["vllm"])
    assert (bare.form, bare.measured, bare.original) == ("dense", None, None)


@pytest.mark.parametrize("form", ["gptq", "awq", "gguf"])
def test_files_alone_are_compared_with_what_they_hold(tmp_path: Path, form: Any) -> None:
    scheme = WeightScheme(4, 64, "asymmetric")
    dense, codes = quantize_checkpoint(
        builtin_model("tiny"), tmp_path / "d", lambda m: scheme if ".layers." in m else None
    )
    exporters.exporter(form).write(Source(dense, codes, 1, form), tmp_path / "out")
    assert container_of(tmp_path / "out") == (form,)
    with as_checkpoint(tmp_path / "out") as folder:
        held, ours = CheckpointReader(folder), CheckpointReader(dense)
        assert set(held) == set(ours)
        assert all(torch.equal(held[name].to(ours[name].dtype), ours[name]) for name in ours)
        assert load_model(folder).config.to_dict().get("quantization_config") is None
        text = "The history of  the 1234 größte — don't!\n\tx = f(y)  # 中文"
        assert load_tokenizer(folder)(text).input_ids == load_tokenizer(dense)(text).input_ids
        model, same = (
            load_model(folder, dtype=torch.float32),
            load_model(dense, dtype=torch.float32),
        )
        ids = torch.tensor([load_tokenizer(dense)(text).input_ids])
        assert torch.equal(model(ids).logits, same(ids).logits)


def test_a_file_of_an_unknown_family_is_refused(tmp_path: Path) -> None:
    exporters.exporter("gguf").write(Source(builtin_model("tiny"), {}, 1, "gguf"), tmp_path)
    file = tmp_path / "model.gguf"
    name = b"general.architecture"
    data = bytearray(file.read_bytes())
    at = data.index(b"llama", data.index(name) + len(name))
    data[at : at + 5] = b"lemma"
    file.write_bytes(data)
    with (
        pytest.raises(ModelError, match=r"does not read model\.gguf.*lemma"),
        as_checkpoint(tmp_path),
    ):
        pass
    graph = tmp_path / "graph"
    graph.mkdir()
    (graph / "model.onnx").touch()
    with pytest.raises(UsageError, match="nothing here reads weights"), as_checkpoint(graph):
        pass


def test_an_engine_that_fails_says_why(tmp_path: Path, question: Question) -> None:
    with pytest.raises(EngineFailed, match=r"ended with code 1: .*nothing") as caught:
        ask_python(DRIVER, Path(sys.executable), tmp_path / "nothing", question)
    assert "Traceback" in caught.value.log


# ---------------------------------------------------------------- the command


@pytest.fixture
def restored() -> Iterator[None]:
    hook = sys.excepthook
    yield
    sys.excepthook = hook


def command(*words: Any) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["serve-check", *map(str, words), "-q"])
    return int(caught.value.code or 0)


@pytest.mark.usefixtures("restored")
def test_exit_codes(
    finished: RunOutcome,
    passed: EngineCheck,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = Path(shutil.copytree(finished.folder, tmp_path / "run"))
    monkeypatch.setenv("COMPRESS_VLLM", str(tmp_path / "nowhere"))
    assert command(run, "--engine", "vllm") == 3
    assert "install.py vllm" in capsys.readouterr().err
    monkeypatch.setattr(checking, "check", lambda *_: passed)
    assert command(run, "--engine", "transformers") == 0
    out = capsys.readouterr().out
    assert out.startswith("PASS  Transformers")
    assert "nats from ours on average" in out
    failed = passed.model_copy(update={"verdict": "FAIL", "detail": "no"})
    monkeypatch.setattr(checking, "check", lambda *_: failed)
    assert command(run, "--engine", "transformers", "--format", "json") == 1
    (told,) = json.loads(capsys.readouterr().out)  # one document, not an error after it
    assert told["verdict"] == "FAIL"
    assert load_report(run).engine_checks[0].verdict == "FAIL"
    assert command(run, "--engine", "transformers", "--as", "gguf") == 2


def test_where_engines_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMPRESS_VLLM", raising=False)
    environment = tmp_path / "env"
    (environment / "bin").mkdir(parents=True)
    (environment / "bin" / "python").touch()
    vllm, llama = PROGRAMS["vllm"], PROGRAMS["llama.cpp"]
    assert vllm.find(environment) == environment / "bin" / "python"
    assert vllm.find(environment / "bin" / "python") == environment / "bin" / "python"
    monkeypatch.setenv("COMPRESS_VLLM", str(environment))
    assert vllm.find() == environment / "bin" / "python"
    with pytest.raises(ResourceError, match=r"no llama\.cpp in") as caught:
        llama.find(environment)
    assert "build_llama_cpp.py" in caught.value.hint
    for tool in ("llama-perplexity", "llama-completion"):
        (environment / "bin" / tool).touch()
    assert llama.find(environment) == environment / "bin"
    assert PROGRAMS["transformers"].find() == Path(sys.executable)


def test_vllm_computes_what_the_file_says_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "VLLM_CPU_INT4_W4A8"
    monkeypatch.delenv(name, raising=False)
    show = [sys.executable, "-c", f"import os; print(os.environ['{name}'])"]
    assert run_program(show).stdout == "0\n"
    monkeypatch.setenv(name, "1")  # as it would serve
    assert run_program(show).stdout == "1\n"


def test_the_question_has_windows_of_one_length(question: Question) -> None:
    assert {len(row) for row in question.windows} == {128}
    assert question.length == 129
    tokenizer = load_tokenizer(builtin_model("tiny"))
    assert len(make_question(tokenizer, 64).windows[0]) == 32
    assert tokenizer.decode(question.windows[0]) in question.text


def test_processor_time_is_that_of_the_busiest_process() -> None:
    """Waiting counts by the clock only; work of a child counts, beside a parent that waits."""
    from compressor.serving.drivers.answer import CLOCKS

    def rest() -> None:
        time.sleep(0.3)

    def work() -> None:
        began = time.process_time()
        while time.process_time() - began < 0.3:
            pass

    assert CLOCKS["wall"](rest) >= 0.3
    assert CLOCKS["processor"](rest) < 0.2
    assert CLOCKS["processor"](work) >= 0.28

    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys\nfor _ in sys.stdin: sum(range(10**7)); print(flush=True)",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None

    def ask_child() -> None:
        child.stdin.write("\n")
        child.stdin.flush()
        child.stdout.readline()

    ask_child()  # it has started
    assert CLOCKS["processor"](ask_child) > 0.02
    child.stdin.close()
    child.wait()

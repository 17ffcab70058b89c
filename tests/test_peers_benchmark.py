"""The parts of benchmarks/peers on which its numbers rest: reading packed codes, and the meter."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor.calibration import load_mix
from compressor.evaluation.measure import TokenScores
from compressor.evaluation.results import Protocol
from compressor.evaluation.summary import compare
from compressor.resources import builtin_model

PEERS = Path(__file__).resolve().parent.parent / "benchmarks" / "peers"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    """Import a script of the benchmark, as it is imported when run."""
    monkeypatch.syspath_prepend(PEERS)
    yield importlib.import_module
    for name in ("dense", "meter", "methods", "environments", "tables"):
        sys.modules.pop(name, None)


def pack(codes: list[int], bits: int) -> list[int]:
    """Codes as one integer, lowest first, cut into signed words: the definition of the layout."""
    whole = sum(code << (bits * position) for position, code in enumerate(codes))
    words = [(whole >> (32 * i)) & 0xFFFFFFFF for i in range(len(codes) * bits // 32)]
    return [word - (1 << 32) if word >> 31 else word for word in words]


def packed_matrix(
    bits: int, less_one: bool, order: torch.Tensor
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A random matrix [32, 64] in groups of 32, packed, and the weight that it stands for."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (64, 32), generator=generator)  # [in, out]
    zeros = torch.randint(1, 1 << bits, (2, 32), generator=generator)
    scales = torch.rand(2, 32, generator=generator).half() - 0.5
    group = order // 32
    stored = zeros - 1 if less_one else zeros
    tensors = {
        "qweight": torch.tensor([pack(row.tolist(), bits) for row in codes.T]).T.int().contiguous(),
        "qzeros": torch.tensor([pack(row.tolist(), bits) for row in stored]).int(),
        "scales": scales,
        "g_idx": group.int(),
    }
    weight = scales.float()[group] * (codes - zeros[group])
    return tensors, weight.T


@pytest.mark.parametrize("less_one", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packed_codes_stand_for_the_weight(load, bits: int, less_one: bool) -> None:
    dense: ModuleType = load("dense")
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    tensors, weight = packed_matrix(bits, less_one, order)
    assert torch.equal(dense.dequantize(tensors, bits, less_one=less_one), weight)
    assert not torch.equal(dense.dequantize(tensors, bits, less_one=not less_one), weight)


def test_groups_are_in_order_without_an_index(load) -> None:
    dense = load("dense")
    tensors, weight = packed_matrix(4, True, torch.arange(64))
    del tensors["g_idx"]
    assert torch.equal(dense.dequantize(tensors, 4, less_one=True), weight)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"checkpoint_format": "gptq"}, True),
        ({"checkpoint_format": "gptq_v2"}, False),
        ({"packing_format": "auto_round:auto_gptq"}, True),
        ({"packing_format": "auto_round:gptq_v2"}, False),
        ({}, True),
    ],
)
def test_layout_of_zero_points(load, config: dict[str, str], expected: bool) -> None:
    assert load("dense").stores_less_one(config) is expected


def test_dense_checkpoint_keeps_the_rest(load, tmp_path: Path) -> None:
    """A packed matrix becomes a weight, the rest stays, config.json says nothing of packing."""
    base, packed, out = builtin_model("tiny"), tmp_path / "packed", tmp_path / "out"
    packed.mkdir()
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"bits": 4, "checkpoint_format": "gptq"}
    (packed / "config.json").write_text(json.dumps(config))
    tensors, weight = packed_matrix(4, True, torch.arange(64))
    named = {f"layer.{name}": tensor for name, tensor in tensors.items()}
    save_file(named | {"norm.weight": torch.ones(3).bfloat16()}, packed / "model.safetensors")
    load("dense").write_dense(packed, base, out)
    found = load_file(out / "model.safetensors")
    assert set(found) == {"layer.weight", "norm.weight"}
    assert torch.equal(found["layer.weight"], weight)
    assert found["norm.weight"].dtype == torch.float32
    assert "quantization_config" not in json.loads((out / "config.json").read_text())


def test_meter_counts_children_and_their_memory(load, tmp_path: Path) -> None:
    """A child that forks holds its memory twice over; its own CPU time is the kernel's."""
    script = (
        "import os, time\n"
        "block = bytearray(os.urandom(1)) * (64 << 20)\n"
        "if os.fork() == 0:\n"
        "    other = bytearray(b'x') * (64 << 20)\n"
        "    time.sleep(0.6)\n"
        "    os._exit(0)\n"
        "end = time.process_time() + 0.2\n"
        "while time.process_time() < end: pass\n"
        "os.wait()\n"
        "print(os.environ['WORD'])\n"
    )
    log = tmp_path / "log.txt"
    command = [sys.executable, "-c", script]
    cost = load("meter").run(command, tmp_path, log, {"WORD": "heard"}, 0)
    assert cost.peak_bytes >= 128 << 20
    assert 0.2 <= cost.cpu_seconds < 5
    assert cost.wall_seconds >= 0.6
    assert log.read_text() == "heard\n"


def test_meter_says_when_a_command_failed(load, tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        load("meter").run(
            [sys.executable, "-c", "raise SystemExit(3)"], tmp_path, tmp_path / "log", {}, 0
        )


def test_every_method_has_its_own_name_and_an_existing_script(load, tmp_path: Path) -> None:
    methods = load("methods")
    names = [method.id for method in methods.METHODS]
    assert len(set(names)) == len(names)
    task = methods.Task(tmp_path, tmp_path / "t", "default", 128, 512, 3, tmp_path / "out")
    for method in methods.METHODS:
        command = method.command(task)
        script = next(part for part in command if part.endswith((".py", ".yaml")))
        assert (PEERS.parents[1] / script).is_file()
        assert "3" in command or any(part.endswith("bits=3") for part in command)


def test_pairs_agree_with_the_paired_comparison_of_tokens(load) -> None:
    """From sums by document comes the interval that token scores give."""
    tables, generator = load("tables"), np.random.default_rng(0)
    ours, theirs = (token_scores(name, generator) for name in ("ours", "theirs"))
    expected = compare(theirs, ours).overall.delta_kl
    found = tables.difference(tables.by_document(ours), tables.by_document(theirs))
    assert expected is not None
    assert found.value == pytest.approx(expected.value, abs=1e-5)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-4)
    assert tables.difference(tables.by_document(ours), tables.by_document(ours)).value == 0


def token_scores(name: str, generator: np.random.Generator) -> TokenScores:
    """Two domains of twelve documents, of all lengths."""
    domain = np.repeat(np.arange(2, dtype=np.int16), 600)
    cluster = np.tile(np.repeat(np.arange(12, dtype=np.int32), np.arange(39, 63, 2)[:12]), 2)
    ones = np.ones(1200, dtype=np.int32)
    floats = {
        column: generator.exponential(size=1200).astype(np.float32)
        for column in ("nll", "base_nll", "kl", "reverse_kl")
    }
    return TokenScores(
        variant=name,
        protocol=Protocol(
            id="rolling",
            length=512,
            stride=512,
            bos="none",
            suite="quick",
            text_sha256="",
            tokenizer_sha256="",
            dtype="float32",
            backend="none",
            batch=8,
        ),
        domains=("code", "prose"),
        is_base=False,
        domain=domain,
        cluster=cluster,
        position=ones,
        sizes=ones,
        top1=ones,
        base_top1=ones,
        **floats,
    )


def test_domains_that_the_calibration_lacks_are_marked(load) -> None:
    tables, name = load("tables"), "peers-w4-prose-only-128x512"
    source = json.loads((PEERS.parent / "results" / f"{name}.json").read_text())
    protocol = Protocol.model_validate(source["compressor-gptq"]["evaluation"]["protocol"])
    cells = tables.read(PEERS.parent / "results" / f"{name}.json", protocol)
    base = cells["compressor-gptq"]["evaluation"]
    mix = load_mix("prose-only").domains
    page = "\n".join(tables.page(cells, base, "m", "command", "prose-only-128x512", mix))
    committed = (PEERS.parent / "results" / f"{name}.md").read_text()
    (header,) = (line for line in page.splitlines() if line.startswith("| mean KL |"))
    assert "| code (not in calibration) |" in header
    assert "| prose |" in header
    assert header in committed.splitlines()


def test_rows_of_earlier_days_stay_in_the_table(load, tmp_path: Path) -> None:
    tables, committed = load("tables"), PEERS.parent / "results"
    name = "peers-w4-default-32x512"
    source = json.loads((committed / f"{name}.json").read_text())
    protocol = Protocol.model_validate(source["compressor-gptq"]["evaluation"]["protocol"])
    cells = tables.read(committed / f"{name}.json", protocol)
    tables.write(tmp_path, name, ["a page"], cells)
    assert json.loads((tmp_path / f"{name}.json").read_text()) == source
    assert set(tables.read(tmp_path / f"{name}.json", protocol)) == set(source)
    other = protocol.model_copy(update={"dtype": "float32"})
    assert tables.read(committed / f"{name}.json", other) == {}
    assert tables.read(tmp_path / "none.json", protocol) == {}

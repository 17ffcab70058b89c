"""Mistakes of users, typed or in files they bring: told in a sentence, never a crash."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor.errors import RecipeError
from compressor.resources import builtin_model
from tests import runs
from tests.command import Compress

RECIPE = """\
calibration: {samples: 2, length: 64, batch_size: 2}
stages: [{method: quantize.rtn, bits: 4, group_size: 64}]
evaluate: {documents: 1, length: 64, resamples: 100, noise_floor: false}
"""
FILES = {
    "r.yaml": RECIPE.encode(),
    "latin.yaml": b"description: caf\xe9",
    "suite.yaml": b"domains: [prose]\nprotokol: gptq\nlength: 4\n",
    "suite2.yaml": b"description: x\ndomains: [prosa, code, docz]\n",
    "half.jsonl": b'{"text": "%s"}\n{"text": "half \\ud800"}\n' % (b"whole " * 40),
}
DEEP, LONG = "[" * 900 + "]" * 900, "9" * 5000


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.items():
        Path(name).write_bytes(content)
    Path("loop").symlink_to("loop")


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("calibration.source=./loop", "calibration source"),
        ("evaluate.text.mine=loop", "no file"),
        ("evaluate.suite=./loop", "no evaluation suite"),
        ("calibration.mix=./loop", "no calibration mix"),
        ("evaluate.suite=./latin.yaml", "latin.yaml is not UTF-8 text"),
        ("calibration.mix=./latin.yaml", "latin.yaml is not UTF-8 text"),
        ("stages.².bits=4", "--set stages.².bits: stages is a list of 1"),
        (f"seed={LONG}", "...' is not valid YAML"),
        (f"seed={DEEP}", "...' is not valid YAML"),
    ],
)
def test_a_value_that_cannot_be_read_is_told_where_it_is(
    compress: Compress, setting: str, says: str
) -> None:
    result = compress("plan", "r.yaml", "builtin:tiny", "--set", setting)
    assert (result.code, says in result.err) == (2, True), result.err
    assert len(result.err) < 500


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (f"seed: {LONG}", "bad.yaml:1:1: a number has thousands of digits"),
        (f"seed: {DEEP}", "bad.yaml:1:1: nested deeper than 50 levels"),
        (f"seed: {'[' * 60}{']' * 60}", "nested deeper than 50 levels"),
        ("seed:\t4", "bad.yaml:1:6: a tab stands where YAML allows spaces only"),
    ],
    ids=["digits", "deep", "less deep", "tab"],
)
def test_yaml_beyond_reason_is_no_crash(compress: Compress, value: str, says: str) -> None:
    Path("bad.yaml").write_text(f"{value}\n{RECIPE}", encoding="utf-8")
    result = compress("plan", "bad.yaml", "builtin:tiny")
    assert (result.code, says in result.err) == (2, True), result.err


def test_a_suite_is_told_of_like_a_recipe_and_beside_it(compress: Compress) -> None:
    """Every problem with its place: of the file that the recipe names, and of the recipe."""
    lines = ["--set", "evaluate.suite=./suite.yaml", "--set", "calibration.mix=./suite2.yaml"]
    result = compress("plan", "r.yaml", "builtin:tiny", *lines)
    assert result.code == 2
    for says in (
        "suite.yaml:1:1: the suite needs the key 'description'",
        "suite.yaml:2:1: unknown key 'protokol' in the suite; did you mean 'protocol'?\n"
        "  → known keys: description, domains,",
        "suite.yaml:3:9: length must be at least 8, not 4",
        "suite2.yaml:2:10: domains must be a mapping, not a list",
    ):
        assert says in result.err
    result = compress("plan", "r.yaml", "builtin:tiny", "--set", "evaluate.suite=./suite2.yaml")
    assert "suite2.yaml:2:11: there is no domain 'prosa'" in result.err
    assert "suite2.yaml:2:24: there is no domain 'docz'" in result.err
    assert "did you mean 'prose'? domains: code, " in result.err


@pytest.mark.parametrize("key", ["calibration.source", "evaluate.text.mine"])
def test_half_of_a_surrogate_pair_is_no_text(compress: Compress, key: str) -> None:
    setting = f"{key}=half.jsonl"
    result = compress("r.yaml", "builtin:tiny", "-o", "out", "-q", "--set", setting)
    assert (result.code, "half.jsonl:2 is not" in result.err) == (2, True), result.err
    assert "surrogates not allowed" in result.err
    assert not Path("out").exists()


def test_a_folder_that_is_a_link_to_itself_is_no_place_for_a_run(compress: Compress) -> None:
    result = compress("r.yaml", "builtin:tiny", "-o", "loop", "-q")
    assert (result.code, result.err) == (3, "error: cannot write loop: File exists\n")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (("plan", "r.yaml", "m", "--set", "seed=1", "--set", "seed=2"), "--set seed: given twice"),
        (
            ("plan", "r.yaml", "m", "--set", "evaluate.seed=1", "--set", "evaluate={}"),
            "--set evaluate: it replaces what --set evaluate.seed wrote",
        ),
        (
            ("plan", "w4-rtn", "m", "--set", "name=../../x"),
            "'../../x' is no name of a run: letters, digits, '.', '_' and '-', beginning with",
        ),
        (
            ("plan", "w4-rtn", "m", "--set", "publish.repo=x"),
            "'x' is not of the form `org/name`: letters",
        ),
        (("plan", "mixed-3.5", "m", "--target-bpw", "nan"), "must be a finite number, not nan"),
        (("compare", "m", "m", "--gate", "max_kl"), "--gate max_kl: neither NAME=LIMIT nor a file"),
        (("compare", "m", "m", "--gate", "max_lk"), "--gate max_kl=LIMIT"),
        (
            ("compare", "m", "m", "--gate", "max_kl=1", "--gate", "max_kl=2"),
            "--gate max_kl: given twice",
        ),
        (("eval", "m", "--text", "a=x", "--text", "a=y"), "the domain 'a' twice: x and y"),
        (("eval", "m", "--text", "=x"), "not of the form DOMAIN=FILE"),
    ],
)
def test_an_option_without_effect_is_a_mistake(
    compress: Compress, line: tuple[str, ...], says: str
) -> None:
    result = compress(*line)
    assert (result.code, says in result.err) == (2, True), result.err


def test_what_is_no_run_is_not_verified(compress: Compress) -> None:
    Path("empty").mkdir()
    result = compress("verify", "empty")
    assert result.code == 2
    assert "empty is neither a run, which has a report.json, nor a checkpoint" in result.err
    Path("begun").mkdir()
    Path("begun/recipe.lock.yaml").write_text(RECIPE, encoding="utf-8")
    begun = compress("verify", "begun")
    assert (begun.code, "→ compress resume begun" in begun.err) == (2, True)


def test_a_lock_without_its_section_is_no_run(compress: Compress) -> None:
    Path("begun").mkdir()
    Path("begun/recipe.lock.yaml").write_text(RECIPE, encoding="utf-8")
    for line in (["resume", "begun"], ["export", "begun", "--as", "gptq"]):
        result = compress(*line, "-q")
        assert (result.code, "recipe.lock.yaml has no `lock`" in result.err) == (2, True)
    result = compress("r.yaml", "builtin:tiny", "-o", "begun", "-q")
    assert (result.code, "recipe.lock.yaml has no `lock`" in result.err) == (2, True)


# ---------------------------------------------------------------------- models


NAME = "model.layers.1.mlp.up_proj.weight"
LINE = ("r.yaml", "model")


@pytest.fixture
def model() -> Path:
    """A copy of the built-in model, to be damaged."""
    return Path(shutil.copytree(builtin_model("tiny"), "model"))


def configure(model: Path, **changes: Any) -> None:
    file = model / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | changes
    kept = {key: value for key, value in config.items() if value is not None}
    file.write_text(json.dumps(kept), encoding="utf-8")


def cast(model: Path, dtype: torch.dtype, name: str = "") -> None:
    """Store the tensors of whose name this is a part as another dtype."""
    file = model / "model.safetensors"
    tensors = {k: t.to(dtype) if name in k else t for k, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, torch.float8_e4m3fn])
def test_weights_of_another_dtype_are_known_at_the_start(
    compress: Compress, model: Path, dtype: torch.dtype
) -> None:
    cast(model, dtype, NAME)
    name = str(dtype).removeprefix("torch.")
    for line in (["plan", *LINE], [*LINE, "-o", "out"]):
        result = compress(*line)
        assert result.code == 2
        assert "its weights are to be bfloat16, and 1 of 29 matrices are stored" in result.err
        assert f"something else, such as {NAME} as {name}\n" in result.err
    assert not Path("out").exists()


def change(model: Path, name: str, tensor: torch.Tensor | None) -> None:
    """Replace a tensor, or leave it out."""
    file = model / "model.safetensors"
    tensors = {k: t for k, t in load_file(file).items() if k != name}
    added = {} if tensor is None else {name: tensor}
    save_file(tensors | added, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "tensor", "says"),
    [
        (NAME, None, f"lacks the tensor {NAME}, which its config.json calls for"),
        (NAME, torch.ones(3, 4), f"{NAME} has shape [3, 4] on disk, but config.json calls for"),
        (
            "lm_head.weight",
            torch.ones(4096, 256),
            "the weights hold lm_head.weight with other values than model.embed_tokens.weight",
        ),
    ],
)
def test_weights_that_are_not_of_the_configuration(
    compress: Compress, model: Path, name: str, tensor: torch.Tensor | None, says: str
) -> None:
    change(model, name, tensor)
    for line in (["plan", *LINE], [*LINE, "-o", "out"]):
        result = compress(*line)
        assert result.code == 2
        assert says in result.err
    assert not Path("out").exists()


def test_a_dtype_that_the_configuration_names_wrongly(compress: Compress, model: Path) -> None:
    cast(model, torch.float32)
    result = compress("plan", *LINE)
    assert (result.code, 'write "dtype": "float32" in its config.json' in result.err) == (2, True)
    configure(model, dtype=None)
    assert compress("plan", *LINE).code == 0  # by the weights, as in transformers
    cast(model, torch.bfloat16, NAME)
    assert "are to be float32, and 1 of 29" in compress("plan", *LINE).err


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_act": "silly"}, "transformers knows no hidden_act called 'silly'"),
        ({"rope_parameters": {"rope_type": "silly"}}, "knows no rope_type called 'silly'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "Missing required keys in `rope_parameters`"),
        ({"tie_word_embeddings": "false"}, "'tie_word_embeddings' must be true or false, not"),
        ({"num_hidden_layers": 10**6}, "'num_hidden_layers' is 1,000,000; at most 100,000 can be"),
    ],
)
def test_a_configuration_that_cannot_be_leaves_no_folder(
    compress: Compress, model: Path, changes: dict[str, Any], says: str
) -> None:
    configure(model, **changes)
    result = compress(*LINE, "-o", "out", "-q")
    assert (result.code, says in result.err) == (2, True), result.err
    assert not Path("out").exists()


def test_a_configuration_nested_without_end(compress: Compress, model: Path) -> None:
    (model / "config.json").write_text('{"a": ' + "[" * 100_000, encoding="utf-8")
    result = compress("plan", *LINE)
    assert (result.code, "config.json is not JSON" in result.err) == (2, True)


@pytest.mark.parametrize("block", [b"license: [", b"- a\n- b", b"license: caf\xe9"])
def test_a_damaged_card_is_told_of_before_work(
    compress: Compress, model: Path, block: bytes
) -> None:
    (model / "README.md").write_bytes(b"---\n" + block + b"\n---\n")
    for line in (["plan", *LINE], [*LINE, "-o", "out"]):
        result = compress(*line)
        assert result.code == 2
        assert "README.md: the block between the lines `---` cannot be read" in result.err
    assert not Path("out").exists()


def test_windows_longer_than_the_context_are_told_of_at_once(compress: Compress) -> None:
    lengths = ["--set", "calibration.length=1024", "--set", "evaluate.length=2048"]
    result = compress("plan", "r.yaml", "builtin:tiny", *lengths)
    assert result.code == 2
    for key, length in (("calibration", 1024), ("evaluate", 2048)):
        says = f"{key}.length is {length}, but the model's context holds 512 tokens"
        assert f"--set {key}.length: {says}\n  → length: 512" in result.err


def test_more_text_than_there_is_is_known_by_the_plan(compress: Compress) -> None:
    result = compress("plan", "r.yaml", "builtin:tiny", "--set", f"calibration.samples={10**21}")
    assert result.code == 2
    assert "--set calibration.samples: domain 'prose' has at most " in result.err
    assert "lower `samples` or `length`" in result.err


BAD_TEXT = [
    ("empty.txt", b" \n", "calibration.source: empty.txt holds no text"),
    ("latin.md", b"caf\xe9", "calibration.source: latin.md is not UTF-8 text (byte 3)"),
    ("half.parquet", b"PAR1", "calibration.source: half.parquet is not a parquet file"),
    ("rows.csv", b"text", "calibration.source: rows.csv must end in one of .txt"),
    ("folder/notes.rst", b"x", "calibration.source: folder folder holds no file that ends in"),
    ("folder/empty.jsonl", b"", "calibration.source: folder holds no text"),
    ("short.txt", b"x" * 60, "calibration.samples: short.txt has at most 62 tokens of calibration"),
    ("one.txt", b"x" * 999, "calibration.samples: one.txt has at most 1 documents of calibration"),
]


@pytest.mark.parametrize(("name", "content", "says"), BAD_TEXT, ids=[name for name, *_ in BAD_TEXT])
def test_calibration_text_that_cannot_do_is_known_by_the_plan(
    compress: Compress, name: str, content: bytes, says: str
) -> None:
    file = Path(name)
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    options = [
        f"calibration.source=./{file.parts[0]}",
        f"calibration.pack={name[0] != 'o'}".lower(),
    ]
    options.append("calibration.samples=2")
    result = compress("plan", "r.yaml", "builtin:tiny", *(w for o in options for w in ("--set", o)))
    told = result.err.replace(f"{Path.cwd()}/", "")
    assert (result.code, f"--set {says}" in told) == (2, True), told


def test_evaluation_text_that_cannot_do_is_known_by_the_plan(compress: Compress) -> None:
    Path("empty.txt").touch()
    texts = ["--set", "evaluate.text.a=empty.txt", "--set", "evaluate.text.b=latin.yaml"]
    result = compress("plan", "r.yaml", "builtin:tiny", *texts)
    told = result.err.replace(f"{Path.cwd()}/", "")
    assert "--set evaluate.text.a: empty.txt holds no text" in told
    assert "--set evaluate.text.b: latin.yaml is not UTF-8 text" in told


# ---------------------------------------------------------------------- what has no effect


@pytest.mark.parametrize(
    ("stage", "says"),
    [
        ("{method: quantize.gptq, radius: 0.2}", "quantize.gptq.radius has no effect without"),
        ("{method: quantize.rtn, embedding_bits: 4}", "without `embeddings: quantize`"),
        ("{method: transform.rotate, bits: 3}", "transform.rotate.bits has no effect without"),
        ("{method: recover.distill, radius: 0.2}", "recover.distill.radius has no effect without"),
        ("{method: recover.distill, reference: forecast}", "reference has no effect without"),
    ],
)
def test_an_option_that_nothing_reads_is_a_mistake(tmp_path: Path, stage: str, says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        runs.load(tmp_path, f"calibration: {{}}\nstages:\n  - {stage}\n")
    (problem,) = caught.value.problems
    assert (problem.line, says in problem.message) == (3, True), problem


def test_a_default_that_nothing_reads_says_nothing(tmp_path: Path) -> None:
    """Lock files spell out every default."""
    runs.load(tmp_path, "calibration: {}\nstages:\n  - {method: quantize.gptq, radius: 0.1}\n")
    robust = "{method: quantize.gptq, robust: true, radius: 0.2}"
    runs.load(tmp_path, f"calibration: {{}}\nstages:\n  - {robust}\n")


@pytest.mark.parametrize(
    ("section", "says"),
    [
        (
            "{source: a.txt, split: test, column: text2}",
            "`split`, `column` has no effect on a .txt",
        ),
        ("{source: a.jsonl, column: body, revision: v2}", "`revision` has no effect on a .jsonl"),
    ],
)
def test_a_file_has_no_splits(tmp_path: Path, section: str, says: str) -> None:
    for name in ("a.txt", "a.jsonl"):
        Path(name).write_text("{}", encoding="utf-8")
    with pytest.raises(RecipeError, match=re.escape(says)):
        runs.load(tmp_path, f"calibration: {section}\nstages: [{{method: quantize.gptq}}]\n")


def test_an_export_tells_all_that_it_has_not(tmp_path: Path) -> None:
    export = "{format: gptq, form: int-quantized, embedding: Q8_0}"
    with pytest.raises(RecipeError) as caught:
        runs.load(tmp_path, f"stages: [{{method: quantize.rtn}}]\nexport: [{export}]\n")
    message = str(caught.value)
    assert "`form` is for format compressed-tensors; gptq has none" in message
    assert "`embedding` is for format gguf; gptq has none" in message


def test_a_layout_is_for_the_format_that_has_layouts(compress: Compress, tmp_path: Path) -> None:
    result = compress("export", tmp_path, "--as", "gptq", "--form", "int-quantized")
    assert (result.code, "--form is for --as compressed-tensors" in result.err) == (2, True)


def test_options_of_an_export_are_told_of_in_words(compress: Compress, tmp_path: Path) -> None:
    both = ["--type", "Q4_K_M", "--embedding", "Q8_0"]
    result = compress("export", tmp_path, "--as", "gguf", *both)
    assert result.code == 2
    assert result.err.startswith("error: `embedding` is for our codes; Q4_K_M rounds")


def test_the_command_line_hides_nothing_of_the_file(compress: Compress) -> None:
    """Options that cannot be written, values that are wrong and keys that are unknown, at once."""
    Path("r.yaml").write_text(f"{RECIPE}typo: 1\n", encoding="utf-8")
    wrong = ("nothing", "stages.7.bits=3", "seed=many", "efforts.light=1")
    result = compress("plan", "r.yaml", "./m", *(word for one in wrong for word in ("--set", one)))
    assert result.code == 2
    for says in (
        "--set nothing: not of the form",
        "--set stages.7.bits: stages is a list of 1",
        "--set seed: seed must be an integer, not 'many'",
        "--set efforts.light=1: the effort is merged before",
        "r.yaml:4:1: unknown key 'typo'",
    ):
        assert says in result.err


@pytest.mark.parametrize("command", ["run", "plan"])
def test_a_wrong_recipe_does_not_hide_a_wrong_model(compress: Compress, command: str) -> None:
    wrong = ["--set", "seed=many", "--format", "json"]
    result = compress(command, "r.yaml", "builtin:tinyy", *wrong)
    said = [problem["message"] for problem in result.json["problems"]]
    assert said == ["--set seed: seed must be an integer, not 'many'", "no built-in model 'tinyy'"]
    assert (result.code, result.json["error"]) == (2, "RecipeError")


def test_the_format_of_a_deliverable_is_another_option(compress: Compress, tmp_path: Path) -> None:
    result = compress("export", tmp_path, "--format", "gguf")
    assert result.code == 2
    assert "compress export RUN --as gguf writes that format" in result.err
    assert "writes that" not in compress("export", tmp_path, "--format", "xml").err


def test_limits_are_finite(compress: Compress) -> None:
    limits = ["--set", "gates.max_bpb_increase=.nan", "--set", "gates.max_kl=.inf"]
    result = compress("plan", "r.yaml", "builtin:tiny", *limits)
    assert result.code == 2
    for says in ("max_bpb_increase in gates must be a finite number, not nan", "not inf"):
        assert says in result.err


def test_a_hint_of_order_names_known_methods_only(compress: Compress) -> None:
    methods = ("quantize.gptq", "quantize.gtpq", "transform.awq", "[quantize.rtn]")
    lines = [f"  - {{method: {method}}}\n" for method in methods]
    Path("r.yaml").write_text(f"stages:\n{''.join(lines)}  - {{}}\n", encoding="utf-8")
    result = compress("plan", "r.yaml", "builtin:tiny")
    assert result.code == 2
    assert "order that works: transform.awq → quantize.gptq\n" in result.err


def test_deliverables_are_added_to_finished_runs_only(compress: Compress) -> None:
    assert compress("r.yaml", "builtin:tiny", "-o", "out", "-q").code == 0
    journal = Path("out/journal.jsonl")
    lines = journal.read_text(encoding="utf-8").splitlines(keepends=True)
    journal.write_text("".join(lines[:2]), encoding="utf-8")
    result = compress("export", "out", "--as", "gguf")
    assert (result.code, result.err) == (
        2, "error: the run in out is not finished\n  → compress resume out\n"
    )  # fmt: skip
    assert journal.read_text(encoding="utf-8") == "".join(lines[:2])

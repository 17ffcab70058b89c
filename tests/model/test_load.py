from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import load_file, save_file

from compressor import resources
from compressor.errors import AccessError, CompressorError, ModelError, ResourceError
from compressor.model.load import load_model, load_tokenizer, read_licence, resolve
from compressor.types import QTensor, WeightScheme
from tests.model.conftest import config_of

COMMIT = "c" * 40
TOKEN = "hf_" + "s" * 34


class TestLocal:
    def test_a_directory(self, checkpoints: Callable[..., Path]) -> None:
        folder = checkpoints("llama")
        source = resolve(str(folder))
        assert (source.path, source.id, source.revision) == (folder, str(folder), None)

    def test_built_in(
        self, checkpoints: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "some").symlink_to(checkpoints("llama"))
        monkeypatch.setattr(resources, "_BUILTIN", tmp_path)
        assert resolve("builtin:some").path == tmp_path / "some"
        with pytest.raises(ModelError, match="no built-in model 'other'"):
            resolve("builtin:other")

    def test_a_plan_needs_no_weights(
        self, checkpoints: Callable[..., Path], tmp_path: Path
    ) -> None:
        (tmp_path / "config.json").write_text(json.dumps(config_of(checkpoints("llama"))))
        assert resolve(str(tmp_path), config_only=True).path == tmp_path
        with pytest.raises(ModelError, match=r"holds no \*\.safetensors"):
            resolve(str(tmp_path))

    @pytest.mark.parametrize("model", ["no-such-folder", "a/b@", "a b/c", ""])
    def test_neither_directory_nor_id(self, model: str) -> None:
        with pytest.raises(ModelError, match="neither a directory nor a Hub id"):
            resolve(model)


class Hub:
    """A server that speaks as much of the Hub's protocol as a download needs."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.error: tuple[int, str] | None = None
        self.asked: list[str] = []
        self.server = HTTPServer(("127.0.0.1", 0), self._handler())
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.asked.append(self.path)
                path = self.path.split("?")[0]
                if hub.error is not None:
                    self.answer(hub.error[0], b"{}", **{"X-Error-Code": hub.error[1]})
                elif path.startswith("/api/models/org/name/revision/"):
                    files = [{"rfilename": name, "size": len(b)} for name, b in hub.files.items()]
                    self.answer(
                        200,
                        json.dumps({"sha": COMMIT, "id": "org/name", "siblings": files}).encode(),
                    )
                elif path.startswith("/api/models/org/name/tree/"):
                    files = [
                        {"type": "file", "path": name, "size": len(b), "oid": "0"}
                        for name, b in hub.files.items()
                    ]
                    self.answer(200, json.dumps(files).encode())
                else:
                    name = path.removeprefix(f"/org/name/resolve/{COMMIT}/")
                    content = hub.files[name]
                    self.answer(200, content, ETag=f'"{name}"', **{"X-Repo-Commit": COMMIT})

            do_HEAD = do_GET

            def answer(self, status: int, body: bytes, **headers: str) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        return Handler


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    url = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield hub
    hub.server.shutdown()


class TestHub:
    def test_only_what_is_safe_and_needed_is_downloaded(
        self, hub: Hub, checkpoints: Callable[..., Path]
    ) -> None:
        folder = checkpoints("llama")
        wanted = {path.name: path.read_bytes() for path in folder.iterdir()}
        hub.files = {
            **wanted,
            "pytorch_model.bin": b"pickle",
            "modeling.py": b"code",
            "onnx/model.safetensors": b"copy",
            "consolidated.safetensors": b"copy",
        }
        source = resolve("org/name@main")
        assert (source.id, source.revision) == ("org/name", COMMIT)
        assert {path.name for path in source.path.iterdir()} == set(wanted)
        assert (source.path / "model.safetensors").read_bytes() == wanted["model.safetensors"]

    def test_a_plan_downloads_the_configuration_alone(
        self, hub: Hub, checkpoints: Callable[..., Path]
    ) -> None:
        folder = checkpoints("llama")
        hub.files = {path.name: path.read_bytes() for path in folder.iterdir()}
        source = resolve("org/name", config_only=True)
        assert [path.name for path in source.path.iterdir()] == ["config.json"]

    @pytest.mark.parametrize(
        ("status", "code", "kind", "sentence"),
        [
            (403, "GatedRepo", AccessError, "org/name is gated on the Hub"),
            (404, "RepoNotFound", ModelError, "the Hub has no model org/name"),
            (404, "RevisionNotFound", ModelError, "org/name has no revision 'v9'"),
            (403, "", AccessError, r"the Hub refused org/name \(HTTP 403\)"),
            (418, "", ResourceError, "HTTP 418"),
        ],
    )
    def test_refusals(
        self, hub: Hub, status: int, code: str, kind: type[CompressorError], sentence: str
    ) -> None:
        hub.error = (status, code)
        with pytest.raises(kind, match=sentence) as caught:
            resolve("org/name@v9")
        assert caught.value.hint or code == "RevisionNotFound"
        assert TOKEN not in str(caught.value)
        assert caught.value.__cause__ is None

    def test_unreachable(self, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        hub.server.shutdown()
        hub.server.server_close()
        with pytest.raises(ResourceError, match="the Hub cannot be reached and org/name is not"):
            resolve("org/name")

    def test_offline_uses_the_cache(
        self, hub: Hub, checkpoints: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hub.files = {path.name: path.read_bytes() for path in checkpoints("llama").iterdir()}
        online = resolve("org/name")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        asked = len(hub.asked)
        assert resolve("org/name") == online
        assert len(hub.asked) == asked
        with pytest.raises(ResourceError):
            resolve("org/other")


def test_a_missing_weight_is_an_error_and_not_random(
    checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    tensors = load_file(checkpoints("llama") / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config_of(checkpoints("llama"))))
    with pytest.raises(ModelError, match=r"lacks model\.layers\.0\.mlp\.up_proj\.weight"):
        load_model(tmp_path)


def test_a_model_is_quiet_dense_and_in_evaluation_mode(
    checkpoints: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoints("llama", torch.bfloat16)
    capfd.readouterr()
    before = transformers.logging.get_verbosity()
    model = load_model(folder, "cpu", torch.float32)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in load_model(folder).parameters()} == {torch.bfloat16}
    assert capfd.readouterr() == ("", "")
    assert transformers.logging.get_verbosity() == before


def test_a_packed_checkpoint_arrives_dequantized(
    checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    """Codes packed by compressed-tensors come back as scale * code, bit for bit."""
    source = checkpoints("llama", torch.bfloat16)
    tensors = load_file(source / "model.safetensors")
    scheme, expected = WeightScheme(4, 16), {}
    for name in [name for name in tensors if "_proj.weight" in name]:
        weight = tensors.pop(name)
        scale = (weight.unflatten(1, (-1, 16)).abs().amax(-1) / 7).to(torch.bfloat16)
        codes = weight.unflatten(1, (-1, 16)).div(scale.unsqueeze(-1)).round().clamp(-8, 7)
        codes = codes.flatten(1).to(torch.int8)
        expected[name] = QTensor(codes, scale, None, scheme).dequantize()
        tensors[f"{name}_packed"] = pack_to_int32(codes, 4)
        tensors[f"{name}_scale"] = scale
        tensors[f"{name}_shape"] = torch.tensor(weight.shape)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": 16,
    }
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
    config = {**config_of(source), "quantization_config": quantization}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = dict(load_model(tmp_path).named_parameters())
    assert len(expected) == 14
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name
    cast = load_model(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in cast.parameters()} == {torch.bfloat16}
    assert cast.model.rotary_emb.inv_freq.dtype == torch.float32


def test_no_tokenizer(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"llama\d? holds no tokenizer\n  → copy"):
        load_tokenizer(checkpoints("llama"))
    (tmp_path / "config.json").write_text(json.dumps(config_of(checkpoints("llama"))))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="holds no usable tokenizer"):
        load_tokenizer(tmp_path)


def test_a_config_that_transformers_refuses(
    checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoints("llama"), folder)
    config = config_of(folder)
    del config["hidden_size"]  # the default is no multiple of the heads
    (folder / "config.json").write_text(json.dumps(config | {"num_attention_heads": 5}))
    (folder / "tokenizer.json").write_text("{}")
    for load in (load_model, load_tokenizer):
        with pytest.raises(ModelError, match="hidden size"):
            load(folder)


def test_a_directory_that_is_not_there() -> None:
    with pytest.raises(ModelError, match=r"^there is no directory \./nowhere$"):
        resolve("./nowhere")


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: apache-2.0\n---\n# model\n", "apache-2.0"),
        ("---\nlicense: other\nlicense_name: gemma\n---\n", "gemma"),
        ("---\nlanguage: en\n---\n", None),
        ("# no metadata\n", None),
        (None, None),
    ],
)
def test_the_licence_is_what_the_card_names(
    tmp_path: Path, card: str | None, licence: str | None
) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert read_licence(tmp_path) == licence

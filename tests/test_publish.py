"""Publishing with the Hub's real client against a server on loopback."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import HfApi, constants
from ruamel.yaml import YAML

from compressor.engine import run_recipe
from compressor.errors import AccessError, ResourceError, UsageError, VerificationError
from compressor.publish import licence_gate, plan_publication, publish
from compressor.recipe import load_recipe
from tests.hub_server import TOKEN, Hub

RECIPE = """\
stages:
  - {method: quantize.rtn, bits: 4, group_size: 64}
evaluate: {documents: 1, length: 128, noise_floor: false, resamples: 200}
export: [{format: compressed-tensors}, {format: gguf}]
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    (folder / "recipe.yaml").write_text(RECIPE)
    run_recipe(load_recipe(folder / "recipe.yaml"), "builtin:tiny", folder / "out")
    return folder / "out"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # plain LFS, as without hf_xet
    monkeypatch.setattr("time.sleep", lambda _: None)  # the client waits between its attempts
    yield server
    server.close()


@pytest.fixture
def api(hub: Hub) -> HfApi:
    return HfApi(endpoint=hub.url, token=TOKEN)


def front_matter(card: bytes) -> dict[str, Any]:
    found: dict[str, Any] = YAML(typ="safe").load(card.decode().split("---\n")[1])
    return found


def test_two_private_repositories_and_a_collection(run: Path, hub: Hub, api: HfApi) -> None:
    done = publish(run, "me/tiny", api=api)
    assert [r.name for r in done.repositories] == ["me/tiny", "me/tiny-gguf"]
    assert all(hub.repos[name].private for name in hub.repos)
    assert hub.collections[done.collection or ""] == ["me/tiny", "me/tiny-gguf"]
    packed, gguf = (hub.repos[name].branches["main"] for name in ("me/tiny", "me/tiny-gguf"))
    deliverable = run / "deliverable"
    assert gguf["model.gguf"] == (deliverable / "gguf" / "model.gguf").read_bytes()
    assert packed["config.json"] == (deliverable / "compressed-tensors/config.json").read_bytes()
    assert {"README.md", "recipe.yaml", "recipe.lock.yaml", "report.json"} <= set(packed)
    assert done.revisions["me/tiny"] == hub.repos["me/tiny"].heads["main"]


def test_each_card_speaks_of_its_own_files(run: Path, hub: Hub, api: HfApi) -> None:
    publish(run, "me/tiny", api=api)
    packed, gguf = (hub.repos[n].branches["main"]["README.md"] for n in ("me/tiny", "me/tiny-gguf"))
    assert b'from_pretrained("me/tiny"' in packed
    assert b"vllm serve me/tiny" in packed
    assert b"llama-server -hf me/tiny-gguf" in gguf
    assert b"deliverable/" not in packed + gguf
    assert b"5.11 MB" in gguf
    assert b"5.11 MB" not in packed
    assert front_matter(packed)["pipeline_tag"] == "text-generation"
    assert "gguf" in front_matter(gguf)["tags"]
    for name in hub.repos:
        files = hub.repos[name].branches["main"]
        named = [word for word in files["README.md"].decode().split("](") if "figures/" in word]
        assert all(word.split("#")[0] in files for word in named[1:])


def test_nothing_private_goes_up(run: Path, hub: Hub, api: HfApi) -> None:
    publish(run, "me/tiny", api=api)
    files = hub.repos["me/tiny"].branches["main"]
    assert not [name for name in files if "evaluations" in name or "codes" in name]
    assert not [name for name in files if name.endswith((".jsonl", ".npz", ".lock"))]
    assert not [name for name, content in files.items() if TOKEN.encode() in content]
    assert not [name for name, content in files.items() if str(run).encode() in content]


def test_a_report_that_quotes_the_users_text_stays(run: Path) -> None:
    lock = run / "recipe.lock.yaml"
    assert "report.json" in plan_publication(run, "me/tiny", public=False).repositories[0].files
    text = lock.read_text().replace("  text: {}", "  text:\n    mine: ../mine.txt")
    assert "mine.txt" in text
    lock.write_text(text)
    with pytest.raises(VerificationError, match="not what the report speaks of"):
        plan_publication(run, "me/tiny", public=False)
    from compressor import publish as module

    assert module._has_own_text(run)


def test_a_dry_run_touches_no_network(run: Path, hub: Hub, api: HfApi) -> None:
    planned = publish(run, "me/tiny", dry_run=True, api=api)
    assert not hub.requests
    assert not planned.revisions
    assert planned.repositories[1].bytes > 5_000_000
    assert not (run / "publish.json").exists()


def test_it_is_shown_only_after_it_was_read_back(run: Path, hub: Hub, api: HfApi) -> None:
    hub.corrupt = "model.gguf"
    with pytest.raises(VerificationError, match=r"model\.gguf is not what was uploaded"):
        publish(run, "me/tiny", public=False, api=api)
    with pytest.raises(AccessError, match="licence of the original model is not known"):
        _unlicensed(run)
    assert hub.repos["me/tiny-gguf"].private
    settings = [request for request in hub.requests if request.endswith("/settings")]
    assert not settings


def _unlicensed(run: Path) -> None:
    licence_gate(None, "me/tiny", public=True)


def test_a_public_repository_is_opened_last(run: Path, hub: Hub, api: HfApi) -> None:
    publish(run, "me/tiny", public=True, api=api)
    assert not any(repo.private for repo in hub.repos.values())
    opened = hub.requests.index("PUT /api/models/me/tiny/settings")
    fetched = max(i for i, r in enumerate(hub.requests) if "/me/tiny/resolve/" in r)
    assert opened > fetched


def test_an_interrupted_upload_goes_on_in_the_same_pull_request(
    run: Path, hub: Hub, api: HfApi
) -> None:
    hub.fail(r"POST /api/models/me/tiny/commit/refs/pr/1", 500, times=20)
    with pytest.raises(ResourceError, match="HTTP 500"):
        publish(run, "me/tiny", pr=True, api=api)
    assert hub.repos["me/tiny"].pull_requests == 1
    hub.failures.clear()
    uploads = sum(request.startswith("PUT /lfs/") for request in hub.requests)
    publish(run, "me/tiny", pr=True, api=api)
    assert hub.repos["me/tiny"].pull_requests == 1
    assert "README.md" in hub.repos["me/tiny"].branches["refs/pr/1"]
    assert not hub.repos["me/tiny"].branches["main"]
    again = sum(request.startswith("PUT /lfs/") for request in hub.requests) - uploads
    assert again == 1  # the other repository's file; what was there is not sent twice


def test_a_cut_line_is_tried_again(run: Path, hub: Hub, api: HfApi) -> None:
    hub.fail(r"PUT /lfs/")
    hub.fail(r"preupload", 503)
    done = publish(run, "me/tiny", api=api)
    assert len(done.revisions) == 2


@pytest.mark.parametrize(
    ("request_", "status", "error", "says"),
    [
        ("whoami", 401, AccessError, "HTTP 401"),
        ("repos/create", 403, AccessError, "refused to write me/tiny"),
        ("auth-check", 403, AccessError, "may write there"),
        ("auth-check", 404, AccessError, "token cannot see it"),
        ("commit", 409, ResourceError, "changed by somebody else"),
        ("commit", 429, ResourceError, "fewer requests"),
        ("preupload", 502, ResourceError, "HTTP 502"),
    ],
)
def test_every_refusal_is_one_sentence(
    run: Path, hub: Hub, api: HfApi, request_: str, status: int, error: Any, says: str
) -> None:
    hub.fail(request_, status, times=30)
    with pytest.raises(error) as caught:
        publish(run, "me/tiny", api=api)
    assert says in str(caught.value)
    assert TOKEN not in str(caught.value)


def test_no_token_no_network(
    run: Path, monkeypatch: pytest.MonkeyPatch, hub: Hub, api: HfApi
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(AccessError, match="no token"):
        publish(run, "me/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ResourceError, match="HF_HUB_OFFLINE"):
        publish(run, "me/tiny", api=api)
    assert not hub.requests


def test_a_changed_deliverable_is_not_published(run: Path, hub: Hub, api: HfApi) -> None:
    path = run / "deliverable" / "gguf" / "model.gguf"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.unlink()
    path.write_bytes(bytes(data))
    with pytest.raises(VerificationError, match="not what the report speaks of"):
        publish(run, "me/tiny", api=api)
    with pytest.raises(UsageError, match="not the name of a repository"):
        publish(run, "tiny", api=api)
    assert not hub.requests


@pytest.mark.parametrize(
    ("licence", "repo", "says"),
    [
        ("cc-by-nd-4.0", "me/x", "forbids"),
        ("cc-by-nc-nd-4.0", "me/x", "forbids"),
        ("llama3.2", "me/tiny", "begin with 'Llama'"),
    ],
)
def test_licences_that_forbid_it(licence: str, repo: str, says: str) -> None:
    with pytest.raises(AccessError, match=says):
        licence_gate(licence, repo, public=False)


def test_licences_that_want_a_notice() -> None:
    actions, files = licence_gate("llama3.2", "me/Llama-3.2-1B-w4", public=True)
    assert "Built with Llama" in str(files["NOTICE"])
    assert "Llama 3.2 Community License" in str(files["NOTICE"])
    assert actions
    assert "ai.google.dev/gemma/terms" in str(licence_gate("gemma", "me/x", public=True)[1])
    assert licence_gate("apache-2.0", "me/x", public=True) == ((), {})
    assert licence_gate("mit-and-other", "me/x", public=True) == ((), {})

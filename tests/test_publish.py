"""Publishing with the Hub's real client against a server on loopback."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import HfApi, constants
from ruamel.yaml import YAML

from compressor import publish as publishing
from compressor import reload
from compressor.cli import main
from compressor.engine import RunOutcome, run_recipe
from compressor.errors import AccessError, ResourceError, UsageError, VerificationError
from compressor.licences import licence_gate
from compressor.programs import PROGRAMS
from compressor.publish import plan_publication, publish, require_access
from compressor.recipe import load_recipe
from compressor.report.render import load_report
from compressor.resources import builtin_model
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
    outcome = RunOutcome(run, load_report(run))
    assert outcome.publish("me/tiny", dry_run=True, api=api) == planned
    assert not hub.requests
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


# ---------------------------------------------------------------- access, before any work


def scoped(name: str, *permissions: str) -> dict[str, Any]:
    return {"scoped": [{"entity": {"name": name}, "permissions": list(permissions)}]}


@pytest.mark.parametrize(
    ("token", "orgs", "repo", "says"),
    [
        ({"role": "read"}, [], "me/x", "may only read"),
        ({"role": "write"}, [], "you/x", "does not belong to you"),
        ({"role": "write"}, [{"name": "us", "roleInOrg": "read"}], "us/x", "may only read in us"),
        (
            {"role": "fineGrained", "fineGrained": scoped("me", "repo.content.read")},
            [],
            "me/x",
            "may not make repositories in me",
        ),
        (
            {"role": "fineGrained", "fineGrained": scoped("me", "repo.write")},
            [{"name": "us", "roleInOrg": "write"}],
            "us/x",
            "may not make repositories in us",
        ),
    ],
)
def test_a_token_that_may_not_write_is_refused(
    hub: Hub, api: HfApi, token: dict[str, Any], orgs: Any, repo: str, says: str
) -> None:
    hub.identity |= {"auth": {"accessToken": token}, "orgs": orgs}
    with pytest.raises(AccessError, match=says):
        require_access(repo, "mit", public=False, api=api)
    assert not hub.repos


@pytest.mark.parametrize(
    ("token", "orgs", "repo"),
    [
        ({"role": "write"}, [], "me/x"),
        ({"role": "write"}, [{"name": "us", "roleInOrg": "write"}], "us/x"),
        ({"role": "fineGrained", "fineGrained": scoped("me", "repo.write")}, [], "me/x"),
    ],
)
def test_a_token_that_may_write_is_enough_and_makes_nothing(
    hub: Hub, api: HfApi, token: dict[str, Any], orgs: Any, repo: str
) -> None:
    hub.identity |= {"auth": {"accessToken": token}, "orgs": orgs}
    require_access(repo, "mit", public=False, api=api)
    assert not hub.repos
    assert all(request.startswith("GET ") for request in hub.requests)


def test_an_existing_repository_is_asked_itself(hub: Hub, api: HfApi) -> None:
    api.create_repo("me/x", private=True)
    require_access("me/x", "mit", public=False, api=api)
    hub.fail("auth-check", 403, times=9)
    with pytest.raises(AccessError, match="refused to write me/x"):
        require_access("me/x", "mit", public=False, api=api)


@pytest.mark.parametrize(
    ("status", "error", "says"),
    [
        (401, AccessError, "HTTP 401"),
        (429, ResourceError, "fewer requests"),
        (503, ResourceError, "HTTP 503"),
    ],
)
def test_a_refusal_before_work_is_one_sentence(
    hub: Hub, api: HfApi, status: int, error: Any, says: str
) -> None:
    hub.fail("whoami", status, times=30)
    with pytest.raises(error, match=says):
        require_access("me/x", "mit", public=False, api=api)


PUBLISHING = RECIPE.replace(", {format: gguf}", "") + "publish: {repo: me/tiny}\n"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text(PUBLISHING)
    return tmp_path / "recipe.yaml"


def test_without_a_token_nothing_is_computed(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(AccessError, match="no token"):
        run_recipe(load_recipe(recipe), "builtin:tiny", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    hook = sys.excepthook
    with pytest.raises(SystemExit) as caught:
        main(["plan", str(recipe), "builtin:tiny"])
    sys.excepthook = hook
    assert caught.value.code == 6


def test_a_licence_that_forbids_it_stops_the_run_before_work(
    recipe: Path, tmp_path: Path, hub: Hub, api: HfApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "client", lambda _: api)
    model = Path(shutil.copytree(builtin_model("tiny"), tmp_path / "model"))
    (model / "README.md").write_text("---\nlicense: cc-by-nd-4.0\n---\n")
    with pytest.raises(AccessError, match="forbids publishing"):
        run_recipe(load_recipe(recipe), str(model), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not hub.requests


def test_a_recipe_publishes_and_its_repetition_only_that(
    recipe: Path, tmp_path: Path, hub: Hub, api: HfApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "client", lambda _: api)
    hub.fail(r"POST /api/models/me/tiny/commit", 500, times=30)
    with pytest.raises(ResourceError, match="HTTP 500"):
        run_recipe(load_recipe(recipe), "builtin:tiny", tmp_path / "out")
    hub.failures.clear()
    elsewhere = load_recipe(recipe, ["publish.repo=me/other"])  # decides nothing about the result
    assert elsewhere.fingerprint() == load_recipe(recipe).fingerprint()
    outcome = run_recipe(load_recipe(recipe), "builtin:tiny", tmp_path / "out")
    files = hub.repos["me/tiny"].branches["main"]
    assert hub.repos["me/tiny"].private
    assert outcome.report.deliverables[0].format == "compressed-tensors"
    assert "report.json" in files
    assert b"me/tiny" in files["recipe.yaml"]
    failing = load_recipe(recipe, ["gates.max_kl=1e-9", "publish.repo=me/other"])
    failed = run_recipe(failing, "builtin:tiny", tmp_path / "failed")
    assert failed.verdict == "FAIL"
    assert "me/other" not in hub.repos


def test_what_could_not_be_tried_after_it_is_not_uploaded(
    run: Path, hub: Hub, api: HfApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if only ONNX Runtime read GGUF files, and it is not here."""
    monkeypatch.setattr("compressor.serving.words.ENVIRONMENTS", {"gguf": "onnxruntime"})
    program = PROGRAMS["onnxruntime"]
    monkeypatch.setenv(program.variable, str(tmp_path / "nowhere"))
    with pytest.raises(ResourceError, match=f"there is no {program.title}"):
        publish(run, "me/tiny", api=api)
    assert not hub.repos


def test_what_came_back_writes_text(
    run: Path, hub: Hub, api: HfApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes that nobody can read are no success, whatever their format."""
    written: list[str] = []
    real = reload.continued

    def watched(folder: Path) -> str:
        assert folder.name.startswith("compress-publish-")
        if written:
            raise VerificationError("cannot be read")
        written.append(real(folder))
        return written[0]

    monkeypatch.setattr(reload, "continued", watched)
    with pytest.raises(VerificationError, match="cannot be read"):
        publish(run, "me/tiny", public=True, api=api)
    monkeypatch.undo()
    texts = [real(run / "deliverable" / form) for form in ("compressed-tensors", "gguf")]
    assert written == texts[:1] == texts[1:]  # both hold the same weights
    assert not hub.repos["me/tiny"].private
    assert hub.repos["me/tiny-gguf"].private

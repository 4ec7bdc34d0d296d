"""Local folders come first; what is none comes from the hub, here a small server that answers as it does."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file

from veneer import LoraConfig, PeftConfig
from veneer.hf import hub

COMMIT = "a" * 40


def adapter_folder(folder: Path, r: int = 4) -> Path:
    LoraConfig(r=r, target_modules=["q_proj"]).write(folder)
    save_file({"base_model.model.q_proj.lora_A.weight": torch.ones(r, 8)}, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def server(tmp_path, monkeypatch):
    """(endpoint, folder that is served as 'someone/adapter', list of requests)."""
    served = tmp_path / "served"
    served.mkdir()
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, body: bool):
            asked.append(self.path)
            head, _, rest = self.path.partition("/resolve/")
            revision, _, name = rest.partition("/")
            if head != "/someone/adapter":
                return self.refuse(404, "RepoNotFound")
            if revision not in ("main", "v1", COMMIT):
                return self.refuse(404, "RevisionNotFound")
            path = served / name
            if not path.is_file():
                return self.refuse(404, "EntryNotFound")
            content = path.read_bytes()
            self.send_response(200)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content)
            return None

        def refuse(self, status: int, code: str):
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args):
            pass

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}", served, asked
    http.shutdown()
    http.server_close()


def test_a_local_folder_is_taken_as_it_is(tmp_path) -> None:
    assert hub.resolve(adapter_folder(tmp_path)) == tmp_path


def test_a_subfolder_of_a_local_folder(tmp_path) -> None:
    adapter_folder(tmp_path / "german")
    assert hub.resolve(tmp_path, "german") == tmp_path / "german"
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_config.json.*german.*subfolder"):
        hub.resolve(tmp_path)


def test_a_config_without_tensors_is_refused_unless_it_is_all_that_is_asked_for(tmp_path) -> None:
    LoraConfig().write(tmp_path)
    with pytest.raises(ValueError, match=r"no tensors"):
        hub.resolve(tmp_path)
    assert hub.resolve(tmp_path, weights=False) == tmp_path


def test_a_path_that_does_not_exist_is_no_hub_id() -> None:
    with pytest.raises(ValueError, match="neither an existing folder nor a hub id"):
        hub.resolve("./there/is/nothing/here")


def test_an_id_is_fetched_once_and_read_from_the_cache_after(server, tmp_path) -> None:
    endpoint, served, asked = server
    adapter_folder(served)
    where = {"endpoint": endpoint, "cache_dir": tmp_path / "cache"}
    folder = hub.resolve("someone/adapter", **where)
    assert sorted(p.name for p in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert not [path for path in asked if path.endswith(".bin")]  # safetensors were there, nothing else was asked for
    asked.clear()
    assert hub.resolve("someone/adapter", local_files_only=True, **where) == folder
    assert asked == []


def test_revision_and_subfolder_reach_the_hub(server, tmp_path) -> None:
    endpoint, served, asked = server
    adapter_folder(served / "inner")
    folder = hub.resolve("someone/adapter", "inner", revision="v1", endpoint=endpoint, cache_dir=tmp_path / "c")
    assert folder.name == "inner"
    assert "/someone/adapter/resolve/v1/inner/adapter_config.json" in asked


def test_bin_files_are_the_second_choice(server, tmp_path) -> None:
    endpoint, served, _ = server
    LoraConfig(target_modules=["q_proj"]).write(served)
    torch.save({}, served / "adapter_model.bin")
    folder = hub.resolve("someone/adapter", endpoint=endpoint, cache_dir=tmp_path / "c")
    assert (folder / "adapter_model.bin").is_file()


@pytest.mark.parametrize(
    ("repo", "kwargs", "says"),
    [
        ("someone/other", {}, "neither an existing folder nor a repository"),
        ("someone/adapter", {"revision": "v9"}, "'someone/adapter' at revision 'v9' does not exist"),
        ("someone/adapter", {"subfolder": "no"}, "has no file no/adapter_config.json"),
        ("someone/adapter", {"local_files_only": True}, "not in the local cache"),
    ],
)
def test_what_the_hub_does_not_have_is_said_in_a_sentence(server, tmp_path, repo, kwargs, says) -> None:
    endpoint, served, _ = server
    adapter_folder(served)
    with pytest.raises(FileNotFoundError, match=says) as error:
        hub.resolve(repo, endpoint=endpoint, cache_dir=tmp_path / "c", **kwargs)
    assert "\n" not in str(error.value)


def test_an_adapter_without_tensors_on_the_hub(server, tmp_path) -> None:
    endpoint, served, _ = server
    LoraConfig(target_modules=["q_proj"]).write(served)
    with pytest.raises(ValueError, match="no tensors"):
        hub.resolve("someone/adapter", endpoint=endpoint, cache_dir=tmp_path / "c")


def test_a_config_is_read_from_the_hub(server, tmp_path) -> None:
    endpoint, served, _ = server
    adapter_folder(served, r=7)
    config = PeftConfig.from_pretrained("someone/adapter", endpoint=endpoint, cache_dir=tmp_path / "c")
    assert isinstance(config, LoraConfig)
    assert config.r == 7


def test_nothing_that_a_config_names_is_imported(tmp_path) -> None:
    (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')")
    adapter_folder(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    values |= {
        "auto_mapping": {"base_model_class": "X", "parent_library": "evil_module"},
        "megatron_core": "evil_module",
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    import sys

    sys.path.insert(0, str(tmp_path))
    try:
        PeftConfig.read(hub.resolve(tmp_path))
    finally:
        sys.path.remove(str(tmp_path))
    assert "evil_module" not in sys.modules


def test_keys_are_renamed_after_their_prefix() -> None:
    found = hub.renamed({"base_model.model.old.a.weight": 1, "prompt_embeddings": 2}, {"^old": "new.old"})
    assert found == {"base_model.model.new.old.a.weight": 1, "prompt_embeddings": 2}
    assert hub.renamed({"a": 1}, None) == {"a": 1}


def test_a_renaming_that_joins_two_keys_is_refused() -> None:
    with pytest.raises(ValueError, match="turns two keys"):
        hub.renamed({"base_model.model.a.w": 1, "base_model.model.b.w": 2}, {"^[ab]": "c"})
    with pytest.raises(ValueError, match="malformed pattern"):
        hub.renamed({"a": 1}, {"(": "c"})


class Recorder:
    """Stands for ``huggingface_hub.HfApi``."""

    calls: list[tuple] = []

    def __init__(self, **kwargs):
        self.calls.append(("api", kwargs))

    def create_repo(self, repo_id, **kwargs):
        self.calls.append(("create", repo_id, kwargs))
        return type("Url", (), {"repo_id": f"me/{repo_id}"})

    def upload_folder(self, *, folder_path, **kwargs):
        files = {p.name: p.read_text() for p in Path(folder_path).glob("*.md")}
        self.calls.append(("upload", kwargs, sorted(p.name for p in Path(folder_path).iterdir()), files))
        return "commit"


def test_pushing_uploads_the_folder_with_a_card_the_hub_accepts(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", Recorder)
    Recorder.calls = []
    adapter_folder(tmp_path)
    local = tmp_path / "base"
    local.mkdir()
    (tmp_path / "README.md").write_text(f"---\nbase_model: {local}\nlicense: mit\ntags:\n- lora\n---\n\n# Mine\n")
    assert hub.push_to_hub(tmp_path, "adapter", token="t", private=True) == "commit"
    kinds = [call[0] for call in Recorder.calls]
    assert kinds == ["api", "create", "upload"]
    assert Recorder.calls[1][2] == {"private": True, "exist_ok": True}
    _, kwargs, names, cards = Recorder.calls[2]
    assert kwargs["repo_id"] == "me/adapter"
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= set(names)
    assert str(local) not in cards["README.md"]  # the hub refuses a path as base_model
    assert "license: mit" in cards["README.md"]


def test_pushing_a_folder_without_an_adapter_is_refused(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="save the adapter there"):
        hub.push_to_hub(tmp_path, "adapter")

"""Checkpoints: found, fetched, digested, and read without ever running code that they bring."""

import dataclasses
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from extract.estimators.checkpoints import Published, digest_of, fetch, load_strictly, locate, read_weights
from extract.estimators.pretrained import load_pretrained, mean_and_std
from extract.estimators.table import ROWS, fingerprint, load
from shards.core.errors import UserError
from tests.support.tiny_estimators import ROWS as TINY

REPO, SHA = "somebody/lines", "a" * 40


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's protocol as fetching a repository takes."""

    files: dict[str, bytes]
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        name = path.removeprefix(f"/{REPO}/resolve/{SHA}/")
        if path.startswith(f"/api/models/{REPO}/tree/"):
            tree = [
                {"type": "file", "path": each, "size": len(self.files[each]), "oid": "0" * 40} for each in self.files
            ]
            self.send(200, json.dumps(tree).encode(), body, {"Content-Type": "application/json"})
        elif path.startswith(f"/api/models/{REPO}"):
            about = {"id": REPO, "modelId": REPO, "sha": SHA, "siblings": [{"rfilename": each} for each in self.files]}
            self.send(200, json.dumps(about).encode(), body, {"Content-Type": "application/json"})
        elif name in self.files:
            data = self.files[name]
            self.send(200, data, body, {"ETag": f'"{len(data):040d}"', "X-Repo-Commit": SHA})
        else:
            self.send(404, b"{}", body, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})

    def send(self, status: int, data: bytes, body: bool, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def teed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teed")
    TINY["teed"][0](folder)
    return folder


@pytest.fixture
def hub(teed: Path) -> Iterator[str]:
    Hub.files = {"5_model.pth": (teed / "5_model.pth").read_bytes(), "unwanted.bin": b"x" * 1000}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_fetch_brings_what_a_row_needs_from_the_hub_into_the_shared_cache(hub: str, tmp_path: Path) -> None:
    mixed = tmp_path / "mine.toml"
    mixed.write_text(f'line = "mine"\n[row.mine]\nlike = "teed"\nrepo = "{REPO}"\nrevision = "main"\n')
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
    environment.pop("HF_HUB_OFFLINE", None)

    def extract(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "extract", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    before = extract("demo", "--estimators", str(mixed), "--out", str(tmp_path / "out"))
    assert before.returncode == 1 and f"python -m extract --fetch --estimators {mixed}" in before.stderr
    fetched = extract("--fetch", "--estimators", str(mixed))
    assert fetched.returncode == 0, fetched.stderr
    folder = Path(fetched.stdout.split(": ", 1)[1].strip())
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["5_model.pth"]
    assert (folder / "5_model.pth").read_bytes() == Hub.files["5_model.pth"]
    Hub.files = {}
    missing = extract("--fetch", "--estimators", str(mixed))
    assert missing.returncode == 1 and "error: " in missing.stderr and "Traceback" not in missing.stderr


def test_fetch_takes_any_address_and_keeps_a_copy(teed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ILDM_CACHE", str(tmp_path / "cache"))
    url, files = f"file://{teed}", ("5_model.safetensors|5_model.pth",)
    with pytest.raises(UserError, match="--fetch --estimators teed"):
        locate(url, files, "teed")
    folder = fetch(url, files, "teed")
    assert folder.is_relative_to(tmp_path / "cache") and locate(url, files, "teed") == folder
    assert digest_of(folder, files) == digest_of(teed, files)
    with pytest.raises(UserError, match=r"has no nothing\.pth"):
        fetch(url, ("nothing.pth",), "teed")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.endswith(".tmp")]


def test_a_missing_checkpoint_is_a_sentence_that_says_what_lacks(tmp_path: Path) -> None:
    row = dataclasses.replace(ROWS["teed"], weights=tmp_path)
    with pytest.raises(UserError, match=r"is missing: there is no 5_model"):
        load(row, "cpu")
    with pytest.raises(UserError, match="not the name of a repository"):
        locate(Published("not a name"), ("x",), "teed")


def test_a_changed_weight_file_changes_the_fingerprint_and_other_files_do_not(teed: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    data = bytearray((teed / "5_model.pth").read_bytes())
    (copy / "5_model.pth").write_bytes(data)
    row = dataclasses.replace(ROWS["teed"], weights=copy)
    before = fingerprint(row)["id"]
    (copy / "README.md").write_text("about")
    assert fingerprint(row)["id"] == before
    data[-1] ^= 1
    (copy / "5_model.pth").write_bytes(data)
    assert fingerprint(row)["id"] != before


def test_safetensors_are_read_before_pickles_and_pickled_code_never_runs(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):  # type: ignore[no-untyped-def]
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"a": torch.zeros(1), "b": Evil()}, tmp_path / "net.pth")
    with pytest.raises(UserError, match=r"net\.pth cannot be loaded"):
        read_weights(tmp_path, "net.pth", "net.safetensors")
    assert not (tmp_path / "ran").exists()
    save_file({"a": torch.ones(1)}, tmp_path / "net.safetensors")
    assert read_weights(tmp_path, "net.pth", "net.safetensors")["a"].item() == 1


def test_weights_that_lack_or_do_not_fit_are_refused(tmp_path: Path) -> None:
    net = torch.nn.Linear(2, 1)
    for weights in ({"weight": torch.zeros(1, 2)}, {"weight": torch.zeros(1, 3), "bias": torch.zeros(1)}, {"x": 1}):
        with pytest.raises(UserError, match="cannot be loaded"):
            load_strictly(net, weights, tmp_path / "net.pth")


def test_a_transformers_checkpoint_that_lacks_weights_or_brings_code_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    TINY["dpt-large"][0](tmp_path)
    assert mean_and_std(tmp_path) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    weights = load_file(tmp_path / "model.safetensors")
    lost = next(key for key in weights if key.startswith("head"))
    save_file({key: value for key, value in weights.items() if key != lost}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"no fitting weights for {lost}"):
        load_pretrained("AutoModelForDepthEstimation", tmp_path, "cpu")
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "evil.Config", "AutoModelForDepthEstimation": "evil.Net"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_pretrained("AutoModelForDepthEstimation", tmp_path, "cpu")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_pretrained("AutoModelForDepthEstimation", tmp_path, "cpu")

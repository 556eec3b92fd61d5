"""The hub that does not answer is an error of ours within seconds; one that does is asked with patience, in silence."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from huggingface_hub import constants

from quantcli.cli import run_command
from quantcli.model import hub
from quantcli.model.hub import hub_asked
from quantcli.model.structure_cache import find_structure

REVISION = "0123456789" * 4


@contextmanager
def served(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class _Empty(BaseHTTPRequestHandler):
    """A hub that has nothing."""

    def do_GET(self) -> None:
        self.send_error(404)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return monkeypatch


def test_a_hub_that_answers_is_asked(online: pytest.MonkeyPatch) -> None:
    with served(_Empty) as address:
        online.setattr(constants, "ENDPOINT", address)
        with hub_asked() as obstacle:
            assert obstacle == ""
            assert not constants.HF_HUB_OFFLINE


def test_a_hub_that_refuses_or_says_nothing_is_not(online: pytest.MonkeyPatch) -> None:
    online.setattr(hub, "SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # connections wait and are never taken
        for port in (1, silent.getsockname()[1]):
            online.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
            with hub_asked() as obstacle:
                assert f":{port} cannot be reached (" in obstacle
                assert "Errno" not in obstacle
                assert constants.HF_HUB_OFFLINE
            assert not constants.HF_HUB_OFFLINE


def test_a_user_who_wants_no_hub_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with hub_asked() as obstacle:
        assert obstacle == "HF_HUB_OFFLINE is set"
    assert constants.HF_HUB_OFFLINE


def planned(address: str, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`quantcli plan` of a model on the hub, in a process of its own: the libraries read their settings once."""
    own = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home)}
    command = [sys.executable, "-m", "quantcli", "plan", "w8a16", "--model", "some-org/some-model", "--json"]
    plain = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, env=plain | own, timeout=60, check=False
    )
    assert "Retry" not in done.stderr
    return done


def test_without_network_there_is_one_error_and_no_retry(tmp_path: Path) -> None:
    """A revision by its digest is what huggingface_hub asks for with 23 seconds of retries and their messages."""
    done = planned("http://127.0.0.1:1", tmp_path, "--set", f"model.revision={REVISION}")
    assert (done.returncode, done.stdout) == (3, "")
    (message,) = done.stderr.splitlines()
    assert message.startswith("There is no directory some-org/some-model, and http://127.0.0.1:1 cannot be reached (")
    assert "Check the name, the network" in message


def test_a_download_is_silent_and_tried_again(tiny_llama: Path, tmp_path: Path) -> None:
    """From a hub that is busy when it is asked for the list of files."""
    find_structure(tiny_llama)  # so that the plan finds it in the cache and is quick
    files = {file.name: file.read_bytes() for file in tiny_llama.glob("*.json")}
    busy = [True]

    class Hub(_Empty):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            body, headers = b"", {}
            if path == "/api/models/some-org/some-model/revision/main":
                body = json.dumps({"id": "some-org/some-model", "sha": REVISION, "siblings": []}).encode()
            elif path == f"/api/models/some-org/some-model/tree/{REVISION}":
                if busy:
                    busy.pop()
                    self.send_error(503)
                    return
                rows = [{"type": "file", "path": n, "size": len(c), "oid": _oid(c)} for n, c in files.items()]
                body = json.dumps(rows).encode()
            elif (name := path.rpartition("/")[2]) in files and path.startswith("/some-org/some-model/resolve/"):
                body, headers = files[name], {"ETag": _oid(files[name]), "X-Repo-Commit": REVISION}
            self.send_response(200)
            for header, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(header, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

    with served(Hub) as address:
        done = planned(address, tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        assert not busy
    again = planned(address, tmp_path)  # the hub is gone, and the copy is there
    assert json.loads(again.stdout)["model"] == json.loads(done.stdout)["model"]


def test_a_download_that_breaks_off_is_a_fault_of_the_model(tmp_path: Path) -> None:
    class Hub(_Empty):
        def do_GET(self) -> None:
            body = json.dumps({"id": "some-org/some-model", "sha": REVISION, "siblings": []}).encode()
            if "/tree/" in self.path:
                body = json.dumps([{"type": "file", "path": "config.json", "size": 99, "oid": "0" * 40}]).encode()
            if "/resolve/" in self.path:
                self.close_connection = True
                return  # without a word
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_HEAD = do_GET

    with served(Hub) as address:
        done = planned(address, tmp_path)
    assert (done.returncode, done.stdout) == (3, "")
    assert "some-org/some-model, and the hub does not give it: " in done.stderr


@pytest.mark.parametrize(("error", "status"), [(OSError(errno.ENOSPC, "No space left"), 6), (KeyError("siblings"), 3)])
def test_a_disk_that_a_download_fills_has_the_status_of_full_disks(
    online: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, status: int
) -> None:
    def failed(*_: Any, **__: Any) -> str:
        raise error

    online.setattr("huggingface_hub.snapshot_download", failed)
    online.setattr(hub, "_obstacle", lambda: "")
    assert run_command(["plan", "w8a16", "--model", "some-org/some-model"]) == status
    assert ("No room is left" in capsys.readouterr().err) == (status == 6)


def _oid(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()

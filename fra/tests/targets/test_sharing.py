"""Ledgers pushed to the hub and read from it again, through huggingface_hub and a local stand-in of the hub."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fra.errors import FraError
from fra.share import run
from fra.tests.ledgers.test_compare import changed, two_rows
from fra.verdicts import ledger as ledgers

ROOT = Path(__file__).resolve().parents[3]


class StandIn(BaseHTTPRequestHandler):
    """As much of the hub as one data set needs: what was committed is what is served."""

    files: dict[str, bytes]
    commits: list[str]
    refuse = False

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, body: object = None, status: int = 200, **headers: str) -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("authorization") != "Bearer secret" or type(self).refuse:
            self._answer({"error": "no right to write here"}, 403)
        elif self.path == "/api/repos/create":
            asked = json.loads(raw)
            owner = asked.get("organization") or "me"
            self._answer({"url": f"http://{self.headers['Host']}/datasets/{owner}/{asked['name']}"})
        elif self.path.endswith("/preupload/main"):
            paths = [file["path"] for file in json.loads(raw)["files"]]
            modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
            self._answer({"files": modes})
        elif self.path.endswith("/commit/main"):
            for line in map(json.loads, raw.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "header":
                    self.commits.append(line["value"]["summary"])
            url = f"http://{self.headers['Host']}/datasets/me/verdicts/commit/{'a' * 40}"
            self._answer({"commitUrl": url, "commitOid": "a" * 40, "pullRequestUrl": None})
        elif self.path == "/api/validate-yaml":
            self._answer({"warnings": [], "errors": []})
        else:
            self._answer({"error": self.path}, 404)

    def do_GET(self) -> None:
        own = "/api/datasets/me/verdicts"
        path = self.path.partition("?")[0]
        if path in (own, f"{own}/revision/main"):
            siblings = [{"rfilename": name} for name in self.files]
            self._answer({"id": "me/verdicts", "sha": "a" * 40, "siblings": siblings})
        elif path.startswith(f"{own}/tree/"):
            tree = [{"type": "file", "path": p, "size": len(c), "oid": "b" * 40} for p, c in self.files.items()]
            self._answer(tree)
        elif found := re.fullmatch(r"/datasets/me/verdicts/resolve/[^/]+/(.+)", path):
            content = self.files.get(found[1])
            if content is None:
                self._answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
            else:
                self._answer(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit="a" * 40)
        else:
            self._answer({"error": path}, 404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    StandIn.files, StandIn.commits, StandIn.refuse = {}, [], False
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()


def told(hub: ThreadingHTTPServer | str, folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """What a process of its own says whose hub is the stand-in."""
    address = hub if isinstance(hub, str) else f"http://127.0.0.1:{hub.server_address[1]}"
    own = {"HF_ENDPOINT": address, "HF_TOKEN": "secret", "HF_HOME": str(folder / "home"), "NO_PROXY": "127.0.0.1"}
    proxies = {"HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HF_HUB_OFFLINE"}
    environment = {k: v for k, v in os.environ.items() if k.upper() not in proxies} | own
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_what_is_pushed_is_what_is_compared(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    one = two_rows()
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, ledger in zip(paths, (one, changed(one, 0, effect=0.125)), strict=True):
        ledgers.write(ledger, path)
    names = [str(path) for path in paths]
    push = f"from pathlib import Path; from fra.share import run; run('me/verdicts', list(map(Path, {names})))"
    for _ in range(2):
        done = told(hub, tmp_path, push)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip().endswith("/datasets/me/verdicts/commit/" + "a" * 40)
    assert StandIn.commits == ["2 ledgers"] * 2
    kinds = sorted(name.partition("/")[0] for name in StandIn.files)
    assert kinds == ["README.md", "ledgers", "ledgers", "reports", "reports", "rows", "rows"], (
        "pushed twice, there once"
    )
    pushed = {content for name, content in StandIn.files.items() if name.startswith("ledgers/")}
    assert pushed == {path.read_bytes() for path in paths}
    assert StandIn.files["README.md"].startswith(b"---\n{") and b"hub:me/verdicts" in StandIn.files["README.md"]
    compare = "import sys; from fra.compare import main; sys.exit(main(['hub:me/verdicts', '--expect-equal']))"
    done = told(hub, tmp_path, compare)
    assert done.returncode == 1, done.stderr
    assert "1 differ, 0 in their verdict" in done.stdout
    mixed = f"import sys; from fra.compare import main; sys.exit(main([{str(paths[0])!r}, 'hub:me/verdicts']))"
    assert "2 differ" not in (said := told(hub, tmp_path, mixed).stdout) and said.count("rows:") == 2


def test_a_hub_that_refuses_or_is_away_is_said_in_one_sentence(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    ledgers.write(two_rows(), tmp_path / "a.json")
    code = (
        "import sys; from pathlib import Path; from fra.errors import FraError; from fra.share import run\n"
        f"try:\n    run('me/verdicts', [Path({str(tmp_path / 'a.json')!r})])\n"
        "except FraError as error:\n    print(type(error).__name__, error)"
    )
    StandIn.refuse = True
    refused = told(hub, tmp_path, code).stdout.splitlines()
    assert len(refused) == 1 and refused[0].startswith("FraError the hub did not take the data set 'me/verdicts'")
    assert refused[0].endswith("log in (hf auth login) with a token that may write there.")
    away = told("http://127.0.0.1:9", tmp_path, code).stdout.splitlines()
    assert len(away) == 1 and away[0].startswith("CannotLoad the Hugging Face hub is not reached"), away
    nothing = "from fra.compare import main; main(['hub:me/nothing'])"
    assert "the hub has no the data set" not in (said := told(hub, tmp_path, nothing).stderr)
    assert "me/nothing" in said and len(said.splitlines()) == 1


@pytest.mark.parametrize("name", ["verdicts", "me/", "/x", "me/a/b", "me/../x", "hub:me/x", ""])
def test_what_is_no_data_set_is_refused_before_anything_is_sent(name: str, tmp_path: Path) -> None:
    with pytest.raises(FraError, match="is no data set of the hub: say OWNER/NAME"):
        run(name, [tmp_path / "a.json"])

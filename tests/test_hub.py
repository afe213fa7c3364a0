"""Downloads Retrieval's files from a local server with the Hugging Face hub's protocol."""

import hashlib
import http.server
import shutil
import threading
from collections import namedtuple

import pytest
import tiny_data

from skyformer_jax.data import hub, retrieval
from skyformer_jax.errors import UserError

NAMES = [f"new_aan_pairs.{name}.tsv" for name in ("train", "eval", "test")]
FOLDER = f"/datasets/{retrieval.HUB.name}/resolve/{retrieval.HUB.revision}/data/aan/"


class Hub(http.server.ThreadingHTTPServer):
    """Serves Git LFS files: /datasets/.../resolve/... redirects to /lfs/NAME, which takes ranges.

    Attributes:
      files: content of each file by name.
      sent: content by name that is sent in place of the true one.
      broken: names of files that fail: the first request gets half of the requested bytes, later
        ones get status 500.
      asked: (method, path, Range) of every request.
    """

    daemon_threads = True

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.sent, self.broken, self.asked = files, {}, [], []
        self.address = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        pass


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def answer(self, status, content=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        return content

    def do_HEAD(self):
        server, name = self.server, self.path.rpartition("/")[2]
        server.asked.append((self.command, self.path, self.headers.get("Range")))
        if self.path != FOLDER + name or name not in server.files:
            return self.answer(404, X_Error_Code="EntryNotFound")
        return self.answer(
            302,
            Location=f"http://localhost:{server.server_port}/lfs/{name}",  # another host
            X_Repo_Commit=retrieval.HUB.revision,
            X_Linked_Size=len(server.files[name]),
            X_Linked_ETag=f'"{hashlib.sha256(server.files[name]).hexdigest()}"',
        )

    def do_GET(self):
        server, name = self.server, self.path.rpartition("/")[2]
        if not self.path.startswith("/lfs/"):
            return self.do_HEAD()
        server.asked.append((self.command, self.path, self.headers.get("Range")))
        content = server.sent.get(name, server.files[name])
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").strip("-"))
        if server.broken.count(name) == 1:
            server.broken.append(name)
            self.answer(206 if start else 200, content[start:])
            self.wfile.write(content[start : (start + len(content)) // 2])
            self.close_connection = True
        elif name in server.broken:
            self.answer(500)
        elif start:
            which = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self.wfile.write(self.answer(206, content[start:], Content_Range=which))
        else:
            self.wfile.write(self.answer(200, content))
        return None


@pytest.fixture
def server(tmp_path, monkeypatch):
    tiny_data.write_pairs(tmp_path / "published")
    with Hub({name: (tmp_path / "published" / name).read_bytes() for name in NAMES}) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", httpd.address)
        yield httpd
        httpd.shutdown()


@pytest.fixture
def task():
    return tiny_data.tiny_tasks()["retrieval"]


def checksum(task, data_dir, source=None):
    return task.load("train", data_dir, source=source).checksum()


def ranges(server, name):
    """Range headers of the GET requests for a file."""
    return [r for method, path, r in server.asked if (method, path) == ("GET", f"/lfs/{name}")]


def test_downloads_what_is_published(server, task, tmp_path, capsys):
    assert checksum(task, tmp_path / "data") == checksum(
        task, tmp_path / "own", str(tmp_path / "published")
    )
    said = capsys.readouterr().err
    total = sum(map(len, server.files.values()))
    assert f"downloading {total / 1e9:.1f} GB into {tmp_path}/data/downloads/tsv_data" in said
    assert said.index("GB into") < said.index("downloading new_aan_pairs.train.tsv")
    assert {path for _, path, _ in server.asked} == {
        path for name in NAMES for path in (FOLDER + name, f"/lfs/{name}")
    }
    server.asked.clear()  # preparing again reuses the downloads
    shutil.rmtree(tmp_path / "data" / "retrieval")
    assert checksum(task, tmp_path / "data") and not server.asked


def test_an_interrupted_download_goes_on_where_it_stopped(server, task, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "_AT_ONCE", 1000)  # the files are small
    train, evaluation, test = NAMES
    server.broken.append(evaluation)
    with pytest.raises(UserError, match=r"hub failed: .* start the same command to go on"):
        checksum(task, tmp_path / "data")
    folder = tmp_path / "data" / "downloads" / "tsv_data"
    half = len(server.files[evaluation]) // 2 // 1000 * 1000
    assert {path.name: path.stat().st_size for path in folder.iterdir()} == {
        train: len(server.files[train]),
        f"{evaluation}.part": half,
    }
    server.broken.clear()
    server.asked.clear()
    assert checksum(task, tmp_path / "data")
    assert (ranges(server, train), ranges(server, test)) == ([], [None])
    assert ranges(server, evaluation) == [f"bytes={half}-"]
    for name in NAMES:
        assert (folder / name).read_bytes() == server.files[name]


@pytest.mark.parametrize("place", [0, 100, -1])
def test_a_file_that_arrives_with_other_bytes_is_refused(server, task, tmp_path, place):
    wrong = bytearray(server.files[NAMES[0]])
    wrong[place] ^= 1
    server.sent[NAMES[0]] = bytes(wrong)
    with pytest.raises(UserError, match=r"train\.tsv arrived with SHA-256 .*; it was removed"):
        checksum(task, tmp_path / "data")
    assert not list((tmp_path / "data").rglob("new_aan*"))
    server.sent.clear()
    part = tmp_path / "data" / "downloads" / "tsv_data" / f"{NAMES[0]}.part"
    part.write_bytes(wrong[:200])  # wrong bytes of an earlier download are refused too
    if place != -1:
        with pytest.raises(UserError, match="it was removed"):
            checksum(task, tmp_path / "data")
    part.write_bytes(wrong + b"more")
    assert checksum(task, tmp_path / "data")


def test_a_small_disk_and_what_is_no_hub_are_said(server, task, tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    with monkeypatch.context() as patch:
        needs = sum(map(len, server.files.values())) + 2 * sum(tiny_data.PAIRS.values()) * 4000
        with pytest.raises(UserError, match=rf"has 0\.0 GB free; .* need {needs / 1e9:.1f} GB"):
            patch.setattr(hub.shutil, "disk_usage", lambda _: usage(needs - 1))
            checksum(task, tmp_path / "data")
    assert not any(path.startswith("/lfs") for _, path, _ in server.asked)
    del server.files[NAMES[1]]
    with pytest.raises(
        UserError, match=r"failed: .*404.*name the folder of new_aan_pairs"
    ) as error:
        checksum(task, tmp_path / "data")
    assert "\n" not in str(error.value)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"failed: .*name the folder of new_aan_pairs"):
        checksum(task, tmp_path / "data")

"""Downloads, from a server on this machine's loopback address."""

import errno
import hashlib
import io
import signal
import tarfile
import threading
from http.client import BadStatusLine, IncompleteRead, InvalidURL
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest.mock import Mock
from urllib.error import HTTPError

import pytest
from conftest import contents

import archives
from endings import Refused

CONTENT = {"batches/one": b"1" * 70_000, "batches/two": b"2" * 70_000}


def packed():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in CONTENT.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return file.getvalue()


ARCHIVE = packed()
MD5 = hashlib.md5(ARCHIVE, usedforsecurity=False).hexdigest()


@pytest.fixture
def server(monkeypatch):
    """Its address; `half` is set when it has sent a half, `go` lets it send the rest, `requests` are those that were made."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(ARCHIVE)))
            self.end_headers()

        def do_GET(self):
            server.requests.append(self.path)
            self.do_HEAD()
            self.wfile.write(ARCHIVE[: len(ARCHIVE) // 2])
            self.wfile.flush()
            if len(server.requests) > 1:  # the first is torchvision's question where the file is
                server.half.set()
                server.go.wait()
            self.wfile.write(ARCHIVE[len(ARCHIVE) // 2 :])

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{server.server_port}/batches.tar"
    server.half, server.go, server.requests = threading.Event(), threading.Event(), []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.go.set()
    server.shutdown()
    server.server_close()


def fetch(root, url):
    archives.fetch("a set", root, url, "batches.tar", MD5, {root / name: None for name in CONTENT})


def assert_whole(root):
    assert {name: (root / name).read_bytes() for name in CONTENT} == CONTENT
    assert (root / "batches.tar").read_bytes() == ARCHIVE
    assert {path.name for path in root.iterdir()} == {"batches", "batches.tar", ".download.lock"}


def test_of_two_processes_one_downloads_and_the_other_waits(server, forked, tmp_path, capsys):
    code = f"import pathlib, test_archives; test_archives.fetch(pathlib.Path({str(tmp_path / 'data')!r}), {server.url!r})"
    first = forked(["-c", code])
    assert server.half.wait(60)
    assert not (tmp_path / "data" / "batches.tar").exists()
    second = threading.Thread(target=fetch, args=(tmp_path / "data", server.url))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    server.go.set()
    second.join()
    done = first.wait()
    assert done.returncode == 0, done.stderr
    assert f"another process is downloading into {tmp_path / 'data'}: waiting for it" in capsys.readouterr().out
    assert len(server.requests) == 2  # of one download
    assert_whole(tmp_path / "data")


def test_a_download_that_was_killed_is_begun_anew(server, forked, tmp_path):
    code = f"import pathlib, test_archives; test_archives.fetch(pathlib.Path({str(tmp_path)!r}), {server.url!r})"
    first = forked(["-c", code])
    assert server.half.wait(60)
    first.send_signal(signal.SIGKILL)
    assert first.wait().returncode == -signal.SIGKILL
    assert not (tmp_path / "batches.tar").exists()
    server.go.set()
    fetch(tmp_path, server.url)
    assert_whole(tmp_path)


def test_what_is_there_is_kept_and_the_rest_is_taken_from_the_archive(server, tmp_path):
    (tmp_path / "batches").mkdir()
    (tmp_path / "batches" / "one").write_bytes(b"somebody's")
    (tmp_path / "batches.tar").write_bytes(ARCHIVE)
    fetch(tmp_path, server.url)
    assert (tmp_path / "batches" / "one").read_bytes() == b"somebody's"
    assert (tmp_path / "batches" / "two").read_bytes() == CONTENT["batches/two"]
    assert not server.requests


def test_a_file_that_is_no_archive_is_kept_as_it_is(server, tmp_path):
    """As those of SVHN."""
    server.go.set()
    archives.fetch("a set", tmp_path, server.url, "batches.tar", MD5, {tmp_path / "batches.tar": MD5})
    assert contents(tmp_path) == {"batches.tar": ARCHIVE, ".download.lock": b""}


def test_another_file_than_expected_leaves_nothing(server, tmp_path):
    server.go.set()
    root = tmp_path / "new" / "data"
    with pytest.raises(Refused, match=r"lacks files of a set, and downloading http://\S+ failed \(File not found or corrupted"):
        archives.fetch("a set", root, server.url, "batches.tar", "0" * 32, {root / "batches" / "one": None})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (IncompleteRead(b"a half", 9), r"IncompleteRead\(6 bytes read, 9 more expected\)"),
        (BadStatusLine("SSH-2.0-OpenSSH\r\n"), "SSH-2.0-OpenSSH"),
        (InvalidURL("nonnumeric port: 'port'"), "nonnumeric port: 'port'"),
        (HTTPError("", 302, "it leads back.\nThe last:\nFound", None, None), "HTTP Error 302: it leads back. The last: Found"),
    ],
)
def test_what_a_server_or_proxy_does_wrong_is_one_sentence(error, reason, monkeypatch, tmp_path):
    monkeypatch.setattr(archives, "download_url", Mock(side_effect=error))
    told = rf" lacks files of a set, and downloading http://\S+ failed \({reason}\): put "
    with pytest.raises(Refused, match=told) as refused:
        fetch(tmp_path / "new", "http://127.0.0.1:9/")
    assert refused.value.status == 2
    assert not list(tmp_path.iterdir())


def test_an_archive_that_cannot_be_extracted_is_kept(server, monkeypatch, tmp_path):
    """Also in a folder that is new: it took long to download."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(archives, "extract_archive", full)
    server.go.set()
    with pytest.raises(Refused, match=r"cannot be extracted there \(.*No space left.*\): make room") as refused:
        fetch(tmp_path / "new", server.url)
    assert refused.value.status == 1
    assert contents(tmp_path / "new") == {"batches.tar": ARCHIVE}


def test_a_closed_output_is_no_failed_download(server, monkeypatch, tmp_path):
    def closed(*_):
        raise BrokenPipeError

    monkeypatch.setattr(archives, "download_url", closed)
    with pytest.raises(BrokenPipeError):
        fetch(tmp_path / "new", server.url)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_where_the_file_system_has_no_locks_it_is_downloaded_without_one(server, monkeypatch, tmp_path, number):
    def flock(*_):
        raise OSError(number, "as on such a file system")

    monkeypatch.setattr("fcntl.flock", flock)
    server.go.set()
    fetch(tmp_path, server.url)
    assert contents(tmp_path / "batches") == {"one": CONTENT["batches/one"], "two": CONTENT["batches/two"]}

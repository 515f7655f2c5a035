import os
from pathlib import Path

import pytest
from conftest import contents

import files
from files import replace_file


@pytest.mark.parametrize("alone", [True, False])
def test_a_file_is_on_the_disk_before_its_name_and_then_its_name_is(disk, tmp_path, alone):
    """Its first name is its own where another process may write the same file."""
    (tmp_path / "file").write_bytes(b"old")
    replace_file(tmp_path / "file", b"new", alone)
    new = "file.tmp" if alone else f"file.{os.getpid()}.tmp"
    assert disk == [("flush", new, b"new"), ("replace", new, "file"), ("flush", tmp_path.name, None)]
    assert contents(tmp_path) == {"file": b"new"}


@pytest.mark.parametrize("alone", [True, False])
def test_a_link_stays_one(tmp_path, alone):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for content in (b"one", b"two"):  # the file is new, then it is replaced
        replace_file(tmp_path / "link", content, alone)
        assert contents(tmp_path) == {"link": content, "file": content}
    assert (tmp_path / "link").is_symlink()


def test_ctrl_c_leaves_no_half_a_file(monkeypatch, tmp_path):
    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "flush_to_disk", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replace_file(tmp_path / "file", b"new")
    assert not contents(tmp_path)


def test_a_pipe_is_written_to_and_stays_one(tmp_path):
    """Nor does /dev/null become a file, where root names it."""
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    replace_file(tmp_path / "pipe", b"content")
    assert os.read(reader, 100) == b"content"
    os.close(reader)
    assert [(path.name, path.is_fifo()) for path in tmp_path.iterdir()] == [("pipe", True)]


def test_flushing_what_cannot_be_flushed(capsys):
    """Of /proc, each file says EINVAL."""
    if not os.path.isdir("/proc/self"):
        pytest.skip("there is no /proc")
    for _ in range(2):
        files.flush_to_disk(Path("/proc/self/stat"))
    assert capsys.readouterr().out == (
        "/proc/self: its file system cannot flush a file (Invalid argument): a power cut may damage the run\n"
    )

import errno
import os
import subprocess
from pathlib import Path

import pytest
from conftest import contents

import files
from endings import Refused
from files import refuse_existing, replace_file, write_text


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


def test_a_full_disk_leaves_the_old_file(tmp_path):
    """On a file system of 1 MB, if this user may mount one: the new file does not fit beside the old one."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed")
    try:
        replace_file(tmp_path / "latest.pth", bytes(600_000))
        with pytest.raises(OSError, match=r"No space left on device: .*latest.pth"):
            replace_file(tmp_path / "latest.pth", b"1" * 600_000)
        assert (tmp_path / "latest.pth").read_bytes() == bytes(600_000)
        assert [path.name for path in tmp_path.iterdir()] == ["latest.pth"]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


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
        "/proc/self: its file system cannot flush a file (Invalid argument): a power cut may damage what is written there\n"
    )


def test_no_file_stays_open(tmp_path):
    """A long run, which writes several in each epoch, would reach the system's limit."""
    numbers = []
    for content in (b"old", b"new"):
        numbers.append(os.dup(0))  # the lowest that is free
        os.close(numbers[-1])
        replace_file(tmp_path / "file", content)
    assert numbers[0] == numbers[1]


def test_a_file_behind_a_link_is_written_beside_itself(monkeypatch, tmp_path):
    """Not beside the link: from one disk to another, nothing can be renamed."""
    renamed, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: [renamed.append((old, new)), replace(old, new)])
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
    (tmp_path / "here" / "link").symlink_to(tmp_path / "there" / "file")
    replace_file(tmp_path / "here" / "link", b"new")
    assert renamed == [(tmp_path / "there" / "file.tmp", tmp_path / "there" / "file")]


def test_a_text_has_a_name_of_its_own_until_it_is_written(disk, tmp_path, capsys):
    """Two programs may write the same table; what is not Unicode is escaped."""
    write_text(tmp_path / "table.csv", "bad\udcff\n")
    assert ("replace", f"table.csv.{os.getpid()}.tmp", "table.csv") in disk
    assert contents(tmp_path) == {"table.csv": b"bad\\udcff\n"}
    assert capsys.readouterr().out == f"wrote {tmp_path / 'table.csv'}\n"


def test_a_folder_that_cannot_be_written_to_is_told_by_the_name_of_the_file(monkeypatch, tmp_path):
    """Not by that of the temporary file, which cannot be removed either."""

    def refuse(path, *arguments):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(OSError, match="Read-only") as caught:
        replace_file(tmp_path / "table.csv", b"new", alone=False)
    assert caught.value.filename == str(tmp_path / "table.csv")


def test_json_that_may_not_be_read_is_not_called_damaged(monkeypatch, tmp_path):
    """As by a user who may not read it, which root always may."""

    def may_not_be_read(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "read_text", may_not_be_read)
    with pytest.raises(PermissionError):
        files.read_json(tmp_path / "args.json", "put back a whole one")


def test_a_new_folder_can_be_written_to_where_it_can_be_made_with_those_above_it(tmp_path):
    (tmp_path / "file").touch()
    found = {name: files.writable(tmp_path / name) for name in (".", "new", "new/deep/folder", "file", "file/new")}
    assert found == {".": True, "new": True, "new/deep/folder": True, "file": False, "file/new": False}


def test_only_a_device_may_be_there_and_be_named_twice(tmp_path):
    refuse_existing(Path("/dev/null"), Path("/dev/null"), None, None, tmp_path / "new")
    (tmp_path / "file").touch()
    for taken in (tmp_path / "file", tmp_path):
        with pytest.raises(Refused, match=f"{taken} exists already: name another file, or remove it"):
            refuse_existing(None, taken)
    (tmp_path / "link").symlink_to(tmp_path / "file" / "new")
    with pytest.raises(Refused, match=f"^{tmp_path / 'file'} is not a writable folder: name another for link"):
        refuse_existing(tmp_path / "link")
    (tmp_path / "twin").symlink_to("new")
    for again in ("new", "folder/../new", "twin"):
        with pytest.raises(Refused, match="new is named for two files"):
            refuse_existing(tmp_path / "new", None, tmp_path / again)

"""Files written atomically: to a temporary file, flushed and renamed. JSON that is read, or refused."""

import contextlib
import json
import os
import re

from endings import DISK_ERRORS, Refused, naming, say, say_once

PICTURE = rb"Matplotlib"  # is in each picture that Matplotlib makes
THEN = ", then "  # in args.json, between the commits, versions or machines that a run had one after the other


def read_json(path, remedy):
    """The content of a JSON file. Refused if it cannot be read."""
    try:
        return json.loads(path.read_text())
    except PermissionError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise Refused(f"{path} is damaged ({error}): {remedy}") from error


def as_json(values):
    return (json.dumps(values, indent=2) + "\n").encode()


def refuse_existing(*paths):
    """Refused if one of the files exists or cannot be written, or two are the same; None stands for no file."""
    named = [path for path in paths if path]
    for path in named:
        if path.is_file() or path.is_dir():  # and not /dev/stdout
            raise Refused(f"{path} exists already: name another file, or remove it")
        refuse_unwritable(path)
        if [each.resolve() for each in named].count(path.resolve()) > 1 and not path.exists():
            raise Refused(f"{path} is named for two files: name another for one of them")


def refuse_foreign(path, pattern):
    """Refused if the path is a folder, or a file that is not empty and lacks the pattern that ours of this name contain."""
    if path.is_dir():
        raise Refused(f"{path} is a folder where a file is expected: remove it, or name another place")
    content = path.read_bytes() if path.is_file() else b""
    if content and not re.search(pattern, content):
        raise Refused(f"{path} exists already and is not from this program, or damaged: name another place, or remove it")


def refuse_unwritable(path):
    """Refused if the folder for the file is not writable; a device, such as /dev/stdout, needs none."""
    folder = path.resolve().parent  # replace_file follows links, too
    if (path.is_file() or not path.exists()) and not writable(folder):
        raise Refused(f"{folder} is not a writable folder: name another for {path.name}")


def writable(folder):
    """Whether the folder is writable or, if it is new, can be created."""
    nearest = next(each for each in (folder, *folder.parents) if each.exists())
    return nearest.is_dir() and os.access(nearest, os.W_OK)


def write_text(path, text):
    """Writes a text file, in a folder that may be new, and says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, text.encode("utf-8", "backslashreplace"), alone=False)
    say(f"wrote {path}")


def replace_file(path, content, alone=True):
    """Writes a file atomically. A device or a pipe, such as /dev/stdout, is written to and stays what it is.

    alone=False: other processes may write the same file at the same time, so the temporary one gets a unique name.
    """
    if path.exists() and not path.is_file():
        with naming(path):
            path.write_bytes(content)
        return
    path = path.resolve()  # a link stays one: the file that it names is replaced
    temporary = path.with_name(f"{path.name}.tmp" if alone else temporary_name(path.name, os.getpid()))
    try:
        with naming(path):
            temporary.write_bytes(content)
            flush_to_disk(temporary)
            os.replace(temporary, path)
            flush_to_disk(path.parent)
    except BaseException:  # Ctrl-C, too
        with contextlib.suppress(OSError):  # it may not exist, or its folder may be read-only
            temporary.unlink()  # frees space on a full disk
        raise


def temporary_name(name, pid):
    """The temporary file's name of a file that other processes than this one may write, too."""
    return f"{name}.{pid}.tmp"


def flush_to_disk(path):
    """Waits until a file's content, or a folder's entries, are on the disk; says so where the file system cannot do that."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    except OSError as error:
        if error.errno in DISK_ERRORS:
            raise
        folder, reason = path if path.is_dir() else path.parent, error.strerror
        say_once(f"{folder}: its file system cannot flush a file ({reason}): a power cut may damage what is written there")
    finally:
        os.close(descriptor)

"""The folder of a run: its lock, args.json, train.csv, test.csv and latest.pth; how a run is begun, saved, and resumed.

At every instant the folder holds a complete checkpoint, or none yet: a new one is written beside the old one, flushed to the
disk, and takes its name in one step. Rows of the CSVs that are newer than the checkpoint are cut off when a run is resumed.
"""

import fcntl
import io
import json
import os

import torch

from evaluate import load_checkpoint

FILES = ["args.json", "train.csv", "test.csv", "latest.pth", "latest.pth.tmp", "loss.png", "error.png", "loss-error.png"]

# What args.json holds that does not change what a run computes; all else must be the same when it is resumed.
FREE = {"data", "device", "compile", "efficient", "deterministic", "save", "resume", "force", "plot"}
FREE |= {"epochs", "torch", "hardware", "commit"}  # epochs have a check of their own; the others are no arguments


def refuse_to_replace(save, resume, force):
    """ValueError if the folder holds a run and neither flag says what shall become of it."""
    if not (resume or force) and any((save / name).exists() for name in FILES):
        raise ValueError(
            f"{save} already holds a run: continue it with --resume, replace it with --force, or choose another --save"
        )


def lock(save):
    """An open file that must be kept: as long as it is open, no other process gets it. It dies with its holder.

    ValueError if another process has it, or the folder cannot be written.
    """
    try:
        save.mkdir(parents=True, exist_ok=True)
        file = (save / ".lock").open("w")
    except OSError as error:
        raise ValueError(f"--save {save} cannot be written ({error.strerror}): choose another folder") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ValueError(f"another process is training in {save}: wait for it, or choose another --save") from error
    return file


def begin(save, facts, has_val):
    """Removes the files of a run that was there, and writes args.json and the CSVs with their header lines."""
    for name in FILES:
        (save / name).unlink(missing_ok=True)
    replace_file(save / "args.json", (json.dumps(facts, indent=2) + "\n").encode())
    (save / "train.csv").write_text("epoch,loss,error\n")
    (save / "test.csv").write_text("epoch,loss,error" + (",val_loss,val_error" if has_val else "") + "\n")


def resume(save, facts, unchanged):
    """The checkpoint of the run in the folder, its CSVs cut off behind it; None where there is none yet.

    unchanged(old_epochs, new_epochs, epochs_done) tells whether the schedule so far is the same with another --epochs.
    ValueError, and nothing is touched, if the checkpoint is damaged or belongs to a run with other arguments.
    """
    checkpoint = load_checkpoint(save / "latest.pth") if (save / "latest.pth").exists() else None
    if not (save / "args.json").exists():
        if checkpoint is None:
            return None
        raise ValueError(f"{save} holds a checkpoint and no args.json: put it back, or choose another --save")
    epochs_done = checkpoint["epoch"] if checkpoint else 0
    compare(json.loads((save / "args.json").read_text()), facts, epochs_done, unchanged)
    if checkpoint:
        replace_file(save / "args.json", (json.dumps(facts, indent=2) + "\n").encode())
        for name in ("train.csv", "test.csv"):
            cut_rows(save / name, epochs_done)
    return checkpoint


def compare(old, new, epochs_done, unchanged):
    """ValueError names the first argument that would change the result of the run."""
    for name in old:
        if name in new and name not in FREE and old[name] != new[name]:
            raise ValueError(
                f"the run was begun with {name} {old[name]} and not {new[name]}: resume it with the same arguments"
            )
    if not unchanged(old["epochs"], new["epochs"], epochs_done):
        raise ValueError(
            f"--epochs {new['epochs']} instead of {old['epochs']} changes the schedule of the {epochs_done} epochs already done"
        )


def cut_rows(path, epochs_done):
    """Keeps the header and the rows up to the end of epoch `epochs_done` of a CSV whose last row may be half written."""
    header, *rows = path.read_bytes().splitlines(keepends=True)
    whole = [row for row in rows if row.endswith(b"\n") and float(row.split(b",")[0]) <= epochs_done]
    replace_file(path, b"".join([header, *whole]))


def append_rows(path, rows):
    """Adds rows, the epoch first, to a CSV."""
    with path.open("a") as file:
        for epoch, *values in rows:
            file.write(",".join([f"{epoch:.6f}".rstrip("0").rstrip("."), *(f"{value:.6g}" for value in values)]) + "\n")


def save_checkpoint(save, checkpoint):
    """Replaces latest.pth, after the rows that belong to it have reached the disk."""
    for name in ("train.csv", "test.csv"):
        flush_to_disk(save / name)
    content = io.BytesIO()
    torch.save(checkpoint, content)
    replace_file(save / "latest.pth", content.getbuffer())


def replace_file(path, content):
    """Writes a file so that its name stands, at every instant, for the whole old content or the whole new one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(content)
        flush_to_disk(temporary)
        os.replace(temporary, path)
        flush_to_disk(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)  # on a full disk, room for what else is to be written
        raise OSError(error.errno, error.strerror, str(path)) from error


def flush_to_disk(path):
    """What was written to a file, or the names in a folder, is on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

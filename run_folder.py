"""The folder of a run: its lock, args.json, train.csv, test.csv and figures; how a run is begun and resumed.

Rows of the CSVs reach the disk before the checkpoint that they belong to. Those that are newer than it are cut off when the
run is resumed.
"""

import fcntl
import json
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

from checkpoint import flush_to_disk, load_checkpoint, replace_file, save_checkpoint
from data import IMAGE_SIZE

HERE = Path(__file__).resolve().parent
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


def read_arguments(save):
    """What args.json says of the run in the folder; nothing where there is none."""
    path = save / "args.json"
    return json.loads(path.read_text()) if path.exists() else {}


def image_size(args):
    """The size that a run's pictures get: --image-size, or that of the net of --init, or the usual one.

    None, which is as pictures were read then, for a run that was begun before there was a choice and is now resumed.
    """
    begun = read_arguments(args.save) if args.resume else {}
    if begun and begun.get("image_size") is None:
        if args.image_size:
            raise ValueError(f"{args.save} was begun without --image-size {args.image_size}: resume it with the same arguments")
        return None
    init = load_checkpoint(Path(args.init))["args"] if args.init and args.dataset == "folder" else {}
    return args.image_size or init.get("image_size") or IMAGE_SIZE


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
    begun = read_arguments(save)
    if not begun:
        if checkpoint is None:
            return None
        raise ValueError(f"{save} holds a checkpoint and no args.json: put it back, or choose another --save")
    epochs_done = checkpoint["epoch"] if checkpoint else 0
    compare(begun, facts, epochs_done, unchanged)
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


def end_epoch(save, figures, checkpoint):
    """Adds the epoch's row to test.csv and replaces latest.pth, after the rows that belong to it have reached the disk."""
    append_rows(save / "test.csv", [(checkpoint["epoch"], *figures)])
    for name in ("train.csv", "test.csv"):
        flush_to_disk(save / name)
    save_checkpoint(checkpoint, save / "latest.pth")


class Figures:
    """Redraws a run's figures with plot.py in a process of its own, so that no epoch waits for them."""

    def __init__(self, save, enabled):
        self.command = [sys.executable, str(HERE / "plot.py"), str(save)]
        self.enabled = enabled
        self.process = None
        self.warned = False

    def redraw(self):
        """Starts drawing, unless the last drawing still goes on."""
        if self.enabled and (self.process is None or self.process.poll() is not None):
            self.check()
            self.process = subprocess.Popen(  # start_new_session: Ctrl-C is not meant for it
                self.command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
            )

    def finish(self):
        """Draws what the CSVs now hold and waits for it."""
        self.check()
        self.redraw()
        self.check()

    def check(self):
        """Waits for the drawing and says, the first time it fails, why there is no figure."""
        if self.process is not None:
            _, errors = self.process.communicate()
            if self.process.returncode and not self.warned:
                reason = errors.strip().splitlines() or [f"plot.py ended with status {self.process.returncode}"]
                tqdm.write(f"the figures could not be drawn, training goes on: {reason[-1]}")
                self.warned = True
            self.process = None


def git_commit():
    """The commit this code is at, with "-dirty" behind it if it was changed since; None without git."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None

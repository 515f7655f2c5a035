"""The folder of a run: its lock, args.json, train.csv, test.csv and figures; how a run is begun and resumed.

Rows of the CSVs reach the disk before the checkpoint that they belong to. Those that are newer than it are cut off when the
run is resumed.
"""

import contextlib
import errno
import json
import math
import subprocess
import sys
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

from checkpoint import check_fit, flush_to_disk, load_checkpoint, replace_file, save_checkpoint
from endings import Refused, naming, say

HERE = Path(__file__).resolve().parent
FILES = ["args.json", "train.csv", "test.csv", "latest.pth", "latest.pth.tmp", "loss.png", "error.png", "loss-error.png"]

# What args.json holds that does not change what a run computes; all else must be the same when it is resumed.
FREE = {"data", "device", "compile", "efficient", "deterministic", "save", "resume", "force", "plot"}
FREE |= {"epochs", "torch", "hardware", "commit"}  # epochs have a check of their own; the others are no arguments
REMEDY = "put back a whole one, replace the run with --force, or choose another --save"

MAX_EPOCHS = 10**7  # more than a run can have
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}


def refuse_to_replace(save, resume, force):
    """Refused if the folder holds a run and neither flag says what shall become of it."""
    if not (resume or force) and any((save / name).exists() for name in FILES):
        raise Refused(
            f"{save} already holds a run: continue it with --resume, replace it with --force, or choose another --save"
        )


@contextlib.contextmanager
def locked(save):
    """Within it no other process gets the lock of the folder, which is made. The lock dies with its holder.

    Refused if another process has it, or the folder cannot be written. Where the file system has no locks, the run goes on
    without one and says so; a file that stands for a lock would outlive a killed run, and block what resumes it.
    """
    try:
        save.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"--save {save} cannot be written ({error.strerror}): choose another folder") from error
    lock = FileLock(save / ".lock", blocking=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise Refused(f"another process is training in {save}: wait for it, or choose another --save") from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise Refused(f"{save / '.lock'} cannot be written ({error.strerror}): choose another --save") from error
        say(f"{save}: its file system has no locks; see to it that no other process trains there")
    try:
        yield
    finally:
        lock.release()


def continues(save, resume):
    """Whether there is a checkpoint for a run with --resume to go on from."""
    return resume and (save / "latest.pth").exists()


def read_arguments(save):
    """What args.json says of the run in the folder; nothing where there is none. Refused if it is damaged."""
    path = save / "args.json"
    if not path.exists():
        return {}
    try:
        facts = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise Refused(f"{path} is damaged ({error}): {REMEDY}") from error
    if not isinstance(facts, dict) or type(facts.get("epochs")) is not int or not 0 < facts["epochs"] <= MAX_EPOCHS:
        raise Refused(f"{path} is damaged or not from this program: {REMEDY}")
    return facts


def begin(save, facts, has_val):
    """Removes the files of a run that was there, and writes args.json and the CSVs with their header lines."""
    refuse_folders(save)
    for name in FILES:
        if not (save / name).is_dir():  # where a figure should be: drawing it will fail, and say so
            (save / name).unlink(missing_ok=True)
    replace_file(save / "args.json", encode(facts))
    for name, header in headers(has_val).items():
        replace_file(save / name, header.encode())


def headers(has_val):
    """{CSV: its first line}."""
    columns = "epoch,loss,error"
    return {"train.csv": f"{columns}\n", "test.csv": columns + ",val_loss,val_error" * has_val + "\n"}


def resume(save, facts, net, old_rates, new_rates):
    """The checkpoint of the run in the folder, its CSVs cut off behind it; None where there is none yet.

    The lists have the learning rate of each epoch, with the epochs the run was begun with and those it is to have now.
    Refused, and nothing is touched, if a file is missing or damaged or belongs to another net or other arguments.
    """
    refuse_folders(save)
    checkpoint = load_checkpoint(save / "latest.pth") if continues(save, True) else refuse_lost_checkpoint(save)
    begun = read_arguments(save)
    if not begun:
        if checkpoint is None:
            return None
        raise Refused(f"{save} holds a checkpoint and no args.json: put it back, or choose another --save")
    epochs_done = checkpoint["epoch"] if checkpoint else 0
    compare_arguments(begun, facts)
    if old_rates[:epochs_done] != new_rates[:epochs_done] or epochs_done > len(new_rates):
        changed = f"--epochs {len(new_rates)} instead of {len(old_rates)}"
        raise Refused(f"{changed} changes the schedule of the {epochs_done} epochs already done")
    if checkpoint:
        check_fit(checkpoint, net, save / "latest.pth")
        compare_arguments(checkpoint["args"], facts)
        steps = -(-facts["train_images"] // facts["batch_size"])
        for name, header in headers(facts["val"] > 0).items():
            check_rows(save / name, header, epochs_done, steps if name == "train.csv" else 1)
        replace_file(save / "args.json", encode(facts))
        for name in ("train.csv", "test.csv"):
            cut_rows(save / name, epochs_done)
    return checkpoint


def refuse_lost_checkpoint(save):
    """Refused if the CSVs go on behind the first epoch: a checkpoint was written at its end, and is gone."""
    for path in (save / "train.csv", save / "test.csv"):
        rows = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        if any(1 < epoch_of(row) < math.inf for row in rows):
            raise Refused(f"{save / 'latest.pth'} is missing, and {path} has rows of later epochs: {REMEDY}")


def refuse_folders(save):
    """Refused if there is a folder where a file of the run should be, but for the figures."""
    for name in FILES:
        if not name.endswith(".png") and (save / name).is_dir():
            raise Refused(f"{save / name} is a folder, and a run has a file there: remove it, or choose another --save")


def encode(facts):
    return (json.dumps(facts, indent=2) + "\n").encode()


def compare_arguments(old, new):
    """Refused, with the name of the first argument that would change the result of the run."""
    for name in old:
        if name in new and name not in FREE and old[name] != new[name]:
            raise Refused(f"the run was begun with {name} {old[name]} and not {new[name]}: resume it with the same arguments")


def check_rows(path, header, epochs_done, steps):
    """Refused unless a CSV has its header and all rows of the epochs that are done, `steps` for each."""
    try:
        found, *rows = rows_until(path, epochs_done)
    except OSError as error:
        raise Refused(f"{path} cannot be read ({error.strerror}): {REMEDY}") from error
    if found.decode(errors="replace") != header:
        raise Refused(f"{path} is damaged, it does not begin with {header.strip()}: {REMEDY}")
    expected = [epoch_text(epoch + step / steps) for epoch in range(epochs_done) for step in range(1, steps + 1)]
    whole = all(epoch_of(row, columns=header.count(",") + 1) < math.inf for row in rows)
    if not whole or [row.decode().split(",")[0] for row in rows] != expected:
        raise Refused(f"{path} is damaged, it has not the {steps} rows of each of the {epochs_done} epochs: {REMEDY}")


def rows_until(path, epochs_done):
    """The lines of a CSV: its header and the rows up to the end of epoch `epochs_done`, without what is no whole row."""
    header, *rows = path.read_bytes().splitlines(keepends=True) or [b""]
    return [header, *(row for row in rows if epoch_of(row) <= epochs_done)]


def epoch_of(row, columns=None):
    """The epoch of a CSV's row, of so many columns; infinity where it is no whole row of numbers."""
    try:
        values = [float(value) for value in row.decode().split(",")]
    except ValueError:
        return math.inf
    return values[0] if row.endswith(b"\n") and columns in (None, len(values)) else math.inf


def cut_rows(path, epochs_done):
    """Keeps the header and the rows up to the end of epoch `epochs_done` of a CSV whose last row may be half written."""
    replace_file(path, b"".join(rows_until(path, epochs_done)))


def append_rows(path, rows):
    """Adds rows, the epoch first, to a CSV."""
    lines = [",".join([epoch_text(epoch), *(f"{value:.6g}" for value in values)]) for epoch, *values in rows]
    with naming(path), path.open("a") as file:
        file.write("".join(f"{line}\n" for line in lines))


def epoch_text(epoch):
    return f"{epoch:.6f}".rstrip("0").rstrip(".")


def end_epoch(save, result, checkpoint):
    """Adds the epoch's row to test.csv and replaces latest.pth, after the rows that belong to it have reached the disk."""
    append_rows(save / "test.csv", [(checkpoint["epoch"], *result)])
    for name in ("train.csv", "test.csv"):
        flush_to_disk(save / name)
    save_checkpoint(checkpoint, save / "latest.pth")


class Plots:
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

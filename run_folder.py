"""The folder of a run: its lock, args.json, train.csv, test.csv and figures; how a run is begun and resumed.

Rows of the CSVs reach the disk before the checkpoint that they belong to; those that are newer are cut off by a resume.
"""

import contextlib
import errno
import json
import re
import subprocess
import sys
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

from checkpoint import as_json, encoded, fits, flush_to_disk, load_checkpoint, replace_file
from endings import HIGHEST, Refused, naming, say

HERE = Path(__file__).resolve().parent
FILES = ["args.json", "train.csv", "test.csv", "latest.pth", "latest.pth.tmp", "loss.png", "error.png", "loss-error.png"]

# What args.json holds that does not change what a run computes; all else must be the same when it is resumed.
FREE = {"data", "device", "compile", "efficient", "deterministic", "save", "resume", "force", "plot"}
FREE |= {"epochs", "torch", "hardware", "commit"}  # epochs have a check of their own; the others are no arguments
REMEDY = "put back a whole one, replace the run with --force, or choose another --save"

NUMBER = r"(-?\d[\d.e+-]*|-?inf|nan)"  # as append_rows writes it
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}


def refuse_to_replace(save, resume, force):
    """Refused if the folder holds a run and neither flag says what shall become of it."""
    if not (resume or force) and any((save / name).exists() for name in FILES):
        ways = "continue it with --resume, replace it with --force, or choose another --save"
        raise Refused(f"{save} already holds a run: {ways}")


@contextlib.contextmanager
def locked(save):
    """Within it no other process gets the lock of the folder, which is made. The lock dies with its holder.

    Where the file system has no locks, the run goes on without one. (A soft lock, a file, would outlive a killed run.)
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
    """What args.json says of the run in the folder; nothing where there is none."""
    path = save / "args.json"
    if not path.exists():
        return {}
    try:
        facts = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise Refused(f"{path} is damaged ({error}): {REMEDY}") from error
    epochs = facts.get("epochs") if isinstance(facts, dict) else None
    if type(epochs) is not int or not 1 <= epochs <= HIGHEST[int]:
        raise Refused(f"{path} is damaged or not from this program: {REMEDY}")
    return facts


def begin(save, facts):
    """Removes the files of a run that was there, and writes args.json and the CSVs with their header lines."""
    refuse_folders(save)
    for name in FILES:
        if not (save / name).is_dir():  # where a figure should be: drawing it will fail, and say so
            (save / name).unlink(missing_ok=True)
    replace_file(save / "args.json", as_json(facts))
    for name, header in headers(facts).items():
        replace_file(save / name, header.encode())


def headers(facts):
    """{CSV: its first line}."""
    columns = "epoch,loss,error"
    return {"train.csv": f"{columns}\n", "test.csv": columns + ",val_loss,val_error" * (facts["val"] > 0) + "\n"}


def resume(save, facts, net, old_rates, new_rates):
    """The checkpoint of the run in the folder, its CSVs cut off behind it; None where there is none yet.

    The lists have the learning rate of each epoch, with the epochs the run was begun with and those it is to have now.
    Refused, and nothing is touched, if a file is missing or damaged or belongs to another net or other arguments.
    """
    refuse_folders(save)
    begun = read_arguments(save)
    if not continues(save, resume=True):
        refuse_lost_checkpoint(save)
        compare_arguments(begun, facts)
        return None
    checkpoint = load_checkpoint(save / "latest.pth")
    if not begun:
        raise Refused(f"{save} holds a checkpoint and no args.json: put it back, or choose another --save")
    compare_arguments(begun, facts)
    compare_rates(old_rates, new_rates, checkpoint["epoch"])
    if not fits(checkpoint["net"], net) or not {"optimizer", "scaler"} <= checkpoint.keys():
        raise Refused(f"{save / 'latest.pth'} is not of this run, or of another version of this program: put back its own")
    compare_arguments(checkpoint["args"], facts)
    steps = {"train.csv": -(-facts["train_images"] // facts["batch_size"]), "test.csv": 1}
    rows = {name: rows_until(save / name, facts, checkpoint["epoch"], steps[name]) for name in steps}
    for name, content in {"args.json": as_json(facts), **rows}.items():
        replace_file(save / name, content)
    return checkpoint


def refuse_lost_checkpoint(save):
    """Refused if the CSVs go on behind the first epoch: a checkpoint was written at its end, and is gone."""
    for path in (save / "train.csv", save / "test.csv"):
        if path.exists() and re.search(rb"^(1\.|[2-9]|\d\d)", path.read_bytes(), re.MULTILINE):
            raise Refused(f"{save / 'latest.pth'} is missing, and {path} has rows of later epochs: {REMEDY}")


def refuse_folders(save):
    """Refused if there is a folder where a file of the run should be, but for the figures."""
    for name in FILES:
        if not name.endswith(".png") and (save / name).is_dir():
            raise Refused(f"{save / name} is a folder, and a run has a file there: remove it, or choose another --save")


def compare_arguments(old, new):
    """Refused, with the name of the first argument that would change the result of the run."""
    for name in old:
        if name in new and name not in FREE and old[name] != new[name]:
            raise Refused(f"the run was begun with {name} {old[name]} and not {new[name]}: resume it with the same arguments")


def compare_rates(old, new, epochs_done):
    """Refused if the epochs that are done had other learning rates than they have now, or are too many."""
    if old[:epochs_done] != new[:epochs_done] or epochs_done > len(new):
        changed = f"--epochs {len(new)} instead of {len(old)}"
        raise Refused(f"{changed} changes the schedule of the {epochs_done} epochs already done")


def rows_until(path, facts, epochs_done, steps):
    """The content of a CSV up to the last of `epochs_done` epochs of so many steps. Refused if it is not all there."""
    header = headers(facts)[path.name]
    expected = [epoch_text(epoch + step / steps) for epoch in range(epochs_done) for step in range(1, steps + 1)]
    try:
        lines = path.read_bytes().decode(errors="replace").splitlines(keepends=True)[: 1 + len(expected)]
    except OSError as error:
        raise Refused(f"{path} cannot be read ({error.strerror}): {REMEDY}") from error
    if lines[:1] != [header]:
        raise Refused(f"{path} is damaged, it does not begin with {header.strip()}: {REMEDY}")
    row = re.compile(NUMBER + f",{NUMBER}" * header.count(",") + "\n")
    if [line.split(",")[0] for line in lines[1:]] != expected or not all(map(row.fullmatch, lines[1:])):
        raise Refused(f"{path} is damaged, it has not the {steps} rows of each of the {epochs_done} epochs: {REMEDY}")
    return "".join(lines).encode()


def append_rows(path, rows):
    """Adds rows, the epoch first, to a CSV."""
    lines = [",".join([epoch_text(epoch), *(f"{value:.6g}" for value in values)]) + "\n" for epoch, *values in rows]
    with naming(path), path.open("a") as file:
        file.writelines(lines)


def epoch_text(epoch):
    return f"{epoch:.6f}".rstrip("0").rstrip(".")


def end_epoch(save, result, checkpoint):
    """Adds the epoch's row to test.csv and replaces latest.pth, after the rows that belong to it have reached the disk."""
    append_rows(save / "test.csv", [(checkpoint["epoch"], *result)])
    for name in ("train.csv", "test.csv"):
        flush_to_disk(save / name)
    replace_file(save / "latest.pth", encoded(checkpoint))


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
            self.wait()
            self.process = subprocess.Popen(  # start_new_session: Ctrl-C is not meant for it
                self.command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
            )

    def wait(self):
        """Waits for the drawing and says, the first time it fails, why there is no figure."""
        _, errors = self.process.communicate() if self.process else (None, "")
        if self.process and self.process.returncode and not self.warned:
            reason = errors.strip().splitlines() or [f"plot.py ended with status {self.process.returncode}"]
            say(f"the figures could not be drawn, training goes on: {reason[-1]}", write=tqdm.write)
            self.warned = True
        self.process = None


def git_commit():
    """The commit this code is at, with "-dirty" behind it if it was changed since; None without git."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None

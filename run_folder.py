"""The folder of a run: its lock, args.json, train.csv, test.csv and figures; how a run is begun and resumed.

CSV rows are on the disk before the checkpoint of their epoch; --resume removes newer rows.
"""

import contextlib
import csv
import errno
import functools
import hashlib
import itertools
import math
import os
import re
import subprocess
import sys
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

from checkpoint import encoded, fits, load_checkpoint, of_kinds, same_groups
from endings import DISK_ERRORS, Refused, naming, say
from files import PICTURE, THEN, as_json, flush_to_disk, read_json, refuse_foreign, replace_file, temporary_name

HERE = Path(__file__).resolve().parent
# Files that plot.py and evaluate.py write for a run, and a pattern that each contains: files without it are not replaced.
RESULTS = dict.fromkeys(["loss.png", "error.png", "loss-error.png", "confusion.png", "confusion-val.png"], PICTURE)
RESULTS |= dict.fromkeys(["confusion.csv", "confusion-val.csv"], rb"\Atrue,")
FILES = ["args.json", "train.csv", "test.csv", "latest.pth", "latest.pth.tmp", *RESULTS]

# Entries of args.json that may differ when a run is resumed; epochs have a check of their own.
MAY_CHANGE = {"data", "device", "compile", "capture", "efficient", "deterministic", "save", "resume", "force", "plot"}
MAY_CHANGE |= {"epochs", "torch", "hardware", "commit"}
REMEDY = "put back a whole one, replace the run with --force, or choose another --save"

NUMBER = r"(-?\d+(\.\d+)?(e[+-]\d+)?|-?inf|nan)"  # as append_rows writes it
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}  # errors of a file system without locks


def refuse_to_replace(save, resume, force):
    """Refused if `save` is not a folder, holds a run without --resume or --force, or holds files that are of no run."""
    if os.path.lexists(save) and not save.is_dir():  # a link to nothing, too
        raise Refused(f"--save {save} is not a folder: name that of a run, or a new one")
    refuse_foreign(save / "args.json", rb'"growth_rate"')
    found = [name for name in FILES if (save / name).exists()]
    if found and "args.json" not in found:  # the first file of a run, and the last that begin() removes
        raise Refused(f"{save} holds {found[0]} but no args.json: put it back, move the files away, or choose another --save")
    if found and not (resume or force):
        ways = "continue it with --resume, replace it with --force, or choose another --save"
        raise Refused(f"{save} already holds a run: {ways}")
    if not is_fresh(save, resume):
        return
    for name, pattern in RESULTS.items():
        refuse_foreign(save / name, pattern)
    if (save / "net.pth").exists():  # would be taken for the new run's
        raise Refused(f"{save} holds exported weights, net.pth: move them away, or choose another --save")


@contextlib.contextmanager
def locked(save):
    """Creates the folder and holds its lock until the process ends or dies; yields a context manager to write in.

    Where the file system has no locks, the run goes on without one: a lock that is a mere file would outlive a killed run.
    """
    path = save / ".lock"
    lock = FileLock(path, blocking=False, fallback_to_soft=False)
    try:
        save.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise Refused(f"another process is training in {save}: wait for it, or choose another --save") from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            status = 1 if error.errno in DISK_ERRORS else 2
            what = f"{path} cannot be locked" if os.path.lexists(path) else f"{save} cannot be a run's folder"
            raise Refused(f"{what} ({error.strerror}): fix this, or choose another --save", status) from error
        say(f"{save}: its file system has no locks: make sure that no other process trains there")
    try:
        yield functools.partial(unmoved, save, file_number(path))
    finally:
        lock.release()


@contextlib.contextmanager
def unmoved(save, number):
    """Refused if the folder is no longer the one that was locked: checked on entry, and if a file is missing inside."""
    refuse_moved(save, number)
    try:
        yield
    except FileNotFoundError:
        refuse_moved(save, number)
        raise


def refuse_moved(save, number):
    """Refused if the folder's lock is not the file with this number: the folder was moved, and may be another run's now."""
    if file_number(save / ".lock") != number:
        remedy = "resume the run where it is now, or start it again"
        raise Refused(f"{save} was moved or removed while the run was writing there: {remedy}", status=1)


def file_number(path):
    """What identifies a file even when another one takes its name; None if there is none."""
    with contextlib.suppress(FileNotFoundError):
        status = path.stat()
        return status.st_dev, status.st_ino
    return None


def is_fresh(save, resume):
    """Whether a run begins: without --resume, or without a checkpoint."""
    return not (resume and (save / "latest.pth").exists())


def read_arguments(save):
    """args.json of the run in the folder, or {}. The values of other flags are checked by flags.parse_args."""
    path = save / "args.json"
    if not path.exists():
        return {}
    facts = read_json(path, REMEDY)
    kinds = {"epochs": int, "digests": dict | None, "capture": bool | None, "efficient": bool | None}
    kinds |= dict.fromkeys(["data", "init_digest", "commit", "torch", "hardware"], str | None)
    if not (isinstance(facts, dict) and of_kinds(facts, kinds)):
        raise Refused(f"{path} is damaged or not from this program: {REMEDY}")
    return facts


def begin(save, facts):
    """Deletes an earlier run and writes args.json and empty CSVs. Refused, before that, if a folder is in a file's place."""
    for path in (save / name for name in FILES):
        if path.is_dir():
            raise Refused(f"{path} is a folder where a file is expected: remove it, or choose another --save")
    for name in reversed(FILES):  # args.json last: files of a run are never without it, or with another run's
        (save / name).unlink(missing_ok=True)
    replace_file(save / "args.json", as_json(facts))
    for name, header in headers(facts).items():
        replace_file(save / name, header.encode())


def headers(facts):
    """{CSV: its first line}."""
    val = ",val_loss,val_error" if facts["val"] else ""
    return {"train.csv": "epoch,loss,error\n", "test.csv": f"epoch,loss,error{val},train_loss,train_error,lr,seconds\n"}


def resume(save, old_args, facts, net, optimizer, rates):
    """Removes the CSV rows that are newer than the run's checkpoint, and returns the checkpoint; None if there is none yet.

    `old_args` is the args.json of the run, `facts` the new one (of which a complete run takes over only `epochs`), `rates` the
    learning rates of all epochs. Refused, before anything is changed, if a file is missing or damaged, or of another net or
    other arguments.
    """
    compare_arguments(old_args, facts)
    path = save / "latest.pth"
    if not path.exists():
        refuse_lost_checkpoint(save)
        return None
    checkpoint = load_checkpoint(path, REMEDY)
    compare_arguments(checkpoint["args"], facts)
    whole = {"optimizer", "scaler"} <= checkpoint.keys()
    if not (whole and fits(checkpoint["net"], net) and same_groups(checkpoint["optimizer"], optimizer)):
        raise Refused(f"{path} is from another run or version of this program: put back its own, or the code")
    steps = {"train.csv": math.ceil(facts["train_images"] / facts["batch_size"]), "test.csv": 1}
    files = {name: rows_until(save / name, facts, checkpoint["epoch"], count) for name, count in steps.items()}
    done = [row["lr"] for row in csv.DictReader(files["test.csv"].decode().splitlines())]
    compare_rates(done, rates, old_args.get("epochs", len(rates)))
    goes_on = checkpoint["epoch"] < facts["epochs"]
    arguments = facts | history(save, old_args, facts) if goes_on else old_args | {"epochs": facts["epochs"]}
    for name, content in {"args.json": as_json(arguments), **files}.items():
        if (save / name).read_bytes() != content:  # else it needs no room on a full disk
            replace_file(save / name, content)
    return checkpoint


def history(save, old_args, facts):
    """{fact: its values so far, one after the other} of versions and hardware; says which have changed."""
    values = {}
    for name in ("commit", "torch", "hardware"):
        values[name] = old_args.get(name)
        so_far, new = values[name] or "unknown", facts[name] or "unknown"
        last = so_far.split(THEN)[-1]
        if last != new:
            say(f"{save} continues with {name} {new}, not {last}; args.json keeps both")
            values[name] = f"{so_far}{THEN}{new}"
    return values


def last_row(path):
    """{column: text} of the last row of a CSV."""
    with path.open() as file:
        return [*csv.DictReader(file)][-1]


def refuse_lost_checkpoint(save):
    """Refused if the CSVs go beyond the first epoch: then a checkpoint has been lost; or if they are not of a run."""
    for path in (save / "train.csv", save / "test.csv"):
        refuse_foreign(path, rb"\Aepoch,loss,error")
        if path.exists() and re.search(rb"^(1\.|[2-9])", path.read_bytes(), re.MULTILINE):
            raise Refused(f"{save / 'latest.pth'} is missing, and {path} has rows of later epochs: {REMEDY}")


def compare_arguments(old, new):
    """Refused if the data differ, the net of --init, or arguments that change the result."""
    may_change = MAY_CHANGE | ({"init"} if old.get("init_digest") else set())
    changed = [name for name in old if name in new and name not in may_change and old[name] != new[name]]
    if "digests" in changed and {*changed} <= {"digests", "train_images", "classes"}:
        parts = " and ".join(part for part, digest in new["digests"].items() if (old["digests"] or {}).get(part) != digest)
        change = f"the images or labels of {parts} in {new['data']} are not those that the run was begun with"
        raise Refused(f"{change}, or another version reads them differently: put those back, or choose another --save")
    if changed == ["init_digest"]:
        change = f"the net in --init {new['init']} is not the one that the run was begun with"
        raise Refused(f"{change}: put that back, or choose another --save")
    if changed:
        changes = ", ".join(f"{name} {old[name]}, not {new[name]}" for name in changed if name != "digests")
        raise Refused(f"the run was begun with {changes}: resume it as it was begun, or choose another --save")


def compare_rates(done, rates, begun_epochs):
    """Refused if the finished epochs had other learning rates, in the texts `done`, or are more than --epochs."""
    go_on = "continue from its net with --init, in another --save"
    remedy = f"resume it with --epochs {begun_epochs}, or {go_on}"
    if len(done) > len(rates):
        raise Refused(f"--epochs {len(rates)} is less than the {len(done)} that are done: {remedy}")
    now = [old if rate is None else f"{rate:.6g}" for old, rate in zip(done, rates, strict=False)]
    if now != done and begun_epochs != len(rates):
        raise Refused(f"with --epochs {len(rates)} the epochs that are done would have had other learning rates: {remedy}")
    if now != done:
        code = f"put back the code that the run was begun with, or {go_on}"
        raise Refused(f"the epochs that are done had other learning rates than step.py gives now: {code}")


def rows_until(path, facts, epochs_done, steps):
    """The CSV's content up to `epochs_done` epochs of `steps` rows. Refused if rows are missing or damaged."""
    if not path.is_file():
        raise Refused(f"{path} is missing: {REMEDY}")
    header = headers(facts)[path.name]
    expected = [epoch_text(epoch + step / steps) for epoch in range(epochs_done) for step in range(1, steps + 1)]
    text = path.read_text(encoding="utf-8-sig", errors="replace")  # a spreadsheet may have changed how lines begin and end
    lines = text.splitlines(keepends=True)[: 1 + len(expected)]
    if lines[:1] != [header]:
        version = "damaged or from another version of this program"
        raise Refused(f"{path} is {version}, it does not begin with {header.strip()}: {REMEDY}")
    row = re.compile(NUMBER + f",{NUMBER}" * header.count(",") + "\n")
    for number, (line, epoch) in enumerate(itertools.zip_longest(lines[1:], expected, fillvalue=""), start=2):
        if line.split(",")[0] != epoch or not row.fullmatch(line):
            raise Refused(f"{path} is damaged, line {number} is {line.strip()!r} and not that of epoch {epoch}: {REMEDY}")
    return "".join(lines).encode()


def append_rows(path, rows):
    """Adds rows, the epoch first, to a CSV. ValueError if their columns are not those of its header."""
    lines = [",".join([epoch_text(epoch), *(f"{value:.6g}" for value in values)]) + "\n" for epoch, *values in rows]
    with naming(path), path.open("r+") as file:  # not "a", which would recreate a removed file
        header = file.readline().rstrip("\n")
        if any(line.count(",") != header.count(",") for line in lines):
            raise ValueError(f"a row of {path.name} does not have the columns {header}: see headers()")
        file.seek(0, os.SEEK_END)
        file.writelines(lines)


def epoch_text(epoch):
    return f"{epoch:.6f}".rstrip("0").rstrip(".")


def end_epoch(save, result, checkpoint):
    """Adds the epoch's row to test.csv and replaces latest.pth, after the rows that belong to it have reached the disk."""
    append_rows(save / "test.csv", [(checkpoint["epoch"], *result)])
    for name in ("train.csv", "test.csv"):
        flush_to_disk(save / name)
    write_checkpoint(save, checkpoint)


def write_checkpoint(save, checkpoint):
    replace_file(save / "latest.pth", encoded(checkpoint))


class Plots:
    """Draws a run's figures in the background, by plot.py, with what time training leaves it."""

    def __init__(self, save, enabled):
        self.save = save
        self.command = [sys.executable, str(HERE / "plot.py"), "--", str(save)]
        self.enabled = enabled
        self.process = None
        self.warned = False

    def redraw(self, niceness=19):
        """Starts plot.py, unless it is still running."""
        if self.enabled and (self.process is None or self.process.poll() is not None):
            self.wait()
            options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "errors": "replace"}
            try:  # in a process group of its own, which Ctrl-C does not reach; Linux shares time evenly between sessions
                self.process = subprocess.Popen(self.command, **options, process_group=0)
            except OSError as error:  # no memory or process left, for instance
                self.report(error.strerror)
                return
            with contextlib.suppress(OSError):  # some containers forbid it
                os.setpriority(os.PRIO_PROCESS, self.process.pid, niceness)

    def finish(self):
        """Draws the final state, no longer yielding to anybody, and waits for that."""
        if self.process and self.process.poll() is None:  # on a busy machine it could take minutes
            self.process.kill()
            self.process.communicate()
            for path in self.save.glob(temporary_name("*", self.process.pid)):
                path.unlink()
            self.process = None
        self.redraw(niceness=os.getpriority(os.PRIO_PROCESS, 0))
        self.wait()

    def wait(self):
        """Waits for plot.py; its first failure is reported."""
        if self.process is None:
            return
        _, errors = self.process.communicate()
        if self.process.returncode:
            reasons = [line for line in errors.splitlines() if "this is a bug" not in line]
            self.report(reasons[-1] if reasons else f"plot.py ended with status {self.process.returncode}")
        self.process = None

    def report(self, reason):
        """Says, the first time, why there is no figure."""
        if not self.warned:
            say(f"the figures could not be drawn, nothing else is affected: {reason}", write=tqdm.write)
        self.warned = True


def git_commit():
    """The commit of this code, then "-dirty-" and a digest of uncommitted changes; None outside its own repository."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # as hooks of another one set
    run = functools.partial(subprocess.run, env=own, capture_output=True, check=True)
    git = ["git", "-C", str(HERE), "-c", f"safe.directory={HERE}"]  # also where it is another user's
    try:
        top = os.fsdecode(run([*git, "rev-parse", "--show-toplevel"]).stdout).strip()
        if Path(top) != HERE:
            return None
        commit = run([*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]).stdout.decode().strip()
        if not commit.endswith("-dirty"):
            return commit
        changes = run([*git, "diff", "--no-ext-diff", "--no-textconv", "--binary", "HEAD"]).stdout
        return f"{commit}-{hashlib.blake2b(changes, digest_size=4).hexdigest()}"
    except (OSError, subprocess.CalledProcessError):
        return None

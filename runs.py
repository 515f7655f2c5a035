"""What plot.py and compare.py read of runs of train.py: CSVs, args.json, and which runs are seeds of one setting."""

import itertools
import json
import math
import os
import re

import pandas as pd

from endings import Refused, in_one_line, say
from files import THEN, read_json

COLUMNS = ["epoch", "loss", "error"]
# Entries of args.json that are not settings.
STARTED = {"data", "save", "resume", "force", "plot", "classes", "digests"}  # where a run lies and how it was started
STARTED |= {"train_images"}  # it follows from others, and older runs lack it
CHECKED = (None, "cifar10", "cifar100", "svhn", "digits")  # the data sets that are always the same; older runs name none
PLACES = {"digests": "data", "init_digest": "init"}  # a digest, and the argument that says where its content lies
MACHINE = {"device", "compile", "capture", "efficient", "deterministic", "torch", "hardware", "commit"}  # what it ran on


def name_runs(folders):
    """{label: folder}; a label is the path from the folder that holds all. Refused if one is named twice.

    What holds no run, such as a waiting job's folder or a file, is reported and left out, unless there is nothing else.
    """
    begun = [folder for folder in folders if not folder.exists() or (folder / "test.csv").exists()] or folders
    for folder in folders:
        if folder not in begun:
            say(f"{folder} holds no run (no test.csv) and is left out")
    paths = [folder.resolve() for folder in begun]
    twice = next((path for path in paths if paths.count(path) > 1), None)
    if twice:
        raise Refused(f"{twice} is named twice: name each run once")
    common = os.path.commonpath([path.parent for path in paths])
    return {str(path.relative_to(common)): path for path in paths}


def read_csv(path):
    """The rows of a CSV, without a half-written last one. Refused if it is missing or not from train.py."""
    refuse_missing(path)
    header, *lines = path.read_text(encoding="utf-8-sig", errors="replace").split("\n")[:-1] or [",".join(COLUMNS)]
    columns = header.split(",")
    if columns[:3] != COLUMNS or len(set(columns)) < len(columns):
        raise Refused(f"{path} has no columns {', '.join(COLUMNS)}: it was not written by train.py")
    return whole_rows(lines, columns, path)


def refuse_missing(path):
    """Refused if a file of a run is not there."""
    if not path.exists():
        raise Refused(f"{path} does not exist: put it back, or name a run that has it")


def whole_rows(lines, columns, path):
    """The lines with a number in each column, finite ones in COLUMNS, and a later epoch than before; others are reported."""
    rows, damaged, epoch = [], [], 0
    for number, line in enumerate(lines, start=2):
        try:
            row = [*map(float, line.split(","))]
        except ValueError:
            row = []
        finite = all(map(math.isfinite, row[: len(COLUMNS)]))  # the others may have gaps, as one that somebody has added
        if len(row) == len(columns) and row[0] > epoch and finite:
            rows.append(row)
            epoch = row[0]
        else:
            damaged.append(f"line {number} ({line[:40]!r})")
    if damaged and not rows:
        raise Refused(f"{path} is damaged, {damaged[0]} is no row of {len(columns)} numbers: put back a whole one")
    if damaged:
        more = f" and {len(damaged) - 1} more are" if damaged[1:] else " is"
        say(f"{path}: {damaged[0]}{more} left out: damaged, or of a run that diverged")
    return pd.DataFrame(rows, columns=columns, dtype=float)


def arguments_of(folder):
    """args.json of a run. Refused if it is missing or damaged."""
    path = folder / "args.json"
    remedy = "put back a whole one, or leave out this run"
    refuse_missing(path)
    arguments = read_json(path, remedy)
    count = (int, type(None))
    kinds = {"epochs": (int,), "seed": (int,), "train_images": count, "batch_size": count, "dataset": (str, type(None))}
    if not isinstance(arguments, dict) or any(type(arguments.get(name)) not in kinds[name] for name in kinds):
        raise Refused(f"{path} is damaged or not from train.py: {remedy}")
    return {"processes": 1} | arguments  # older runs lack it


def settings(folders):
    """[(what distinguishes a setting, its arguments, {folder: the run's arguments})]; the runs of a setting differ by seed.

    Machine and versions are part of a setting only if it would otherwise have two runs with one seed; elsewhere differences are
    reported. Refused if two runs are still alike.
    """
    runs = {folder: arguments_of(folder) for folder in folders}
    groups = []
    for common, members in group(runs, STARTED | MACHINE):
        groups += group(members, STARTED) if same_seed(members) else [(common, members)]
    for _, members in groups:
        if twins := same_seed(members):
            raise Refused(f"{twins[0]} and {twins[1]} have the same arguments and the same seed: name one of them")
        if differ := mixed(members.values()):
            what = "was resumed with another" if len(members) == 1 else "and the other seeds of its setting differ in"
            say(f"{next(iter(members))} {what} {', '.join(sorted(differ))}")
    names = dict.fromkeys(name for common, _ in groups for name in common)
    rows = [{name: shared(name, members.values()) for name in [*names, *PLACES.values()]} for _, members in groups]
    differing = [name for name in names if len({json.dumps(row[name]) for row in rows}) > 1]
    differing = [PLACES[name] if name in PLACES and named_by_place(rows, name) else name for name in differing]
    return [({name: row[name] for name in differing}, *setting) for row, setting in zip(rows, groups, strict=True)]


def mixed(runs):
    """The facts of machine and version in which the runs differ, or a run by itself does, since it was resumed elsewhere."""
    values = {name: shared(name, runs) for name in MACHINE - {"device"}}
    return {name for name, value in values.items() if value == "various" or THEN in str(value)}


def shared(name, runs):
    """The value that an argument has in all of the runs, or "various"."""
    values = [arguments.get(name) for arguments in runs]
    return values[0] if all(value == values[0] for value in values) else "various"


def named_by_place(rows, name):
    """Whether the settings' digests of this name differ exactly where their places do: a path then says more than a digest."""
    digests, places = [json.dumps(row[name]) for row in rows], [str(row[PLACES[name]]) for row in rows]
    pairs = {*zip(digests, places, strict=True)}
    return "various" not in places and len(pairs) == len({*digests}) == len({*places})


def group(runs, ignored):
    """[(common arguments, {folder: its arguments})]: runs of a group differ in `seed` and `ignored` only; null means absent."""
    groups = {}
    for folder, arguments in runs.items():
        checked = arguments.get("dataset") in CHECKED  # else two folders of pictures, say, are two data sets
        names = arguments.keys() - ignored - {"seed"}
        names = names - {"image_size"} if checked else names | {"digests"}
        names -= {"init"} if arguments.get("init_digest") else set()
        common = {name: value for name, value in arguments.items() if name in names and value is not None}
        groups.setdefault(json.dumps(common, sort_keys=True), (common, {}))[1][folder] = arguments
    return [*groups.values()]


def same_seed(runs):
    """Two of the folders in {folder: arguments} whose runs have the same seed, or None."""
    pairs = itertools.combinations(runs, 2)
    return next((pair for pair in pairs if runs[pair[0]]["seed"] == runs[pair[1]]["seed"]), None)


def in_words(value):
    """The value of an argument as text; digests and commits are shortened."""
    if isinstance(value, dict):
        return " ".join(f"{part} {str(digest)[:6]}" for part, digest in value.items())
    if value is None or isinstance(value, bool):
        return {None: "not given", True: "yes", False: "no"}[value]
    return re.sub(r"\b([0-9a-f]{10})[0-9a-f]{30}\b", r"\1", in_one_line(str(value)))

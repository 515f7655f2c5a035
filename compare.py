#!/usr/bin/env python3
"""A table of the settings that several runs were trained with: the errors after their last epoch, over the seeds.

    ./compare.py work/sgd-1 work/sgd-2 work/adam-1 work/adam-2
    ./compare.py work/sgd-* work/adam-* --csv table.csv --markdown table.md --latex table.tex

Runs that differ in --seed only are one setting; n is their number. An error is in percent, mean and sample standard deviation
(lowest to highest). A run that has not reached its last epoch is reported and left out. Differences of machine or version are
reported; then images/s (of training, without the test) is left out, unless only the commit differs. With images held out by
--val, the settings of each data set (column dataset or data) are sorted by their error.
"""

import math
from pathlib import Path

import pandas as pd

from endings import handle_errors, in_one_line, make_parser, new_file, nonempty, say
from files import refuse_existing, write_text
from runs import in_words, mixed, name_runs, read_csv, settings

STATISTICS = ("mean", "std", "min", "max")
ERRORS = {"test_error": "error", "val_error": "val_error"}  # name here: column of test.csv
LATEX = {letter: f"\\{letter}" for letter in "&%$#_{}"} | {"\\": "\\textbackslash{}", "±": "$\\pm$"}
LATEX = str.maketrans(LATEX | {"~": "\\textasciitilde{}", "^": "\\textasciicircum{}"})


def main():
    parser = build_parser()
    args = parser.parse_args()
    with handle_errors(parser, "the table", "fewer runs"):
        refuse_existing(args.csv, args.markdown, args.latex)
        rows = [summary(*setting) for setting in settings(name_runs(args.runs).values())]
        if len(rows) > 1 and any("val_error_mean" in row for row in rows):
            rows.sort(key=lambda row: (str(row.get("dataset")), str(row.get("data")), row.get("val_error_mean", math.inf)))
            say("sorted by the error on the validation images: a setting must not be chosen by its test error")
        table = in_short(rows)
        say(*table.to_string(index=False).split("\n"))
        numbers = pd.DataFrame([*map(escaped, rows)], dtype=object).to_csv(index=False)
        for path, text in [(args.csv, numbers), (args.markdown, markdown(table)), (args.latex, latex(table))]:
            if path:
                write_text(path, text)


def build_parser():
    parser = make_parser(__doc__, "%(prog)s DIR [DIR ...] [options], which --help lists")
    parser.add_argument("runs", nargs="+", type=nonempty(Path), metavar="DIR", help="folder of a run")
    for kind, what in [("csv", "the numbers"), ("markdown", "the table"), ("latex", "the table")]:
        parser.add_argument(f"--{kind}", type=new_file, metavar="FILE", help=f"write {what} to FILE, too")
    return parser


def summary(differences, arguments, runs):
    """The numbers of a setting, over its complete runs; the others are counted and reported."""
    tables = {folder: read_csv(folder / "test.csv") for folder in runs}
    epochs = {folder: int(table["epoch"].max()) if len(table) else 0 for folder, table in tables.items()}
    for folder, done in epochs.items():
        if done != arguments["epochs"]:
            say(f"{folder} has {done} of {arguments['epochs']} epochs and is not averaged")
    complete = [tables[folder] for folder in runs if epochs[folder] == arguments["epochs"]]
    row = {**differences, "epochs": arguments["epochs"], "n": len(complete), "incomplete": len(runs) - len(complete)}
    for name, column in ERRORS.items():
        last = pd.Series([table[column].iloc[-1] for table in complete if column in table], dtype=float)
        row |= {f"{name}_{statistic}": last.agg(statistic) for statistic in STATISTICS if len(last)}
    if mixed(runs.values()) - {"commit"}:
        return row
    counts = (run.get("train_images") for run in runs.values())  # which older runs lack
    return row | images_per_second(next(filter(None, counts), None), complete)


def images_per_second(train_images, tables):
    """{"images_per_second": over all runs with times}, or {} if there are none."""
    timed = pd.concat([table["seconds"].dropna() for table in tables if "seconds" in table] or [pd.Series(dtype=float)])
    return {"images_per_second": train_images * len(timed) / timed.sum()} if train_images and timed.sum() else {}


def escaped(row):
    """The row with control characters in its texts escaped: a carriage return would break it, see evaluate.predictions."""
    return {name: in_one_line(value) if isinstance(value, str) else value for name, value in row.items()}


def in_short(rows):
    """The table as it is read: an error is one cell, and columns that say nothing are left out."""
    hidden = {"images_per_second", *(f"{name}_{statistic}" for name in ERRORS for statistic in STATISTICS)}
    hidden |= set() if any(row["incomplete"] for row in rows) else {"incomplete"}
    table = pd.DataFrame([{name: in_words(value) for name, value in row.items() if name not in hidden} for row in rows])
    for name in ERRORS:
        if any(f"{name}_mean" in row for row in rows):
            table[f"{name.replace('_', ' ')}, %"] = [error_in_short(name, row) for row in rows]
    table["images/s"] = [f"{row['images_per_second']:.0f}" if "images_per_second" in row else "-" for row in rows]
    return table


def error_in_short(name, row):
    """Mean ± standard deviation (lowest to highest); of one run, its error alone."""
    if f"{name}_mean" not in row:
        return "-"
    mean, std, low, high = (row[f"{name}_{statistic}"] for statistic in STATISTICS)
    return f"{mean:.2f} ± {std:.2f} ({low:.2f} to {high:.2f})" if row["n"] > 1 else f"{mean:.2f}"


def markdown(table):
    lines = [table.columns, ["---"] * len(table.columns), *table.to_numpy()]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def latex(table):
    """A tabular that needs no package."""
    rows = [table.columns, *table.to_numpy()]
    header, *lines = (" & ".join(cell.translate(LATEX) for cell in row) + " \\\\\n" for row in rows)
    body = f"\\hline\n{header}\\hline\n{''.join(lines)}\\hline\n"
    return f"\\begin{{tabular}}{{{'l' * len(table.columns)}}}\n{body}\\end{{tabular}}\n"


if __name__ == "__main__":
    main()

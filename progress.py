"""Progress: a bar on a terminal; elsewhere, as in a log file, a line every few minutes.

for batch in progress(batches, desc="test images"):
"""

import os
import sys
import time

from tqdm import tqdm

from endings import say

LOG_SECONDS = 120
LOG_LINE = "{desc}: {n_fmt} of {total_fmt}{unit}, {rate_fmt}{postfix}, {remaining} left"


class Log:
    """A file for tqdm that prints lines in place of a bar."""

    def write(self, text):
        if text.strip():
            say(text.strip())


def on_terminal():
    """Whether there is a terminal that can show a bar: some have a height or a width of 0."""
    return sys.stderr.isatty() and all(os.get_terminal_size(sys.stderr.fileno()))


class Bar(tqdm):
    """Checks the clock in each update, so that tqdm needs no monitor thread."""

    monitor_interval = 0
    _time = property(lambda self: time.monotonic, lambda self, wall_clock: None)  # a clock set back would stop the bar


def progress(iterable=None, shown=True, **options):
    """tqdm with its options; on a terminal, the bar disappears at the end."""
    if not on_terminal():
        options |= {"file": Log(), "bar_format": LOG_LINE, "position": 0, "delay": LOG_SECONDS, "mininterval": LOG_SECONDS}
    return Bar(iterable, disable=not shown, miniters=1, leave=False, dynamic_ncols=True, **options)

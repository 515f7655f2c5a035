"""Signals that end a run: the first one after the step that is under way, a second one at once; and how to go on then."""

import shlex
import signal
import sys


class Stopped(Exception):
    """The run ends on a signal; status is what a shell expects of a program that the signal ended."""

    def __init__(self, signum):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.status = 128 + signum


def resume_command(world):
    if world.size > 1:
        return "the same torchrun command with --resume"
    return shlex.join([word for word in sys.orig_argv if word not in ("--resume", "--force")] + ["--resume"])


class StopSignals:
    """Notes the first SIGINT or SIGTERM, for the training loop to see; a second one ends the program at once."""

    def __init__(self):
        self.received = 0
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self.handle)

    def handle(self, signum, frame):
        self.received = signum
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)

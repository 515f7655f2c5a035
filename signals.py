"""Signals that end a run: the first one after the step that is under way, a second one at once; and how to go on then."""

import os
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
    """Notes the first SIGINT, SIGTERM or SIGHUP, for the training loop to see; a second one ends the program at once.

    SIGHUP, a closed terminal, is left alone under nohup; and it is no second one, for the system and the shell both send it.
    """

    def __init__(self):
        self.received = 0
        self.terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
                signal.signal(signum, self.handle)

    def handle(self, signum, frame):
        self.received = signum
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        for descriptor in self.terminals:
            if not os.isatty(descriptor):  # it was closed: what is said there now would be an error
                silence(descriptor)


def silence(descriptor):
    """What is written there from now on is dropped."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)

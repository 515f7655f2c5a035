"""Processes that need not import PyTorch: a server, itself a process, has done so, and forks one for each command.

    python = Server()
    done = python.start(["train.py", "--depth", "41"])  # as `python train.py --depth 41` does, from the project's folder
    done.wait(); done.returncode, done.stdout, done.stderr

Real processes with their own arguments, environment, folder, descriptors, signals and exit status; only the import is shared.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODULES = ["train", "evaluate", "plot", "compare", "make_graph", "sklearn.datasets", "sklearn.model_selection", "digits"]


class Forked:
    """A server that listens at this address, an abstract one."""

    def __init__(self, address):
        self.address = address

    def start(self, command, cwd=ROOT, env=None, stdout=None, stderr=None, stdin=None, more=()):
        """A process of `python COMMAND`; its streams are files, or the descriptors given; more of these are 100, 101, ...."""
        return Process(self.address, [*map(str, command)], str(cwd), dict(env or os.environ), [stdin, stdout, stderr], more)


class Server(Forked):
    """Starts a server, which imports these modules, those of tests/ among them, and lives until this process ends."""

    def __init__(self, modules=MODULES):
        alive, self.alive = os.pipe()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind("")  # the system chooses
            listener.listen()
            super().__init__(listener.getsockname()[1:].decode())
            command = [sys.executable, __file__, str(listener.fileno()), str(alive), *modules]
            inherited = {"pass_fds": [listener.fileno(), alive], "start_new_session": True}
            self.process = subprocess.Popen(command, cwd=ROOT, **inherited)
        os.close(alive)

    def stop(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.alive)


class Process:
    def __init__(self, address, command, cwd, env, streams, more):
        self.files = [tempfile.TemporaryFile() for _ in streams]  # noqa: SIM115
        given = [file.fileno() if each is None else each for each, file in zip(streams, self.files, strict=True)]
        ours, theirs = os.pipe()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
            server.connect(f"\0{address}")
            socket.send_fds(server, [json.dumps([command, cwd, env]).encode()], [theirs, *given, *more])
        os.close(theirs)
        self.status = os.fdopen(ours)
        self.pid = int(self.status.readline())

    def send_signal(self, signum):
        os.kill(self.pid, signum)

    def wait(self, timeout=300):
        assert select.select([self.status], [], [], timeout)[0], "the process does not end"
        self.returncode = int(self.status.readline())
        for file in self.files:
            file.seek(0)
        _, self.stdout, self.stderr = (file.read().decode() for file in self.files)
        return self


def serve(listener, alive):
    """Returns, in a process that it has forked, the command which that is to run."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        ready, _, _ = select.select([listener, alive], [], [])
        if alive in ready:
            os._exit(0)
        with listener.accept()[0] as request:
            message, (status, *descriptors), _, _ = socket.recv_fds(request, 1 << 20, 20)
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            if pid := os.fork():
                report(status, pid, descriptors)
            listener.close()
            os.close(alive)
            os.close(status)
            command, *circumstances = json.loads(message)
            prepare(command, *circumstances, descriptors)
            return command
        for descriptor in (status, *descriptors):
            os.close(descriptor)


def report(status, pid, descriptors):
    """Tells the number of a process, and then its exit status."""
    for descriptor in descriptors:
        os.close(descriptor)
    os.write(status, f"{pid}\n".encode())
    os.write(status, f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n".encode())
    os._exit(0)


def prepare(command, folder, environment, descriptors):
    """Makes this process that of the command; its first descriptors are 0, 1 and 2, the others 100, 101, ...."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, descriptor in zip([0, 1, 2, *range(100, 117)], descriptors, strict=False):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    sys.orig_argv, sys.argv = [sys.executable, *command], command
    sys.path[0] = "" if command[0] == "-c" else str(Path(command[0]).resolve().parent)


def execute(command):
    """Runs the command, and leaves at once; what ends by Ctrl-C, or by an exit with a sentence, ends as Python ends it."""
    status = 0
    try:
        if command[0] == "-c":
            exec(compile(command.pop(1), "<string>", "exec"), {"__name__": "__main__"})
        else:
            runpy.run_path(command[0], run_name="__main__")
    except SystemExit as stop:
        if type(stop.code) is not int:
            raise
        status = stop.code
    except Exception:
        sys.excepthook(*sys.exc_info())
        status = 1
    leave(status)


def leave(status):
    """Ends the process as Python does, but does not free what the server has imported: that takes longer than many a test."""
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if stream and not stream.closed:
            stream.flush()
    os._exit(status)


if __name__ == "__main__":
    listener, alive, *modules = sys.argv[1:]
    sys.path.insert(0, str(ROOT))
    gc.disable()  # it would go through all that is imported, again and again
    for module in modules:
        importlib.import_module(module)
    if "digits" in modules:
        sys.modules["digits"].read_ahead()
    gc.enable()
    gc.freeze()
    execute(serve(socket.socket(fileno=int(listener)), int(alive)))

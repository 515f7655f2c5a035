import contextlib
import gc
import os
import pty
import signal
import sys
import termios
from pathlib import Path

import pytest
from filelock import FileLock
from forked import Forked, Server
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--dataset", "digits", "--depth", "10", "--growth-rate", "2", "--limit", "96", "--device", "cpu"]
TINY_RUN = [*TINY, "--epochs", "2", "--batch-size", "40"]


def pytest_configure(config):
    """PyTorch is imported later: it reads OMP_NUM_THREADS then, and the process that hands out the tests does not need it."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # two runs have the same bits where they have as many threads
    for signum in (signal.SIGINT, signal.SIGHUP):  # a background job ignores them, and so would all it starts
        if signal.getsignal(signum) == signal.SIG_IGN:
            signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
    if config.option.markexpr == "gpu":
        import torch

        if not torch.cuda.is_available():
            pytest.exit("this machine has no GPU that PyTorch can use: nothing is tested", returncode=0)
    elif getattr(config.option, "numprocesses", None):  # for all processes that run tests
        config.server = Server()
        os.environ["FORK_SERVER"] = config.server.address


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What is imported stays: the garbage collector need not go through it, meanwhile, in its later turns or at the end."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


def pytest_unconfigure(config):
    if hasattr(config, "server"):
        config.server.stop()


def read_terminal(master):
    """All that a pseudo-terminal shows until nobody has it open; closes it. Any single read may return a part of that."""
    shown = b""
    with contextlib.suppress(OSError):  # the end of a terminal is an input/output error
        while chunk := os.read(master, 65536):
            shown += chunk
    os.close(master)
    return shown


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="session")
def cifar():
    """Folder with the official CIFAR-10; tests that need it are skipped where it is not."""
    for folder in filter(None, [os.environ.get("DENSENET_DATA"), ROOT.parent / "shared" / "data"]):
        if Path(folder, "cifar-10-batches-py").is_dir():
            return Path(folder)
    pytest.skip("CIFAR-10 is neither in $DENSENET_DATA nor in ../shared/data")


@pytest.fixture(scope="session", autouse=True)
def digits_are_cached():
    import digits  # noqa: F401


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Downloads fail at once, in this process and in those it starts: nothing listens on port 9."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")


@pytest.fixture
def call_main(monkeypatch, capsys, request):
    """Calls the main function of a script with arguments; returns (exit status, stdout, stderr). A bug is raised.

    Its figures are saved coarsely, which is faster, except in a test that is marked as one of `pixels`.
    """
    import torch
    from matplotlib.figure import Figure

    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    if "pixels" not in request.keywords:
        savefig = Figure.savefig
        monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **options: savefig(figure, *a, **options | {"dpi": 30}))

    def call(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, arguments)])
        try:
            module.main()
            status = 0
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    yield call
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def saved(monkeypatch):
    """The figures to be saved, for their curves and texts. Their files are empty; a test that needs their layout draws them."""
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *arguments, **options: figures.append(figure))
    return figures


@pytest.fixture(scope="session")
def forked():
    """Starts a process of Python that has imported the programs already, see forked.py."""
    if "FORK_SERVER" in os.environ:
        yield Forked(os.environ["FORK_SERVER"]).start
        return
    server = Server()
    yield server.start
    server.stop()


@pytest.fixture
def relay(forked):
    """Stands for `python` in a command that another program starts: a process is forked, and this one ends as that does."""
    code = f"""
import os, sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from forked import Forked
started = Forked({forked.__self__.address!r}).start(sys.argv[1:], cwd=os.getcwd(), stdout=1, stderr=2)
sys.exit(started.wait().returncode)
"""
    return [sys.executable, "-S", "-c", code]


@pytest.fixture
def run_script(forked):
    """Runs a script of the project in a process of its own; returns the completed process."""

    def run(name, *arguments, **options):
        return forked([ROOT / name, *arguments], **options).wait()

    return run


@pytest.fixture
def run_on_terminal(forked):
    """Runs a script on a real pseudo-terminal; returns what that has shown."""

    def run(*command):
        master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (40, 160))
        process = forked(command, stdin=slave, stdout=slave, stderr=slave)
        os.close(slave)
        shown = read_terminal(master)
        assert process.wait().returncode == 0
        return shown

    return run


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, forked):
    """Folder of a finished run of the real program: two epochs of a tiny net on 96 digits, with figures; for all to read.

    Processes that share out the tests have folders in one, and share the run, too.
    """
    base = tmp_path_factory.getbasetemp()
    save = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "tiny"
    with FileLock(save.with_suffix(".lock")):
        if not (save / "stdout").exists():
            done = forked(["train.py", *TINY_RUN, "--force", "--save", save]).wait()
            assert done.returncode == 0, done.stderr
            (save / "stdout").write_text(done.stdout)
    return save


@pytest.fixture
def pictures(tmp_path):
    """A folder data set: red and blue pictures of 40 x 50, six to train on and one to test of each class."""
    for part, count in [("train", 6), ("test", 1)]:
        for name, color in [("blue", (0, 0, 255)), ("red", (255, 0, 0))]:
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (40, 50), color).save(tmp_path / part / name / f"{i}.{'png' if i % 2 else 'jpg'}")
    return tmp_path


@pytest.fixture
def disk(monkeypatch, tmp_path):
    """What reaches the disk in tmp_path, in its order: ("flush", name, bytes it has then), ("replace", name, new name)."""
    events, fsync, replace = [], os.fsync, os.replace

    def flush(descriptor):
        status = os.fstat(descriptor)
        (path,) = (each for each in [tmp_path, *tmp_path.iterdir()] if each.stat().st_ino == status.st_ino)
        events.append(("flush", path.name, path.read_bytes() if path.is_file() else None))
        fsync(descriptor)

    def renamed(old, new):
        events.append(("replace", Path(old).name, Path(new).name))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", renamed)
    return events


@pytest.fixture
def put_back():
    """At the end of the test, the precision of products that was set before."""
    import torch

    switches = [(owner, owner.allow_tf32) for owner in (torch.backends.cudnn, torch.backends.cuda.matmul)]
    yield
    for owner, value in switches:
        owner.allow_tf32 = value

"""How the programs end: user errors as one sentence, bugs with a traceback; and signals.

    with handle_errors(parser, "batches of 64", "a smaller --batch-size") as ending:
        ...                                 # Refused("depth 11 does not fit: ...") ends the program with status 2
        ending.resume = resume_command(1)   # from here on most messages say how to resume

Exit status: 2 for a user error, 1 for a later failure or a bug, 128 + n for signal n (SIGPIPE: the output was closed).
"""

import argparse
import contextlib
import errno
import functools
import mmap
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

MAX_VALUE = {int: 10**7, float: 3.4e38}  # largest allowed values
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU)  # a cluster warns with the last two
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}  # the disk is full or failing: not a user error
LARGER = "a machine with more memory"
KEPT = "everything up to the last checkpoint is kept, and --resume continues from there"

# Out-of-memory messages of libraries that raise a plain RuntimeError.
OUT_OF_MEMORY = re.compile(
    r"DefaultCPUAllocator|not enough memory|out of memory|can(no|')t allocate memory|bad_alloc|"
    r"_ALLOC_FAILED|could not create a memory",
    re.IGNORECASE,
)
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")  # also line breaks and changes of direction


class Refused(Exception):
    """A user error (status 2), or a failure later on (status 1): one sentence with the bad value and the remedy."""

    def __init__(self, sentence, status=2):
        super().__init__(sentence)
        self.status = status


class Stopped(Exception):
    """A signal ends the run."""

    def __init__(self, signum):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.status = 128 + signum  # the exit status that a shell expects


@contextlib.contextmanager
def handle_errors(parser, needs, remedy):
    """Wraps a whole program: an error inside ends it with a sentence and an exit status, as described at the top of this file.

    If memory runs out, the sentence says what `needs` it, and the `remedy`. Yields a namespace; set its `resume` to the
    command that resumes, once the run has begun, and `silent` if another process says why all of them end. After an error
    it holds the exit `status`.
    """
    settle_streams()
    ending = argparse.Namespace(needs=needs, remedy=remedy, resume=None, silent=False, status=1)
    try:
        yield ending
        say()  # flushes: a closed output is an error here, not at exit
    except SystemExit as error:  # of the parser
        ending.status = error.code if isinstance(error.code, int) else 1
        raise
    except (Exception, KeyboardInterrupt) as error:
        status, sentence = status_and_message(error, ending)
        sentence = in_one_line(sentence)
        ending.status = status or 1
        if status is None:
            error.add_note(f"{parser.prog}: {sentence}")
            raise
        if ending.silent and isinstance(error, Refused | Stopped):
            parser.exit(status)
        if status == 2:
            parser.error(sentence)
        parser.exit(status, f"{parser.prog}: {sentence}\n")
    finally:
        silence_broken_streams()


def status_and_message(error, ending):
    """(exit status, message) of an exception; the status of a bug is None."""
    go_on = f"; this continues the run: {ending.resume}" if ending.resume else ""
    kept = f"; {KEPT}" if ending.resume else ""
    if out_of_memory(error):
        needs, remedy = getattr(error, "memory_for", (ending.needs, ending.remedy))
        return 1, f"memory ran out for {needs}: choose {remedy}{kept}"
    if lost_peer(error):
        return 1, f"another process of this run cannot be reached ({reason_of_loss(error)}), see its message{kept}"
    if no_thread_left(error):
        limits = "raise the limit (ulimit -u or -v, or the container's)"
        return 1, f"no further thread or process can be started here: {limits}{go_on}"
    if failed_compiler(error):
        reason = reason_of_compiler(error)
        return 1, f"torch.compile does not work here ({reason}): install what is missing, or choose --compile none{kept}"
    if isinstance(error, Refused):
        return error.status, str(error)
    if isinstance(error, Stopped):
        return error.status, f"{error}{go_on}"
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT, f"stopped{go_on}"
    if isinstance(error, BrokenPipeError):
        return 128 + signal.SIGPIPE, f"its output was closed{go_on}"
    if isinstance(error, OSError) and (error.filename is not None or error.errno in DISK_ERRORS):
        status = 1 if ending.resume or error.errno in DISK_ERRORS else 2
        return status, f"{error.filename or 'an output'}: {error.strerror}{remedy_for(error.errno, ending.resume)}{go_on}"
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):  # of Path.resolve() before Python 3.13
        return 2, f"{error}, a link to itself: name another place"
    return None, f"this is a bug{go_on}"


def remedy_for(number, resume):
    """The remedy for the system error of this number, to be appended to its message."""
    if number in (errno.ENOSPC, errno.EDQUOT):
        return ": make room there" + ", or name another place" * (not resume)
    limits = {errno.EFBIG: "file size limit (ulimit -f)", errno.EMFILE: "limit of open files (ulimit -n)"}
    if number in limits:
        return f": raise the {limits[number]}"
    if resume:
        return {errno.ENOENT: ": put back what is missing", errno.EACCES: ": make it writable"}.get(number, "")
    return ": fix this, or name another place" * (number not in DISK_ERRORS)


def out_of_memory(error):
    """Whether the error or one of its causes means out of memory, on a GPU or the host."""
    while error is not None:
        full = isinstance(error, OSError) and error.errno == errno.ENOMEM
        text = str(error) if isinstance(error, RuntimeError) else ""  # torch.OutOfMemoryError is one, too
        told = OUT_OF_MEMORY.search(text) or ("could not create a primitive" in text and memory_is_full())  # or another reason
        if full or told or isinstance(error, MemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False


def memory_is_full():
    """Whether this process cannot get another 16 MB from the system."""
    try:
        mmap.mmap(-1, 2**24).close()
    except OSError:
        return True
    return False


def lost_peer(error):
    """Whether this process failed because it cannot reach another one of the run, which is mostly because that has ended."""
    dist = sys.modules.get("torch.distributed")  # not imported here: plot.py needs no torch
    return dist is not None and isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or "gloo" in str(error))


def reason_of_loss(error):
    """What a message of torch.distributed says of the cause: NCCL's is last, and may be empty; frames of C++ and advice go."""
    text = str(error).partition("Exception raised from")[0].replace("Last error:", "").strip()
    return re.split(r"\. (?=[A-Z])", text.rpartition("\n")[2])[0] or type(error).__name__


def no_thread_left(error):
    """Whether the system started no thread or process for Python, a backward pass or torch.compile: too many run."""
    told = re.search("can't start new thread|Resource temporarily unavailable", str(error))
    return bool(told) and (isinstance(error, RuntimeError) or (isinstance(error, BlockingIOError) and error.filename is None))


def failed_compiler(error):
    """Whether torch.compile lacks a compiler, Triton or a GPU that fits, or a compiler failed, or its cache is not writable."""
    cause = getattr(error, "inner_exception", None)  # of its BackendCompilerFailed
    told = {type(error).__name__, type(cause).__name__} & {"CppCompileError", "TritonMissing", "GPUTooOldForTriton"}
    return bool(told) or isinstance(cause, OSError | subprocess.CalledProcessError) or "compiler" in str(cause).lower()


def reason_of_compiler(error):
    """A C++ compiler's first error, else the first line that says something."""
    lines = [line for line in str(error).splitlines() if not line.endswith("raised:")]
    return next((line for line in lines if " error: " in line), lines[0])


@contextlib.contextmanager
def memory_for(needs, remedy):
    """If memory runs out inside, the message has this `needs` and `remedy` instead of the program's."""
    try:
        yield
    except Exception as error:
        error.memory_for = needs, remedy
        raise


# A parser and its types: not in flags.py, which imports torch, because plot.py and compare.py do not need it.


def make_parser(text, usage=None, **options):
    """A parser whose --help shows the text, the docstring of a program, line by line."""
    layout = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=text, usage=usage, formatter_class=layout, **options)


def at_least(low, kind=int, high=None):
    """An argparse type: a number of type `kind` from low to high."""
    high = MAX_VALUE[kind] if high is None else high

    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            bound = f"{high} or less" if value > high else f"{low} or more"
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {bound}")
        return value

    parse.__name__ = kind.__name__  # argparse names it if the text is not a number
    return parse


def nonempty(kind):
    """An argparse type: the name of a file or a folder, as a str or a Path."""

    def parse(text):
        if not text:
            raise argparse.ArgumentTypeError("the name is empty: give one, or leave out the flag")
        return kind(text)

    return parse


def new_file(text):
    """An argparse type: the path of a file to write; the name of a folder is refused."""
    path = nonempty(Path)(text)
    if text.endswith("/") or path.name in ("", ".."):
        raise argparse.ArgumentTypeError(f"{text} is a folder: name a file in it")
    return path


@contextlib.contextmanager
def naming(path):
    """Adds the file's name to an OSError from inside: write errors lack it."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename = str(path)
        raise


def say(*lines, write=print):
    """Prints each line and flushes, so that a closed pipe or a full disk is an error at once."""
    with naming("standard output"):
        for line in lines:
            write(in_one_line(str(line)))
        sys.stdout.flush()


say_once = functools.cache(say)  # what was said is not said again


def in_one_line(text):
    """The text with control characters escaped, which names of files may have: a terminal would obey them."""
    return CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


def settle_streams():
    """Opens /dev/null for streams closed from the start (>&-); characters that a stream cannot encode are escaped."""
    for name, mode in [("stdin", "r"), ("stdout", "w"), ("stderr", "w")]:  # in the order of their descriptors
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has not
            stream.reconfigure(errors="backslashreplace")


def resume_command(num_processes):
    """The command that continues this run."""
    if num_processes > 1:
        return f"the same torchrun command with --resume{' in place of --force' * ('--force' in sys.orig_argv)}"
    words = [word for word in sys.orig_argv if word not in ("--resume", "--force")]
    return " ".join(map(shell_word, [*words, "--resume"]))


def shell_word(word):
    """The word quoted for a shell; where it cannot be printed, its bytes are escaped, $'work/\\xff'."""
    encoding = sys.stderr.encoding or "utf-8"
    if word.isprintable() and word == word.encode(encoding, "replace").decode(encoding):
        return shlex.quote(word)
    plain = (chr(byte) if 32 <= byte < 127 and byte not in b"'\\" else f"\\x{byte:02x}" for byte in os.fsencode(word))
    return f"$'{''.join(plain)}'"


class StopSignals:
    """Remembers the first of STOPPING for the training loop; a second SIGINT or SIGTERM ends the program at once.

    The others never count as a second signal: system and shell both send SIGHUP, and SIGXCPU comes every second. SIGHUP, a
    closed terminal, is ignored under nohup. Ctrl-C reaches compilers as well: after a signal their failure raises Stopped on
    leaving the `with`.
    """

    def __init__(self):
        self.received = 0
        self.terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
        for signum in STOPPING:
            if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
                signal.signal(signum, self.handle)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if self.received and failed_compiler(error):
            raise Stopped(self.received) from error

    def handle(self, signum, frame):
        self.received = signum
        for each in STOPPING:
            signal.signal(each, signal.SIG_DFL if each in (signal.SIGINT, signal.SIGTERM) else signal.SIG_IGN)
        for descriptor in self.terminals:
            if not os.isatty(descriptor):  # the terminal was closed: to write to it would be an error
                silence(descriptor)


def silence_broken_streams():
    """Discards output that stdout and stderr cannot write: Python would report it at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            silence(stream.fileno())


def silence(descriptor):
    """Redirects a file descriptor to /dev/null."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), descriptor)

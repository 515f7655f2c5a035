"""How a program ends that cannot go on: in one sentence that says the way out, with its exit status; a bug with its traceback.

Status 2 is for what was asked wrongly, 1 for what went wrong later, 128 and more for a signal or a reader that has left.
"""

import contextlib
import signal
import sys

from distributed import leave, lost_peer
from machine import out_of_memory, size_asked_for
from signals import Stopped, resume_command, silence

KEPT = "the last complete checkpoint is kept, --resume continues from it"


@contextlib.contextmanager
def before_training(parser, asked, remedy, trains=False):
    """Around what a program does before it trains, or, if it trains nothing, around all that it does.

    asked is what the memory is needed for, and remedy what needs less.
    """
    try:
        yield
        if sys.stdout is not None:  # None where it is closed from the beginning
            sys.stdout.flush()  # a reader that has left is noticed here, and not when the interpreter ends
    except KeyboardInterrupt:
        parser.exit(128 + signal.SIGINT, f"{parser.prog}: stopped" + " before the run began" * trains + "\n")
    except BrokenPipeError:
        exit_without_reader(f"{parser.prog}: nobody reads its output" + f"; {KEPT}" * trains)
    except Exception as error:
        exit_without_memory(parser.prog, error, asked, remedy)
        exit_without_peers(parser.prog, error)
        if isinstance(error, (ValueError, OSError)):
            parser.error(str(error))
        if trains:
            error.add_note(f"{parser.prog}: this is a bug; {KEPT}")
        raise
    finally:
        silence_broken_streams()


@contextlib.contextmanager
def training(program, world, asked, remedy):
    """Around the training, which ends with the status that tells why, and says how to go on."""
    try:
        yield
    except Stopped as stopped:
        if world.rank == 0:
            tell(f"{stopped}; this continues the run: {resume_command(world)}", sys.stdout, sys.stderr)
        sys.exit(stopped.status)
    except FloatingPointError as error:
        sys.exit(f"{program}: {error}")
    except BrokenPipeError:
        exit_without_reader(f"{program}: nobody reads its output; this continues the run: {resume_command(world)}")
    except Exception as error:
        exit_without_memory(program, error, asked, f"{remedy}; {KEPT}")
        exit_without_peers(program, error)
        if isinstance(error, OSError):
            sys.exit(f"{program}: {error}; {KEPT}")
        error.add_note(
            f"{program}: this is a bug; the last checkpoint is kept, and this continues the run: {resume_command(world)}"
        )
        raise
    finally:
        silence_broken_streams()
        leave(world)


def tell(sentence, *streams):
    """Prints it where the first of the streams takes it: Ctrl-C ends what reads a pipe, too."""
    for stream in streams:
        with contextlib.suppress(OSError):
            print(sentence, file=stream, flush=True)
            return


def exit_without_reader(sentence):
    """Ends the program as SIGPIPE would, but for a sentence."""
    tell(sentence, sys.stderr)
    sys.exit(128 + signal.SIGPIPE)


def exit_without_memory(program, error, asked, remedy):
    """Ends the program if it is memory that ran out."""
    found = out_of_memory(error)
    if found:
        sys.exit(f"{program}: memory ran out for {asked}{size_asked_for(found)}: choose {remedy}")


def exit_without_peers(program, error):
    """Ends the program if it waited for another process that is gone, whose own words say why."""
    if lost_peer(error):
        sys.exit(f"{program}: another process of this run has ended, see what it says; {KEPT}")


def silence_broken_streams():
    """Gives up what stdout and stderr hold and nobody takes, so that the interpreter does not complain of it at its end."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            silence(stream.fileno())

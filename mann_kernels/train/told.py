"""How a command ends where it cannot go on: with one sentence and a status, not with a traceback."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

import torch
import typer
from rich.console import Console

from mann_kernels._paths import PathError, reason_of
from mann_kernels.train.loop import Diverged
from mann_kernels.train.settings import MOST_SEED

#: Of the option --seed.
SEED = {"min": 0, "max": MOST_SEED}


@contextlib.contextmanager
def told(status: int = 2, interrupted: str = "stopped") -> Iterator[None]:
    """Within it, what the user can do something about ends the command with a sentence.

    Args:
        status: the exit status of a wrong argument, or of a path that does not hold what it should: 2 while everything is
            put in place, 1 once the work is under way. A run that diverges, and memory that is not there, have 1.
        interrupted: what is said on Ctrl-C, whose status is 130.
    """
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        if status == 2:
            raise typer.BadParameter(str(error)) from None
        if not isinstance(error, PathError):  # under way, that is a mistake of this package
            raise
        raise _ended(str(error), status) from None
    except Diverged as error:
        raise _ended(str(error), 1) from None
    except (MemoryError, OverflowError, RuntimeError) as error:
        if not of_memory(error):
            raise
        raise _ended(f"there is no memory for sizes like these: {reason_of(error)}", status) from None
    except KeyboardInterrupt:
        raise _ended(interrupted, 130) from None


@contextlib.contextmanager
def interrupted_between() -> Iterator[Callable[[], None]]:
    """Within it, Ctrl-C stops the command where the function that it yields is called next; a second one at once.

    The exception of a signal is raised wherever the interpreter is at the moment; in the callback of a weak reference,
    of which saving tensors makes many, Python drops it.
    """
    pressed = False

    def on_signal(number, frame):
        nonlocal pressed
        if pressed:
            signal.default_int_handler(number, frame)
        pressed = True
        os.write(2, b"\nstopping after this update; Ctrl-C again stops at once\n")

    def check():
        if pressed:
            raise KeyboardInterrupt

    here = threading.current_thread() is threading.main_thread()  # only there signals can be set
    if not here or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield check
        return
    signal.signal(signal.SIGINT, on_signal)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def of_memory(error: BaseException) -> bool:
    """Whether an error is that of an allocator: torch's has no class of its own on a CPU."""
    said = str(error)
    words = ("allocate", "out of memory", "Storage size", "overflow", "numel", "invalid size", "not enough memory")
    return isinstance(error, (MemoryError, OverflowError, torch.OutOfMemoryError)) or any(
        word in said for word in words
    )


def _ended(sentence: str, status: int) -> typer.Exit:
    Console(stderr=True, soft_wrap=True).print(sentence, markup=False, highlight=False)
    return typer.Exit(status)

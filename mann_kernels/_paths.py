"""What a user's path holds: whatever is wrong with it becomes one sentence that names it."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from weakref import WeakValueDictionary

try:
    import fcntl
except ImportError:  # Windows: there a folder has no owner
    fcntl = None  # type: ignore[assignment]

#: Of what an error says of itself.
LONGEST_REASON = 300


class PathError(ValueError):
    """Something is wrong with a path of the user's, or with what it holds; the message names both."""


@contextlib.contextmanager
def about(path: str | os.PathLike, what: str) -> Iterator[None]:
    """Within it, whatever a path makes some library raise is a PathError "<path>: <what>: <the reason>".

    Not a list of exceptions: a file can hold anything, and every library has its own.
    """
    try:
        yield
    except PathError:
        raise
    except Exception as error:
        raise PathError(f"{path}: {what}: {reason_of(error)}") from error


def reason_of(error: BaseException) -> str:
    """What an error says, in one line."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    if isinstance(error, KeyError):
        said = f"there is no {said}"
    said = " ".join(said.split()) or type(error).__name__
    return said if len(said) <= LONGEST_REASON else said[:LONGEST_REASON] + " ..."


#: Ends the names of files that are being written.
PART = ".part"


class Owner:
    """This process's ownership of a folder; it ends with the object, and with the process, however that ends."""

    def __init__(self, folder: Path):
        self.descriptor = os.open(folder, os.O_RDONLY)

    def __del__(self) -> None:
        os.close(self.descriptor)


_owned: WeakValueDictionary[str, Owner] = WeakValueDictionary()


def own(folder: Path) -> Owner | None:
    """Make the folder this process's, and take away what killed writers left in it. None where the system has no such locks.

    Raises:
        PathError: it is another process's, or cannot be opened.
    """
    if fcntl is None:
        return None
    with about(folder, "cannot be used as a folder"):
        name = str(folder.resolve())
        owner = _owned.get(name)
        if owner is None:
            owner = Owner(folder)
            try:
                fcntl.flock(owner.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise PathError(
                    f"{folder}: another process is writing its run to this folder; wait for it to end, or take another folder"
                ) from None
            except OSError:  # a file system without locks
                return None
            _owned[name] = owner
            for left in folder.glob(f".*{PART}"):
                left.unlink(missing_ok=True)
    return owner

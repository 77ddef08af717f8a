"""The program: `fastinterp`, or `python -m fastinterp`."""

import gc
import os
import signal
import sys
from contextlib import suppress
from typing import NoReturn


def main() -> None:
    """Run the command line and end the process."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # While modules are imported there is nothing to clean up, and an exception would end somewhere in their code.
        signal.signal(signal.SIGINT, _interrupted)
    # A short-lived process: going through its modules for garbage, above all at the end, takes a sixth of its start-up.
    gc.disable()
    try:
        from fastinterp.cli import main as run
    except (ImportError, MemoryError) as error:
        if isinstance(error, ImportError) and "failed to map segment" not in str(error):
            raise
        _end("not enough memory to start")
    try:
        run()
    except MemoryError:  # what says so had none either
        _end("not enough memory")
    finally:
        if not gc.isenabled():  # a command that runs others' code enabled it
            gc.freeze()


def _end(why: str) -> NoReturn:
    sys.stderr.write(f"StorageError: {why}. Allow more (ulimit -v)\n")
    sys.exit(4)


def _interrupted(*_: object) -> None:
    with suppress(OSError):
        os.write(2, b"interrupted; nothing was written\n")
    os._exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()

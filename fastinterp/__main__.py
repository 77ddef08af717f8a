"""The program: `fastinterp`, or `python -m fastinterp`."""

import gc
import sys


def main() -> None:
    """Run the command line and end the process."""
    # A short-lived process: going through its modules for garbage, above all at the end, takes a sixth of its start-up.
    gc.disable()
    try:
        from fastinterp.cli import main as run
    except KeyboardInterrupt:  # nothing was begun
        sys.stderr.write("interrupted\n")
        sys.exit(130)
    except (ImportError, MemoryError) as error:
        if isinstance(error, ImportError) and "failed to map segment" not in str(error):
            raise
        sys.stderr.write("StorageError: not enough memory to start. Allow more (ulimit -v)\n")
        sys.exit(4)
    try:
        run()
    finally:
        if not gc.isenabled():  # a command that runs others' code enabled it
            gc.freeze()


if __name__ == "__main__":
    main()

"""The program: `fastinterp`, or `python -m fastinterp`."""

import gc


def main() -> None:
    """Run the command line and end the process."""
    # A short-lived process: going through its modules for garbage, above all at the end, takes a sixth of its start-up.
    gc.disable()
    from fastinterp.cli import main as run

    try:
        run()
    finally:
        if not gc.isenabled():  # a command that runs others' code enabled it
            gc.freeze()


if __name__ == "__main__":
    main()

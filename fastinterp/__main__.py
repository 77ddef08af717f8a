"""`python -m fastinterp` is the command `fastinterp`."""

from fastinterp.cli import main

if __name__ == "__main__":
    main()

"""The program with short rounds, which ends itself at a given one: started by tests/execute/test_resume*.py.

ROUND=BYTES       inputs that a round reads
KILL=SIGNAL:N     it sends itself the signal when it has noted N rounds; SIGNAL:-N: when it is about to note round N
KEPT_S=SECONDS    of work, from which on an interrupted run keeps its output
BOOT, VERSION     what it takes for the boot of the machine, and for its own version
"""

import os
import signal
from typing import Any

from fastinterp.__main__ import main
from fastinterp.execute import rounds
from fastinterp.execute.resume import identity, notes, session

if "ROUND" in os.environ:
    rounds.ROUND_BYTES = notes.ROUND_BYTES = int(os.environ["ROUND"])
if "KEPT_S" in os.environ:
    session.KEPT_S = float(os.environ["KEPT_S"])
if "BOOT" in os.environ:
    session.__dict__["boot"] = lambda: os.environ["BOOT"]
if "VERSION" in os.environ:
    identity.__dict__["__version__"] = os.environ["VERSION"]
if "KILL" in os.environ:
    name, _, at = os.environ["KILL"].partition(":")
    noted = [0]
    append = session.Session._append

    def counted(of: session.Session, record: Any) -> None:
        noted[0] += 1
        if noted[0] == -int(at):
            os.kill(os.getpid(), signal.Signals[name])
        append(of, record)
        if noted[0] == int(at):
            os.kill(os.getpid(), signal.Signals[name])

    session.Session._append = counted  # type: ignore[method-assign]

main()

"""The program with short rounds, which ends itself at a given one: started by tests/execute/test_resume*.py.

ROUND=BYTES       inputs that a round reads
KILL=SIGNAL:N     it sends itself the signal when it has noted N rounds; SIGNAL:-N: when it is about to note round N
FINISH=SIGNAL:N   the same when it is about to rename or remove file N while it puts outputs in place
KEPT_S=SECONDS    of work, from which on an interrupted run keeps its output
TRIES=N           in a row of a range of a file elsewhere, that bring nothing
BOOT, VERSION     what it takes for the boot of the machine, and for its own version
"""

import os
import signal
from typing import Any

from fastinterp.__main__ import main
from fastinterp.checkpoint import http_ranges
from fastinterp.execute import rounds
from fastinterp.execute.resume import identity, notes, session
from fastinterp.output import finish, journal

if "ROUND" in os.environ:
    notes.ROUND_S = 0
    rounds.ROUND_BYTES = notes.ROUND_BYTES = int(os.environ["ROUND"])
if "KEPT_S" in os.environ:
    session.KEPT_S = float(os.environ["KEPT_S"])
if "TRIES" in os.environ:
    http_ranges.__dict__["_TRIES"] = int(os.environ["TRIES"])
if "BOOT" in os.environ:
    session.__dict__["boot"] = lambda: os.environ["BOOT"]
if "VERSION" in os.environ:
    identity.__dict__["__version__"] = os.environ["VERSION"]
if "FINISH" in os.environ:
    chosen, _, last = os.environ["FINISH"].partition(":")
    steps = [0]

    def stopping(step: Any) -> Any:
        def stopped(*args: Any) -> Any:
            steps[0] += 1
            if steps[0] == int(last):
                os.kill(os.getpid(), signal.Signals[chosen])
            return step(*args)

        return stopped

    class FinishOs:
        replace, unlink = staticmethod(stopping(os.replace)), staticmethod(stopping(os.unlink))

        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

    finish.__dict__["os"] = journal.__dict__["os"] = FinishOs()
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

    session.Session._append = counted  # type: ignore[method-assign, assignment]

main()

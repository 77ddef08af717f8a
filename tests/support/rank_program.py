"""The program as a rank runs it, with accidents: started by tests/execute/test_ranks.py, and by torchrun there.

DIES=RANK:UNITS:FILE  this rank kills itself, as a crash would, when it begins its next unit after UNITS; once, noted in
                      FILE, when another has one. The others begin none before it has
FAILS=...             the same, but it raises an error
ROUNDS=BYTES:N        rounds read so many bytes, and a rank kills itself when it has noted N of them
PATIENCE=SECONDS      how long the others believe that it lives
"""

import os
import signal
import time
from pathlib import Path
from typing import Any

from fastinterp.__main__ import main
from fastinterp.errors import StorageError
from fastinterp.execute import rounds
from fastinterp.execute.distributed import merge as distributed
from fastinterp.execute.distributed import peers as ranks
from fastinterp.execute.resume import notes
from fastinterp.execute.resume.session import ROUND
from fastinterp.execute.run import run
from fastinterp.output import journal

if "PATIENCE" in os.environ:
    ranks.PATIENCE_S = float(os.environ["PATIENCE"])

if "ROUNDS" in os.environ:
    nbytes, most = map(int, os.environ["ROUNDS"].split(":"))
    notes.ROUND_S = 0
    rounds.ROUND_BYTES = notes.ROUND_BYTES = nbytes
    seen: list[str] = []
    append = journal.Journal.append

    def counted(of: journal.Journal, kind: str, *args: Any, **kwargs: Any) -> None:
        append(of, kind, *args, **kwargs)
        seen.extend([kind] * (kind == ROUND))
        if len(seen) == most:
            os.kill(os.getpid(), signal.SIGKILL)

    journal.Journal.append = counted  # type: ignore[method-assign, assignment]

if "DIES" in os.environ or "FAILS" in os.environ:
    rank, units, noted = os.environ.get("DIES", os.environ.get("FAILS", "")).split(":")
    left = [int(units)]

    def run_until(*args: Any, **kwargs: Any) -> Any:
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID")) != rank:
            Path(f"{noted}.other").touch()
            while not Path(noted).exists():
                time.sleep(0.01)
        elif not Path(noted).exists():
            if not left[0]:
                while not Path(f"{noted}.other").exists():
                    time.sleep(0.01)
                Path(noted).touch()
                if "FAILS" in os.environ:
                    raise StorageError("the disk is gone")
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
        return run(*args, **kwargs)

    distributed.__dict__["run"] = run_until

main()

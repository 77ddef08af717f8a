"""The processes that torchrun or srun started together: which one this is, and what they tell each other.

They talk through a store of keys and texts alone (torch's TCPStore), since all they share is who does what.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from fastinterp.errors import BackendError, RankError

_JOIN_S = 300.0  # how long the ranks wait for each other at the start
_BEAT_S = 0.5  # between signs of life
PATIENCE_S = 60.0  # a rank that gives none for so long is given up, and its work taken over
_BYE_S = 10.0  # how long the rank that has the store waits for the others to leave


@dataclass(frozen=True)
class Rank:
    """This process among `world`.

    local, local_world  the same among those of this machine
    host, port          where the store is
    serves              whether this process has the store; else the one that started it has
    run                 tells this start from others that use the same store
    """

    rank: int
    world: int
    local: int
    local_world: int
    host: str
    port: int
    serves: bool
    run: str


def started(env: Mapping[str, str] = os.environ) -> Rank | None:
    """Who this process is, from what torchrun or srun say in the environment. None if it is alone.

    Raises: BackendError, if what they say is incomplete.
    """
    if "TORCHELASTIC_RUN_ID" in env or all(k in env for k in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")):
        if _number(env, "WORLD_SIZE") < 2:
            return None
        return Rank(
            rank=_number(env, "RANK"),
            world=_number(env, "WORLD_SIZE"),
            local=_number(env, "LOCAL_RANK", 0),
            local_world=_number(env, "LOCAL_WORLD_SIZE", 1),
            host=env.get("MASTER_ADDR", "localhost"),
            port=_number(env, "MASTER_PORT"),
            serves=_number(env, "RANK") == 0 and env.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
            run=f"{env.get('TORCHELASTIC_RUN_ID', '')}/{env.get('TORCHELASTIC_RESTART_COUNT', 0)}",
        )
    if "SLURM_STEP_ID" not in env or int(env.get("SLURM_STEP_NUM_TASKS", 1)) < 2:
        return None
    rank = _number(env, "SLURM_PROCID")
    job = _number(env, "SLURM_JOB_ID", 0)
    return Rank(
        rank=rank,
        world=_number(env, "SLURM_STEP_NUM_TASKS"),
        local=_number(env, "SLURM_LOCALID", 0),
        local_world=int(re.split(r"\D", env.get("SLURM_STEP_TASKS_PER_NODE", "1"))[0] or 1),  # `4(x2)`: 4
        host=env.get("MASTER_ADDR") or first_host(env.get("SLURM_STEP_NODELIST", "localhost")),
        port=_number(env, "MASTER_PORT", 20000 + job % 20000),
        serves=rank == 0,
        run=f"{job}.{env['SLURM_STEP_ID']}",
    )


def first_host(nodes: str) -> str:
    """The first of Slurm's list of machines: `gpu[003-010,12],cpu1` is gpu003 and others."""
    match = re.match(r"([^\[,]+)(?:\[(\w+))?", nodes)
    return nodes if match is None else match[1] + (match[2] or "")


def _number(env: Mapping[str, str], key: str, default: int | None = None) -> int:
    text = env.get(key)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise BackendError(
            f"{key} is {text!r}, but must be a number where several processes merge together. Start them with torchrun "
            "or srun; to merge in this process alone, unset RANK, WORLD_SIZE and TORCHELASTIC_RUN_ID"
        ) from None


class Peers:
    """The other ranks, as this one knows them. A context manager: leaving it says so, and how.

    key  of the merge: what is said about another one is not heard
    """

    def __init__(self, me: Rank, key: str):
        self.me = me
        self.bytes_done = 0  # told with every sign of life
        self._seen: dict[int, tuple[str, float]] = {}  # rank -> its last sign of life, and when it was new
        self._store = self._prefixed(_store(me), key)
        self._beats = self._prefixed(_store(me, joins=True), key)
        self._ended = threading.Event()
        self._pulse = threading.Thread(target=self._beat, daemon=True)

    def _prefixed(self, store: Any, key: str) -> Any:
        from torch.distributed import PrefixStore

        return PrefixStore(f"fastinterp/{self.me.run}/{key}", store)

    def __enter__(self) -> Peers:
        self._pulse.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._ended.set()
        self._pulse.join()
        try:
            if error is not None and not isinstance(error, RankError):
                self.put("failed", f"rank {self.me.rank}: {error if isinstance(error, Exception) else 'interrupted'}")
            self.put(f"bye/{self.me.rank}", "")
            if self.me.serves:
                end = time.monotonic() + (_BYE_S if error is None else 1.0)
                while time.monotonic() < end and not all(
                    self.get(f"bye/{r}") is not None for r in range(self.me.world)
                ):
                    time.sleep(0.02)
        except RankError:
            if error is None and self.me.serves:
                raise

    def put(self, key: str, text: str) -> None:
        self._told(self._store.set, key, text)

    def get(self, key: str) -> str | None:
        """None if nobody has put it."""
        if not self._told(self._store.check, [key]):
            return None
        found: bytes = self._told(self._store.get, key)
        return found.decode()

    def await_(self, key: str, what: str) -> str:
        """Wait until rank 0 has put it. what: for the message, if it does not.

        Raises: RankError, also if any rank failed.
        """
        end = time.monotonic() + _JOIN_S
        while (found := self.get(key)) is None:
            self.refuse_failed()
            if time.monotonic() > end and not self.lives(0):
                raise RankError(
                    f"rank {self.me.rank} waited {_JOIN_S:.0f} s for rank 0 to {what}. Start all ranks again"
                )
            time.sleep(0.02)
        return found

    def takes(self, unit: int) -> bool:
        """Whether this rank is the one to do a unit of work: nobody else does it, or who did gives no sign of life."""
        mine, key = str(self.me.rank), f"unit/{unit}"
        owner = self._told(self._store.compare_set, key, "", mine).decode()
        if owner != mine and not self.lives(int(owner)):
            owner = self._told(self._store.compare_set, key, owner, mine).decode()
        return bool(owner == mine)

    def lives(self, rank: int) -> bool:
        """Whether a rank gave a sign of life within PATIENCE_S, as this rank's clock has it."""
        beat, now = self.get(f"beat/{rank}") or "", time.monotonic()
        last, since = self._seen.get(rank, ("", now))
        if rank not in self._seen or beat != last:
            self._seen[rank] = beat, now
            return True
        return now - since < PATIENCE_S

    def bytes_of_all(self) -> int:
        beats = (self.get(f"beat/{r}") for r in range(self.me.world) if r != self.me.rank)
        return self.bytes_done + sum(int(beat.split()[1]) for beat in beats if beat)

    def refuse_failed(self) -> None:
        """Raises: RankError, if a rank said that it failed."""
        said = self.get("failed")
        if said is not None:
            raise RankError(f"{said}. All ranks stop")

    def _beat(self) -> None:
        count = 0
        while True:
            try:
                self._beats.set(f"beat/{self.me.rank}", f"{os.getpid()}.{count} {self.bytes_done}")
            except RuntimeError:
                return  # the store is gone: whoever asks it next says so
            count += 1
            if self._ended.wait(_BEAT_S):
                return

    def _told(self, call: Any, *args: Any) -> Any:
        try:
            return call(*args)
        except RuntimeError as error:  # DistNetworkError and its like
            raise RankError(
                f"rank {self.me.rank} lost the store at {self.me.host}:{self.me.port}: {_line(error)}. The process "
                "that has it (rank 0, or torchrun) ended. Finished files are kept: start all ranks again"
            ) from None


def _store(me: Rank, joins: bool = False) -> Any:
    try:
        from torch.distributed import TCPStore
    except ImportError:
        raise BackendError(
            "several processes merge together through torch, which is not installed: pip install 'fastinterp[gpu]'"
        ) from None
    try:
        return TCPStore(
            me.host, me.port, is_master=me.serves and not joins, timeout=timedelta(seconds=_JOIN_S),
            wait_for_workers=False,
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        raise RankError(
            f"rank {me.rank} of {me.world} cannot reach the store at {me.host}:{me.port}: {_line(error)}. Start the "
            "ranks with torchrun; with srun set MASTER_ADDR to the first machine, and MASTER_PORT to a free port"
        ) from None


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__

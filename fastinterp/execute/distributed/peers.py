"""The ranks that torchrun or srun started together: the identity of this process, and messages between them.

Messages are keys with texts in a shared store (torch's TCPStore): which rank does what, heartbeats, failures.
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

_JOIN_S = 300.0  # time that the ranks wait for each other at the start
_BEAT_S = 0.5  # between heartbeats
PATIENCE_S = 60.0  # a rank without a heartbeat for so long is taken for dead, and others take over its work
_BYE_S = 10.0  # time that the rank with the store waits for the others to leave


@dataclass(frozen=True)
class Rank:
    """This process among `world`.

    local, local_world  the same among the processes of this machine
    host, port          address of the store
    serves              whether this process serves the store; else its launcher does
    run                 identifies this start among others that use the same store
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
    """The rank of this process, from the environment variables of torchrun or srun. None if it is alone.

    Raises: BackendError, if these are incomplete.
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
    """The first host of a list of Slurm: `gpu[003-010,12],cpu1` is gpu003 and others."""
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
    """The connection to the other ranks. A context manager: leaving it reports a failure or the end to the others.

    key  identifies the merge: messages of other merges are ignored
    """

    def __init__(self, me: Rank, key: str):
        self.me = me
        self.bytes_done = 0  # sent with every heartbeat
        self._seen: dict[int, tuple[str, float]] = {}  # rank -> its last heartbeat, and when it was first seen
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
        """Store a text under a key."""
        self._call(self._store.set, key, text)

    def get(self, key: str) -> str | None:
        """The text under a key; None if no rank has stored one."""
        if not self._call(self._store.check, [key]):
            return None
        text: bytes = self._call(self._store.get, key)
        return text.decode()

    def await_(self, key: str, what: str) -> str:
        """Wait until rank 0 has stored a text under a key. what: what rank 0 was to do, for the message.

        Raises: RankError, if it does not, or if any rank failed.
        """
        end = time.monotonic() + _JOIN_S
        while (text := self.get(key)) is None:
            self.refuse_failed()
            if time.monotonic() > end and not self.lives(0):
                raise RankError(
                    f"rank {self.me.rank} waited {_JOIN_S:.0f} s for rank 0 to {what}. Start all ranks again"
                )
            time.sleep(0.02)
        return text

    def takes(self, unit: int) -> bool:
        """Claim a unit of work. Whether this rank is to do it: no other rank does, or the one that did is dead."""
        mine, key = str(self.me.rank), f"unit/{unit}"
        owner = self._call(self._store.compare_set, key, "", mine).decode()
        if owner != mine and not self.lives(int(owner)):
            owner = self._call(self._store.compare_set, key, owner, mine).decode()
        return bool(owner == mine)

    def lives(self, rank: int) -> bool:
        """Whether a rank sent a heartbeat within PATIENCE_S, by the clock of this process."""
        beat, now = self.get(f"beat/{rank}") or "", time.monotonic()
        last, since = self._seen.get(rank, ("", now))
        if rank not in self._seen or beat != last:
            self._seen[rank] = beat, now
            return True
        return now - since < PATIENCE_S

    def bytes_of_all(self) -> int:
        """The bytes read and written by all ranks so far."""
        beats = (self.get(f"beat/{r}") for r in range(self.me.world) if r != self.me.rank)
        return self.bytes_done + sum(int(beat.split()[1]) for beat in beats if beat)

    def refuse_failed(self) -> None:
        """Raises: RankError, if a rank has reported a failure."""
        failure = self.get("failed")
        if failure is not None:
            raise RankError(f"{failure}. All ranks stop")

    def _beat(self) -> None:
        count = 0
        while True:
            try:
                self._beats.set(f"beat/{self.me.rank}", f"{os.getpid()}.{count} {self.bytes_done}")
            except RuntimeError:
                return  # the store is gone: the next access to it raises
            count += 1
            if self._ended.wait(_BEAT_S):
                return

    def _call(self, call: Any, *args: Any) -> Any:
        try:
            return call(*args)
        except RuntimeError as error:  # DistNetworkError and its like
            raise RankError(
                f"rank {self.me.rank} lost the store at {self.me.host}:{self.me.port}: {_line(error)}. The process "
                "that serves it (rank 0, or torchrun) ended. Finished files are kept: start all ranks again"
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

"""The engine in the worker processes of Ray, which mergekit-evolve starts.

A worker has an interpreter of its own, where nothing is installed. Ray asks a function that an environment variable
names for the runtime environment of its workers, and calls the function that is named there when a worker starts.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from typing import Any

LOG = logging.getLogger("fastinterp.integrations.mergekit")

_VARIABLE = "RAY_RUNTIME_ENV_HOOK"
_HOOK = f"{__name__}.runtime_env"
_KEY = "worker_process_setup_hook"
_INSTALL = "fastinterp.integrations.mergekit.install"
_REMEDY = f'call install() before Ray starts, or start it with ray.init(runtime_env={{"{_KEY}": "{_INSTALL}"}})'


def install() -> None:
    """Have Ray install the engine in workers, if it is started later in this process."""
    ray = sys.modules.get("ray")
    taken = os.environ.get(_VARIABLE, _HOOK)
    if ray is not None and ray.is_initialized():
        context = ray.get_runtime_context()
        # A worker that calls this is one that has it; asking it for its environment while it starts is a crash.
        if context.worker.mode != ray.WORKER_MODE and _KEY not in (context.runtime_env or {}):
            LOG.warning(f"Ray was started before, so its workers merge with mergekit: {_REMEDY}")
    elif taken != _HOOK:
        LOG.warning(f"{_VARIABLE} is set to {taken}, so Ray's workers merge with mergekit: {_REMEDY}")
    else:
        os.environ[_VARIABLE] = _HOOK


def uninstall() -> None:
    """Workers that Ray starts later have mergekit as it is."""
    if os.environ.get(_VARIABLE) == _HOOK:
        del os.environ[_VARIABLE]


def runtime_env(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The runtime environment that ray.init was given, with what installs the engine in each worker.

    Ray calls it. A setup function that was given is left alone, which is logged.
    """
    env = dict(given or {})
    if env.setdefault(_KEY, _INSTALL) != _INSTALL:
        LOG.warning(f"Ray's workers have a {_KEY} of their own, and merge with mergekit unless it calls {_INSTALL}")
    return env

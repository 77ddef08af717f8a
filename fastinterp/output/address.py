"""Functions whose output may be at an address, `s3://bucket/merged`: see url_upload.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

from fastinterp.checkpoint import hub
from fastinterp.urls import is_url, path_of_file, public

F = TypeVar("F", bound=Callable[..., Any])


def uploads(function: F) -> F:
    """Decorator of a function that writes into its argument `out`: that may be an address. Names of outputs in what it
    returns (`output` of reports) are addresses then; but `file:///path` is as the path.
    """

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(x, str) and is_url(x) for x in (*args, kwargs.get("out"))):
            return function(*args, **kwargs)
        from inspect import signature

        bound = signature(function).bind(*args, **kwargs)
        out = bound.arguments.get("out")
        if not isinstance(out, str) or not is_url(out):
            return function(*args, **kwargs)
        if (path := path_of_file(out)) is not None:
            bound.arguments["out"] = path
            return function(*bound.args, **bound.kwargs)
        from fastinterp.output.url_upload import Destination

        with hub.one_run():
            to = Destination(public(out), force=bool(bound.arguments.get("force")))
            with to.written() as local:
                bound.arguments["out"] = local
                result = function(*bound.args, **bound.kwargs)
        return to.named(result)

    return cast("F", call)

"""Addresses of models and outputs (`s3://bucket/model`), and what must not be shown of them: passwords, signatures."""

from __future__ import annotations

import re

from fastinterp.errors import UsageError
from fastinterp.presence import exists

# Protocols that people mean by `s3:/bucket` or `S3//bucket`; fsspec knows more.
SCHEMES = (
    "s3", "s3a", "gs", "gcs", "hf", "http", "https", "abfs", "abfss", "az", "adl", "memory", "file", "local", "ftp",
    "sftp", "ssh", "webhdfs", "hdfs", "oss", "oci", "github", "smb", "dbfs", "r2",
)  # fmt: skip

_URL = re.compile(r"(?:[a-z0-9]+::)*([A-Za-z][A-Za-z0-9.+-]*)://([^/?]*)(.*)", re.DOTALL)
_IN_TEXT = re.compile(r"(?<![\w+.-])(?:[a-z0-9]+::)*[A-Za-z][A-Za-z0-9.-]*://[^\s\"'`<>]+")
_CHAIN = re.compile(r"::(?=[a-z][a-z0-9+.-]*(?:://|::))")  # and not in `http://[::1]/model`
_QUERY = re.compile(r"\?[\w.~%-]+=")  # `checkpoint-?` is a pattern
_BEHIND = re.compile(r"(?:[,;)\]}]+|:[-+]?\d+\.?\d*)*$")  # of a list that it is in, and the scale of an adapter
_ADAPTER = re.compile(r"\+(?=[A-Za-z][A-Za-z0-9.-]*://)")
_NO_LOGIN = ("github", "git", "gitlab")  # `github://org:repo@revision/path`
# Parameters that say which file it is. All others may be a signature, or a token.
_SHOWN = (
    "versionid", "version", "generation", "revision", "ref", "download", "dl", "raw", "type", "format", "size", "fp",
    "id", "file", "export", "alt", "snapshot", "endpoint_override", "region", "scheme",
)  # fmt: skip

_full: dict[str, str] = {}  # by what is shown of it


def is_url(name: str) -> bool:
    """Whether a name is an address, `scheme://...`, whatever there is on the disk."""
    return "://" in name and "\n" not in name and _URL.match(name) is not None


def scheme_of(url: str) -> str:
    """The scheme in lower case: `s3`."""
    match = _URL.match(url)
    return match[1].lower() if match else ""


def path_of_file(url: str) -> str | None:
    """The path that `file:///path` means, also `local://` and `file://localhost/path`; None of other addresses.

    Raises: UsageError, if it does not start at the root.
    """
    if scheme_of(url) not in ("file", "local"):
        return None
    import os
    import shlex
    from urllib.parse import quote, unquote

    given = unquote(url.partition("://")[2])
    path = given.removeprefix("localhost") if given.startswith("localhost/") else given
    if not path.strip("/"):
        raise UsageError(f"{url}: it names no folder or file: expected file:///PATH")
    if path.startswith("/"):
        return path
    here = os.path.expanduser(path)
    rooted = f"/{path}"
    meant = rooted if exists(rooted) and not exists(here) else os.path.abspath(here)
    plain = rooted if meant == rooted else path
    raise UsageError(
        f"{url}: behind two slashes is a host, and a path behind three. Write `{shlex.quote(plain)}`, or "
        f"`{shlex.quote(f'file://{quote(meant)}')}`"
    )


def is_chained(url: str) -> bool:
    """Whether it is one address in another, as fsspec has them: `zip://file::https://host/archive.zip`."""
    return _CHAIN.search(url) is not None


def public(text: str) -> str:
    """The text without what must not be shown of the addresses in it: `user:password@`, and parameters that may be
    signatures. They are remembered for this process: see `full`. Schemes come in lower case.

    Raises: UsageError, if two addresses are told apart only by what is not shown.
    """
    if "://" not in text:
        return text
    return _IN_TEXT.sub(lambda match: "+".join(map(_public, _ADAPTER.split(match[0]))), text)


def full(url: str) -> str:
    """The address as it was given, of which `url` is what is shown."""
    return _full.get(url, url)


def _public(url: str) -> str:
    if is_chained(url):
        shown = "::".join(_public(part) if "://" in part else part for part in _CHAIN.split(url))
        if shown != url:
            _full[shown] = url
        return shown
    end = _BEHIND.search(url)
    behind = end[0] if end else ""
    url = url.removesuffix(behind) if behind else url
    match = _URL.fullmatch(url)
    if match is None:
        return url + behind
    scheme, authority, rest = match[1].lower(), match[2], match[3]
    user, at, host = authority.rpartition("@")
    login = at and scheme not in _NO_LOGIN and (":" in user or scheme in ("http", "https"))
    shown_authority = host if login else authority
    query = _QUERY.search(rest)
    path, parameters = (rest[: query.start()], rest[query.start() + 1 :]) if query else (rest, "")
    kept = [part for part in parameters.split("&") if part.partition("=")[0].lower() in _SHOWN]
    shown = f"{scheme}://{shown_authority}{path}" + (f"?{'&'.join(kept)}" if kept else "")
    given = f"{scheme}://{authority}{rest}"
    if given != shown:
        if _resource(_full.get(shown, given)) != _resource(given):
            raise UsageError(
                f"two addresses of {shown} differ only in parameters that are not kept, since they may be passwords. "
                "Download one of the files, and name that"
            )
        _full[shown] = given
    return shown + behind


_SIGNING = re.compile(
    r"sig|token|key|secret|passw|cred|auth|expire|x-amz-|x-goog-|policy|session|access|hash|^s[vertpi]$|^sdd$|^sk|^spr$|"
    r"^code$|^t$|^e$|^st$",
    re.IGNORECASE,
)


def _resource(url: str) -> tuple[str, ...]:
    """Its parameters that are no signature: of two addresses with the same the newer one counts."""
    query = _QUERY.search(url)
    parts = url[query.start() + 1 :].split("&") if query else []
    return tuple(part for part in parts if not _SIGNING.search(part.partition("=")[0]))


def mistyped(name: str) -> str:
    """` Did you mean s3://bucket/model?` of a name that was meant as an address; else nothing."""
    match = re.fullmatch(r"([A-Za-z][A-Za-z0-9]{1,7})(:/?|//|:///)(?![/\\])(\S+)", name)
    if match is None or match[1].lower() not in SCHEMES:
        return ""
    root = "/" if match[1].lower() in ("file", "local") and ":/" in match[2] else ""
    return f" Did you mean `{match[1].lower()}://{root}{match[3]}`?"

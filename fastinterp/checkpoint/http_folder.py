"""Files at an address of HTTP: those that the page of a folder links to, or that have the names of models' files."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from urllib.parse import quote as percent
from urllib.parse import unquote, urlsplit, urlunsplit

from fastinterp.checkpoint.http_ranges import HttpFile, NotThere, joined
from fastinterp.checkpoint.names import ANY_INDEX
from fastinterp.checkpoint.strict_json import parse_json
from fastinterp.checkpoint.url_store import There
from fastinterp.errors import CheckpointError, StorageError

_AT_ONCE = 16
_MOST_PAGE = 4 << 20  # bytes of a page that is searched for links
_MOST_SMALL = 200_000_000
# Files that are looked for one by one where a server does not list a folder.
_WEIGHTS = (
    "model.safetensors.index.json", "model.safetensors", "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors", "adapter_model.safetensors", "pytorch_lora_weights.safetensors",
    "pytorch_model.bin.index.json", "pytorch_model.bin", "adapter_model.bin",
)  # fmt: skip
_SMALL = (
    "config.json", "generation_config.json", "model_index.json", "modules.json", "adapter_config.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "preprocessor_config.json",
    "processor_config.json", "quantize_config.json", "hf_quant_config.json", "fastinterp_receipt.json", "LICENSE",
)  # fmt: skip


class HttpStore:
    """The files below an address of HTTP; Store describes the methods.

    given  the address with login, which goes as a header, and parameters, which go with every request
    """

    def __init__(self, url: str, given: str):
        self.url = url
        try:
            parts = urlsplit(given)
        except ValueError as error:  # what should be an IPv6 address, say
            raise CheckpointError(f"there can be no such address: {error}", file=url) from None
        login, _, host = parts.netloc.rpartition("@")
        self._address = urlunsplit((parts.scheme, host, parts.path, parts.query, ""))
        self._headers = (
            {"Authorization": f"Basic {base64.b64encode(unquote(login).encode()).decode()}"} if login else {}
        )
        self._files: dict[str, HttpFile] = {}

    def look(self) -> There | None:
        return None

    def _of(self, name: str) -> str:
        if not name:
            return self._address
        parts = urlsplit(self._address)
        return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{percent(name)}"))

    def shown(self, name: str) -> str:
        base, question, query = self.url.partition("?")
        return f"{base.rstrip('/')}/{name}{question}{query}" if name else self.url

    def _file(self, name: str) -> HttpFile:
        if name not in self._files:
            self._files[name] = HttpFile(self._of(name), self.shown(name), headers=lambda: self._headers)
        return self._files[name]

    def listed(self, folder: str) -> dict[str, There]:
        address = urlsplit(self._of(folder))
        page = HttpFile.whole(
            urlunsplit(address._replace(path=address.path.rstrip("/") + "/")), self.shown(folder), self._headers,
            _MOST_PAGE, wanted="text/html",
        )  # fmt: skip
        names = [] if page is None else _links(page[1].decode(errors="replace"), page[0])
        if names:
            return {name.rstrip("/"): There(None, "", name.endswith("/")) for name in names}
        return self._tried(folder)

    def _tried(self, folder: str) -> dict[str, There]:
        """The files with usual names that are there."""
        start = f"{folder}/" if folder else ""
        indexes = [name for name in _WEIGHTS if ANY_INDEX.fullmatch(name)]
        found = {n: t for n, t in self._are_there(start, (*indexes, *_SMALL)).items() if t is not None}
        shards = [shard for name in indexes if name in found for shard in self._shards(start + name)]
        others = shards or [name for name in _WEIGHTS if name not in indexes]
        found |= {n: t for n, t in self._are_there(start, others).items() if t is not None}
        if not found:
            raise CheckpointError(
                "the server lists no files there, and none has the name of a model's file. Name the file of weights: "
                f"`{self.shown(folder)}/NAME.safetensors`",
                file=self.shown(folder),
            )
        return found

    def _shards(self, index: str) -> list[str]:
        """The files that an index of shards names; of one that is damaged, none."""
        try:
            table = parse_json(self.read(index), "the index", self.shown(index))
            names = table["weight_map"].values() if isinstance(table, dict) else []
            return sorted({name for name in names if isinstance(name, str)})
        except (CheckpointError, KeyError, AttributeError):
            return []

    def _are_there(self, start: str, names: Sequence[str]) -> Mapping[str, There | None]:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return dict(zip(names, pool.map(lambda name: self.find(start + name), names), strict=True))

    def find(self, name: str) -> There | None:
        """What the server says of a file; None, if there is none, or it refuses it."""
        try:
            file = self._file(name)
        except NotThere:
            return None
        except CheckpointError:  # it is empty
            return There(0, "")
        return There(file.size, file.version)

    def read(self, name: str) -> bytes:
        found = HttpFile.whole(self._of(name), self.shown(name), self._headers, _MOST_SMALL)
        if found is None:
            raise CheckpointError("there is no such file there", file=self.shown(name))
        return found[1]

    def file(self, name: str, there: There) -> HttpFile:
        try:
            return self._file(name)
        except NotThere as error:
            raise StorageError(str(error)) from None


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.found += [value for key, value in attrs if key == "href" and value]


def _links(page: str, address: str) -> list[str]:
    """The names of files and folders directly below the page of a folder, folders with `/`."""
    parser = _Links()
    parser.feed(page)
    home = urlsplit(address)
    start = home.path if home.path.endswith("/") else home.path.rpartition("/")[0] + "/"
    names: dict[str, None] = {}
    for target in filter(None, (joined(address, link) for link in parser.found)):
        parts = urlsplit(target)
        name = unquote(parts.path.removeprefix(start))
        inside = parts.netloc == home.netloc and parts.path.startswith(start)
        if inside and name.rstrip("/") not in ("", ".", "..") and "/" not in name.rstrip("/"):
            names[name] = None
    return [*names]

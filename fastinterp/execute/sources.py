"""The open input files of a run, and the translation of read errors into exceptions."""

from __future__ import annotations

import errno
import os
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastinterp.backends.cpu import MappedFile, SourceHandle, cached_fraction
from fastinterp.checkpoint import remote
from fastinterp.checkpoint.open import changed_since
from fastinterp.checkpoint.regular_file import close, write_all
from fastinterp.checkpoint.remote import RemoteFile, opened
from fastinterp.errors import NO_MEMORY, CheckpointError, FastinterpError, StorageError
from fastinterp.execute.reading import all_mapped, mapped
from fastinterp.execute.scales import refuse_scales
from fastinterp.messages import counted, listed, size, tell
from fastinterp.ops.dtypes import F32
from fastinterp.ops.operands import Decoder, Factor, Gathered, LowRank, Operand, Product, ReplacedRows, Stored
from fastinterp.plan.inputs import ConvertedInput, GatheredInput, StoredInput, TensorInput
from fastinterp.plan.low_rank import FactorInput, LowRankInput, ProductInput, RowsInput
from fastinterp.plan.models import Model

if TYPE_CHECKING:
    from fastinterp.execute.jobs.tensor_io import TensorStep
    from fastinterp.execute.streams import Streams

STREAM_BYTES = 64 << 20  # for what is read of files elsewhere, where nobody says how much
_SPARE_FDS = 64  # for everything that is neither input nor output


class Sources:
    """The files of all inputs, open for reading until `stack` closes. Rows of gathered embeddings are located.

    models   models whose checkpoints must not change during the run
    inputs   every tensor that will be read
    outputs  number of files that will be open for writing at the same time
    scratch  folder for computed rows of gathered embeddings and converted tensors; None: that for temporary files
    stream_bytes  memory for what is read of files elsewhere, while the run reads it
    in_turns  where the system does not allow so many open files, none is open yet: `turns` opens them
    is_mapped  files are sources that kernels read in place
    Raises: StorageError, if a file cannot be opened.
    """

    def __init__(
        self,
        models: Iterable[Model],
        inputs: Iterable[TensorInput],
        stack: ExitStack,
        outputs: int = 0,
        scratch: Path | None = None,
        stream_bytes: int = STREAM_BYTES,
        in_turns: bool = False,
        is_mapped: bool = False,
    ):
        every: dict[Hashable, TensorInput] = {}  # but for plain ones, of which a model may have very many
        needed: dict[Path, None] = {}
        for tensor in inputs:
            if (plain := tensor.plain) is not None and not remote.is_streamed(plain.path):
                needed[plain.path] = None
            elif (files := tensor.files) and (key := tensor.key) not in every:
                every[key] = tensor
                needed.update(dict.fromkeys(files))
        elsewhere = [path for path in needed if remote.is_streamed(path)]
        self._streamed = {path: i for i, path in enumerate(elsewhere)}
        remote.fetch(path for path in needed if path not in self._streamed)
        moved = sum(tensor.moves_rows for tensor in every.values())
        local = len(needed) - len(elsewhere)
        self._room = _allow_files(local + moved + 1 + outputs) - moved - 1 - outputs  # for input files
        self.in_turns = in_turns and self._room < local
        self._closed: set[int] = set()  # files that are open in turns alone
        self.paths: list[Path] = []
        self.handles: list[SourceHandle] = []
        self._checkpoints = [model.checkpoint for model in models if model.checkpoint is not None]
        self._number: dict[Path, int] = {}
        self._scratch, self._stack, self._is_mapped = scratch, stack, is_mapped
        self._converted: tuple[int, int] | None = None  # number of the temporary file, and its size
        self._streams = _streams(elsewhere, list(every.values()), stream_bytes, stack) if elsewhere else None
        for path in needed:
            if self._streams is not None and path in self._streamed:
                self._number[path] = self.add(self._streams.source(self._streamed[path]), path)
                continue
            if self.in_turns:
                self._number[path] = self.add(-1, path)
                self._closed.add(self._number[path])
                continue
            self._number[path] = self.add(self._open(path, stack), path)
        self._operands: dict[Hashable, Operand] = {}
        for key, tensor in every.items():
            if tensor.plain is None:
                self._operands[key] = tensor.open(self)

    def _open(self, path: Path, stack: ExitStack) -> SourceHandle:
        """A file, open until `stack` closes. Raises: StorageError."""
        with storage(path):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(close, fd, path)
        return mapped(fd, path) if self._is_mapped else fd

    def elsewhere(self, number: int) -> RemoteFile | None:
        """The file elsewhere that is source `number`, if it is one."""
        return remote.find(self.paths[number]) if self.paths[number] in self._streamed else None

    def add(self, handle: SourceHandle, path: Path) -> int:
        """Add a file that is already open; returns its index."""
        self.handles.append(handle)
        self.paths.append(path)
        return len(self.handles) - 1

    def turns(self, steps: Sequence[TensorStep]) -> Iterator[Sequence[TensorStep]]:
        """The steps in groups, in their order, each while the files are open that it reads. Raises: StorageError."""
        group: list[TensorStep] = []
        needed: set[int] = set()
        for step in steps:
            own = {source for operand in step.native.inputs for source in operand.sources} & self._closed
            if group and len(needed | own) > self._room:
                yield from self._turn(group, needed)
                group, needed = [], set()
            group.append(step)
            needed |= own
        if group:
            yield from self._turn(group, needed)

    def _turn(self, group: Sequence[TensorStep], needed: Iterable[int]) -> Iterator[Sequence[TensorStep]]:
        with ExitStack() as stack:
            for number in sorted(needed):
                self.handles[number] = self._open(self.paths[number], stack)
                stack.callback(self.handles.__setitem__, number, -1)
            yield group

    def operand(self, tensor: TensorInput) -> Operand:
        """The operand of one of the inputs, in the form that the pump takes."""
        plain = tensor.plain
        return self._operands[tensor.key] if plain is None else self.stored(plain)

    def stored(self, tensor: StoredInput) -> Stored:
        number, code, encoding = self._number[tensor.path], tensor.dtype.kernel_code, tensor.encoding
        added = None if tensor.low_rank is None else self._low_rank(tensor.low_rank)
        if encoding is None:
            return Stored(number, tensor.start, code, low_rank=added)
        with ExitStack() as stack:
            files = [stack.enter_context(opened(str(c.path))) for c in encoding.companions]
            refuse_scales(tensor, encoding.companions, files)
        columns = tensor.shape[-1] if len(tensor.shape) > 1 else tensor.numel
        companions = tuple((self._number[c.path], c.start, c.nbytes) for c in encoding.companions)
        decoder = Decoder(encoding.decoder, columns, companions, encoding.parameters)
        return Stored(number, tensor.start, code, decoder, added)

    def _low_rank(self, added: LowRankInput) -> LowRank:
        """The form that the pump takes: tensors as places in sources."""

        def factor(of: FactorInput) -> Factor:
            if of.tensor is None:
                return Factor(-1, 0, F32.kernel_code)
            place = self._number[of.tensor.path], of.tensor.start, of.tensor.dtype.kernel_code
            return Factor(*place, of.first, of.by_matrix, of.by_index, of.by_rank)

        def change(of: ProductInput | RowsInput) -> Product | ReplacedRows:
            if isinstance(of, RowsInput):
                return ReplacedRows(self._number[of.tensor.path], of.tensor.start, of.tensor.dtype.kernel_code, of.rows)
            magnitude = None if of.magnitude is None else factor(FactorInput(of.magnitude))
            return Product(factor(of.left), factor(of.right), of.rank, of.scale, magnitude, of.per_row)

        return LowRank(added.stored.kernel_code, added.shape, tuple(map(change, added.changes)))

    def converted(self, tensor: ConvertedInput) -> Stored:
        with storage(self._scratch or Path("a temporary file")):
            if self._converted is None:
                self._converted = self._temporary_file(tensor.path), 0
            number, start = self._converted
            end = start
            for piece in tensor.conversion.pieces(os.fspath(tensor.path)):
                write_all(self._temporary, piece, end)
                end += len(piece)
        if end - start != tensor.nbytes:
            raise CheckpointError(f"{end - start} bytes were made of it, not {tensor.nbytes}", tensor=tensor.name)
        self._converted = number, (end + 63) // 64 * 64
        return Stored(number, start, tensor.dtype.kernel_code)

    def _temporary_file(self, path: Path) -> int:
        """The number of a new file without a name. path: the first that is converted into it."""
        import tempfile

        with tempfile.TemporaryFile(dir=self._scratch) as file:
            fd = os.dup(file.fileno())
        self._stack.callback(close, fd, self._scratch or "a temporary file")
        self._temporary = fd
        return self.add(fd, path)

    def gathered(self, tensor: GatheredInput) -> Operand:
        from fastinterp.execute.gather_rows import gather

        with storage(self._scratch or Path("a temporary file")):
            rows = gather(tensor, self._scratch, self._stack)
        computed = None if rows.computed is None else self.add(rows.computed, tensor.files[0])
        code = tensor.dtype.code or 0
        if rows.rows is None:
            return Stored(computed or 0, 0, code)
        stored = [self.stored(source) for source, _ in rows.parts]
        parts = [(s.source, s.offset, count) for s, (_, count) in zip(stored, rows.parts, strict=True)]
        decoders = [s.decoder for s in stored]
        if computed is not None:
            parts.append((computed, 0, rows.computed_rows))
            decoders.append(None)
        return Gathered(tuple(parts), code, rows.rows, tuple(decoders) if any(decoders) else ())

    def intermediate(self, tensor: TensorInput) -> Operand:
        raise LookupError(f"{tensor.name} is in no file before a chained job has computed it")

    def cached(self) -> bool:
        """Whether all files are known to be in the page cache, so that nothing needs to be read ahead."""
        if self._streams is not None or self.in_turns:
            return False
        for handle, path in zip(self.handles, self.paths, strict=True):
            fd = handle.fd if isinstance(handle, MappedFile) else handle
            assert isinstance(fd, int)  # none is elsewhere
            with storage(path):
                nbytes = os.fstat(fd).st_size
            if cached_fraction(fd, nbytes) <= 0.95:
                return False
        return True

    def map(self) -> None:
        """Let kernels read the files of inputs in place, all of which are open here, if the system maps them."""
        files = {number: fd for number in self._number.values() if isinstance(fd := self.handles[number], int)}
        if (sources := all_mapped([*files.values()])) is not None:
            for number, source in zip(files, sources, strict=True):
                self.handles[number] = source

    def refuse_changed(
        self, message: str = "it changed while it was being read. Retry once nothing is writing to it"
    ) -> None:
        """Raises: CheckpointError, if a file of a checkpoint has changed since its header was read."""
        for checkpoint in self._checkpoints:
            for path in changed_since(checkpoint):
                found = remote.find(path)
                raise CheckpointError(message, file=str(path) if found is None else found.name)

    def explained(self, error: tuple[Any, ...]) -> Exception:
        """The exception for an error tuple of the pump (_C.pyi): a failed read, or another error that ended the run."""
        kind, *rest = error
        if kind == "other":
            return StorageError(NO_MEMORY if "bad_alloc" in rest[0] else f"the run stopped: {rest[0]}")
        source, code, offset, expected, done = rest
        if self._streams is not None and self.paths[source] in self._streamed:
            failed = self._streams.error(self._streamed[self.paths[source]])
            if isinstance(failed, FastinterpError):
                return failed
            if failed is not None:
                return StorageError(f"{self.paths[source].name}: it cannot be read: {failed}")
        if code:
            return StorageError(f"{self.paths[source]}: {os.strerror(code)}, reading {expected} bytes at {offset}")
        return CheckpointError(
            f"only {done} of {expected} bytes are left at byte {offset}: it was truncated or replaced while it was "
            "being read. Retry once nothing is writing to it",
            file=str(self.paths[source]),
        )


def _streams(elsewhere: Sequence[Path], inputs: Sequence[TensorInput], most: int, stack: ExitStack) -> Streams:
    """Threads that fetch what is read of files elsewhere, and a line that says so."""
    from fastinterp.execute.streams import Streams

    files = [file for path in elsewhere if (file := remote.find(path)) is not None]
    models = dict.fromkeys(path.parent for path in elsewhere)
    total = sum(tensor.nbytes for tensor in inputs if not {*tensor.files}.isdisjoint(elsewhere))
    what = f"{counted(len(files), 'file')}, {size(total)}, as they are needed, and not stored"
    tell(f"reading {what}: {listed([file.name for file in files], 4)}")
    return Streams(files, len(models), most, stack)


@contextmanager
def storage(path: Path, kind: type[StorageError] = StorageError) -> Iterator[None]:
    """A context manager that raises errors of the operating system as `kind`, with the path and a remedy."""
    try:
        yield
    except OSError as error:
        raise kind(f"{path}: {error.strerror}{remedy(error.errno)}") from None


def remedy(code: int | None) -> str:
    """A remedy for an error number of the operating system, as the end of a message; or an empty string."""
    if code == errno.EFBIG:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        if limit == resource.RLIM_INFINITY:
            return ". This file system allows only smaller files: --max-shard-size 1GB, say"
        size = max(1, limit * 9 // 10)  # of tensor data: headers take room, too
        return f". ulimit -f allows files of {limit} bytes: --max-shard-size {size}, or raise it for larger tensors"
    if code == errno.EMFILE:
        return ". Allow more open files (ulimit -n), or make fewer and larger shards (--max-shard-size)"
    return ". Free some space, or choose another folder" if code in (errno.ENOSPC, errno.EDQUOT) else ""


def _allow_files(count: int) -> int:
    """Raise the soft limit on open files of this process, up to the hard one, if `count` more do not fit. Returns how
    many do then.
    """
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + _SPARE_FDS
    if soft != resource.RLIM_INFINITY and wanted > soft:
        wanted = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted - _SPARE_FDS
    return count

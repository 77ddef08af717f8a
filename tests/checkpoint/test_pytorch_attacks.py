"""Files of torch.save that are damaged or made to do harm: a clear error, nothing executed, nothing written."""

from __future__ import annotations

import os
import random
import resource
import struct
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from click.testing import CliRunner

from fastinterp.checkpoint.open import open_checkpoint
from fastinterp.cli import commands
from fastinterp.errors import CheckpointError
from tests.support import torch_files as made
from tests.support.torch_files import Entry, call, many, mapping, named, pickled, storage, text, view, whole, zipped


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(path))
    return str(caught.value)


def test_what_is_made_by_hand_is_right(tmp_path):
    """Else the tests below would refuse it for another reason; torch reads it, too."""
    torch = pytest.importorskip("torch")
    path = made.file_of(tmp_path / "x.pt")
    [entry] = open_checkpoint(str(path)).tensors.values()
    want = torch.load(path, weights_only=True)["w"]
    assert path.read_bytes()[entry.start : entry.start + entry.nbytes] == want.numpy().tobytes() == bytes(range(16))
    path.write_bytes(zipped(made.archive(pickled(mapping({"w": view()})), {"0": bytes(range(16))}), wide=True))
    assert open_checkpoint(str(path)).tensors["w"].shape == (2, 2)
    assert torch.load(path, weights_only=True)["w"].equal(want)


EVIL = text("touch OWNED")
# Opcodes, and what the message names.
CODE = {
    "system": (call("os.system", EVIL), "os.system"),
    "posix": (call("posix.system", EVIL), "posix.system"),
    "eval": (call("builtins.eval", EVIL), "builtins.eval"),
    "exec": (call("__builtin__.exec", EVIL), "__builtin__.exec"),
    "getattr": (call("builtins.getattr", named("collections.OrderedDict"), EVIL), "builtins.getattr"),
    "import": (call("builtins.__import__", EVIL), "builtins.__import__"),
    "torch.load": (call("torch.load", EVIL), "torch.load"),
    "torch.hub": (call("torch.hub.load", EVIL), "torch.hub.load"),
    "numpy": (call("numpy.testing._private.utils.runstring", EVIL), "numpy.testing._private.utils.runstring"),
    "function of a package": (call("transformers.pipeline", EVIL), "transformers.pipeline"),
    "partial": (call("functools.partial", named("os.system"), EVIL), "functools.partial"),
    "operator": (call("operator.attrgetter", EVIL), "operator.attrgetter"),
    "module": (call("torch.nn.modules.linear.Linear"), "torch.nn.modules.linear.Linear"),
    "own class": (named("__main__.Net") + b")\x81}b", "__main__.Net"),
    "never called": (named("os.system"), "os.system"),
    "dotted name": (b"\x8c\x08builtins\x8c\x12__class__.__base__\x93", "builtins.__class__.__base__"),
    "lines in a name": (b"cos\\x0a\nsystem\nN0", "os\\x0a.system"),
    "INST": (b"(" + EVIL + b"ios\nsystem\n", "os.system"),
    "OBJ": (b"(" + named("os.system") + EVIL + b"o", "os.system"),
    "OBJ of a class that is known": (b"(" + named("argparse.Namespace") + b"o", "opcode 0x6f"),
    "INST of a class that is known": (b"(iargparse\nNamespace\n", "makes an object of `argparse.Namespace`"),
    "NEWOBJ": (named("subprocess.Popen") + many(EVIL) + b"\x81", "subprocess.Popen"),
    "NEWOBJ_EX": (named("subprocess.Popen") + many(EVIL) + b"}\x92", "subprocess.Popen"),
    "stack global": (b"\x8c\x02os\x8c\x06system\x93" + many(EVIL) + b"R", "os.system"),
    "state of a tensor": (view() + many(storage(), whole(0)) + b"b", "sets the state of a value of the kind tensor"),
}


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("case", CODE)
def test_code(tmp_path, monkeypatch, case, beside):
    """As a value of the state dict, and beside it."""
    monkeypatch.chdir(tmp_path)
    code, name = CODE[case]
    state = {"w": view()} if beside else {"w": view(), "x": code}
    value = mapping({"state_dict": mapping(state), **({"x": code} if beside else {})})
    made.put(tmp_path / "x.ckpt", pickled(value), {"0": bytes(16)})
    message = refusal(tmp_path / "x.ckpt")
    assert "x.ckpt: its pickle is not read: " in message and name in message
    made.file_of(tmp_path / "y.ckpt")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    done = CliRunner().invoke(commands, ["interpolate", "y.ckpt", "x.ckpt", "--alpha", "0.5", "-o", "out"])
    assert done.exit_code == 3 and name in done.output
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


REFERENCE = named("torch.FloatStorage"), text("0"), text("cpu"), whole(4)
PICKLES = {
    "empty": b"",
    "no end": b"\x80\x02}",
    "nothing on the stack": b".",
    "a mark is left": b"}(.",
    "pop of nothing": b"0.",
    "no mark": b"u.",
    "extension registry": b"\x82\x01.",
    "extension registry of four": b"\x84\1\0\0\0.",
    "out of band": b"\x97.",
    "unknown opcode": b"\xff.",
    "reference as text": b"P123\n.",
    "reference of another form": many(text("module"), *REFERENCE) + b"Q.",
    "reference too short": many(text("storage"), named("torch.FloatStorage")) + b"Q.",
    "reference of a string": text("storage") + b"Q.",
    "storage of a name": many(text("storage"), text("FloatStorage"), text("0"), text("cpu"), whole(4)) + b"Q.",
    "storage of a function": storage(kind="torch._utils._rebuild_tensor_v2") + b".",
    "negative size": mapping({"w": view(storage(numel=-1))}) + b".",
    "huge long": b"\x8b\xff\xff\xff\x7f" + b"\xff" * 64 + b".",
    "negative long": b"\x8b\xff\xff\xff\xff.",
    "digits": b"I" + b"9" * 10_000 + b"\n.",
    "no number": b"Iabc\n.",
    "string beyond the end": b"X\xff\xff\xff\xffabc.",
    "string of 2^63": b"\x8d" + b"\xff" * 7 + b"\x7fabc.",
    "no UTF-8": b"X\1\0\0\0\xff.",
    "memo that is not there": b"h\x05.",
    "memo of nothing": b"q\x05.",
    "odd items": b"}(K\1u.",
    "items of a number": b"K\1(K\1K\2u.",
    "append to a number": b"K\1K\2a.",
    "state of a number": b"K\1}b.",
    "call of a number": b"K\1)R.",
    "call without a tuple": named("collections.OrderedDict") + b"K\1R.",
    "call of a storage": storage() + b")R.",
    "name that is no string": b"K\1K\2\x93.",
    "OrderedDict of numbers": call("collections.OrderedDict", b"K\1") + b".",
    "size of a number": call("torch.Size", b"K\1") + b".",
    "tensor without arguments": call("torch._utils._rebuild_tensor_v2") + b".",
    "tensor of a string": call("torch._utils._rebuild_tensor_v2", text("0"), whole(0), many(), many()) + b".",
    "parameter of a string": call("torch._utils._rebuild_parameter", text("w"), b"\x89", b"N") + b".",
    "tensor at nested lists": call(
        "torch._utils._rebuild_tensor_v2", storage(), b"]" * 100_000 + b"a" * 99_999, many(), many()
    ) + b".",
    "OrderedDicts of one list, again and again": named("collections.OrderedDict") + b"q\x00]("
    + many(whole(1), whole(1)) * 3000 + b"eq\x01" + b"h\x00h\x01\x85R" * 3000 + b".",
    "class of a function": call(
        "torch._tensor._rebuild_from_type_v2", named("torch.Size"), named("torch.Tensor"), many(), b"N"
    ) + b".",
    "no dict": b"]K\1a.",
    "a number": b"K\1.",
    "nothing": b"}.",
    "names that are no strings": b"}(K\1" + view() + b"u.",
    "no Unicode": mapping({"w": b"N"})[:-1] + b"X\3\0\0\0\xed\xa0\x80" + view() + b"u.",
    "an array": mapping({
        "w": view(), "x": call("numpy.core.multiarray._reconstruct", named("numpy.ndarray"), many(whole(0)), b"K\0")
    }) + b".",
}  # fmt: skip


@pytest.mark.parametrize("case", PICKLES)
def test_damaged_pickles(tmp_path, case):
    path = made.put(tmp_path / "x.bin", PICKLES[case], {"0": bytes(16)})
    assert refusal(path).startswith(f"{path}: ")


def test_persistent_storages(tmp_path):
    """The same storage twice is right; of two kinds, or sizes, it is not."""
    tensors = {"a": view(), "b": view()}
    made.put(tmp_path / "x.bin", pickled(mapping(tensors)), {"0": bytes(16)})
    a, b = open_checkpoint(str(tmp_path / "x.bin")).tensors.values()
    assert (a.start, a.nbytes) == (b.start, b.nbytes)
    for other in (storage(kind="torch.IntStorage"), storage(numel=3)):
        made.put(tmp_path / "x.bin", pickled(mapping({"a": view(), "b": view(other, shape=(1, 1))})), {"0": bytes(16)})
        assert "the storage `0` is of two kinds or sizes" in refusal(tmp_path / "x.bin")


VIEWS = {
    "too long": ((storage(), 0, (3, 2), (2, 1)), "it ends at byte 24 of its storage, which has 16"),
    "too far": ((storage(), 1, (2, 2), (2, 1)), "it ends at byte 20 of its storage, which has 16"),
    "strides too long": ((storage(), 0, (2, 2), (4, 1)), "it ends at byte 24 of its storage, which has 16"),
    "another storage": ((storage("1"), 0, (2, 2), (2, 1)), "its storage `1` is not in the file"),
    "leading out": ((storage("../data/0"), 0, (2, 2), (2, 1)), "its storage `../data/0` is not in the file"),
    "short storage": ((storage(numel=5), 0, (2, 2), (2, 1)), "its storage `0` has 16 bytes, and 20 are named"),
    "negative offset": ((storage(), -1, (2, 2), (2, 1)), "whose place is no number from 0 up, `-1`"),
    "negative stride": ((storage(), 3, (2, 2), (-2, 1)), "whose place is no number from 0 up, `-2`"),
    "negative length": ((storage(), 0, (-2, 2), (2, 1)), "whose place is no number from 0 up, `-2`"),
    "two lengths, one stride": ((storage(), 0, (2, 2), (1,)), "a tensor without shape or strides"),
    "more than 2^63": ((storage(), 0, (2**40, 2**40), (0, 0)), "has more than 2^63 - 1 elements"),
    "expanded": ((storage(), 0, (2**20, 2**20), (0, 0)), "an expanded tensor of that size is not read"),
    "many dimensions": ((storage(), 0, (1,) * 500, (1,) * 500), "a tensor of 500 dimensions"),
}  # fmt: skip


@pytest.mark.parametrize("case", VIEWS)
def test_views_that_do_not_fit(tmp_path, case):
    args, expected = VIEWS[case]
    made.put(tmp_path / "x.bin", pickled(mapping({"w": view(*args)})), {"0": bytes(16)})
    assert expected in refusal(tmp_path / "x.bin")


BOMBS = {
    "lists in lists": b"]" * 1_000_000 + b"a" * 999_999,
    "tuples in tuples": b")" + b"\x85" * 1_000_000,
    "a tuple of tuples as a key": b"}(" + b")" + b"\x85" * 500_000 + b"K\1u",
    "dicts that double": b"}q\0" + b"(h\0h\0tq\0" * 50_000,
    "strings": text("x" * 1000) + b"2" * 1_000_000 + b"0" * 1_000_000,
    "a dict in itself": b"}q\0(" + text("a") + b"h\0u",
    "a list in itself": b"]q\0h\0a",
    "a large memo": b"Nr\xff\xff\xff\xff",
}


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.slow] * (" in " in c or "key" in c)) for c in BOMBS]
)
def test_bombs_beside_tensors_do_no_harm(tmp_path, case):
    """They are values of no use: left out in bounded time and memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = open_checkpoint(str(made.file_of(tmp_path / "x.bin", bomb=BOMBS[case])))
    assert list(found.tensors) == ["w"] and "left out, because they are no tensors: `bomb`" in found.remarks[0]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # KB


@pytest.mark.slow
@pytest.mark.parametrize("piece", [b"]", b"}", b"N0", b"(", b")2"])
def test_too_many_opcodes(tmp_path, piece):
    path = made.put(tmp_path / "x.bin", piece * (4_500_000 // len(piece)))
    assert "more than the allowed 4,000,000 opcodes" in refusal(path)


def test_large_pickles_are_not_read(tmp_path):
    with open(tmp_path / "x.bin", "wb") as stream:
        stream.write(zipped([Entry("archive/data.pkl", b"")])[:-22])
        stream.truncate(200_000_000)
    head = zipped([Entry("archive/data.pkl", b"", claimed=(100_000_001, 100_000_001, 0))])
    raw = bytearray(head[:46] + bytes(100_000_001 - 0) + head[46:])
    struct.pack_into("<LL", raw, 18, 100_000_001, 100_000_001)
    struct.pack_into("<L", raw, len(raw) - 6, struct.unpack_from("<L", raw, len(raw) - 6)[0] + 100_000_001)
    (tmp_path / "x.bin").write_bytes(raw)
    assert "its pickle has 100000001 bytes, more than the allowed 100000000" in refusal(tmp_path / "x.bin")


RIGHT = made.archive(pickled(mapping({"w": view()})), {"0": bytes(range(16))})
ZIPS = {
    "a name twice": (zipped([*RIGHT, RIGHT[2]]), "two entries are called `archive/data/0`"),
    "another name in the header": (
        zipped([RIGHT[0], RIGHT[1], RIGHT[2]._replace(here=("archive/data/1", 0)), RIGHT[3]]),
        "the entry `archive/data/0` is not at byte",
    ),
    "another method in the header": (
        zipped([*RIGHT[:3], RIGHT[3]._replace(here=(RIGHT[3].name, 8))]), "the directory and the entry",
    ),
    "another size in the directory": (
        zipped([*RIGHT[:2], RIGHT[2]._replace(claimed=(8, 8, None)), RIGHT[3]]), "contradict each other",
    ),
    "an entry in another": (
        zipped([*RIGHT, RIGHT[3]._replace(name="archive/x", claimed=(None, None, 0))]), "is not at byte 0",
    ),
    "an offset beyond": (zipped([*RIGHT, Entry("archive/x", b"", claimed=(None, None, 10**9))]), "is not at byte"),
    "an offset of 2^64": (
        zipped([*RIGHT, Entry("archive/x", b"", claimed=(None, None, 2**64 - 1))], wide=True), "is not at byte",
    ),
    "encrypted": (zipped([*RIGHT[:3], RIGHT[3]._replace(flags=0x801)]), "is encrypted"),
    "a link": (zipped([*RIGHT, Entry("archive/x", b"/etc/passwd", mode=0o120777)]), "is a link, or leads out"),
    "leading out": (zipped([*RIGHT, Entry("archive/../../x", b"")]), "is a link, or leads out of the file"),
    "absolute": (zipped([*RIGHT, Entry("/etc/passwd", b"")]), "is a link, or leads out of the file"),
    "more entries than there are": (zipped(RIGHT, count=9), "the zip file is damaged"),
    "fewer entries than there are": (zipped(RIGHT, count=2), "the zip file is damaged: the directory has"),
    "no pickle": (zipped(RIGHT[1:]), "not one that torch.save wrote: it has no data.pkl"),
    "nothing": (zipped([]), "not one that torch.save wrote"),
    "cut off": (zipped(RIGHT)[:-30], "the directory at its end is missing: truncated"),
    "only the start": (b"PK\3\4", "the directory at its end is missing: truncated"),
    "in two parts": (zipped(RIGHT)[:-18] + b"\1\0\1\0" + zipped(RIGHT)[-14:], "has several parts"),
    "other numbers": (zipped(made.archive(RIGHT[0].data, order=b"middle")), "its byte order is `middle`"),
}  # fmt: skip


@pytest.mark.parametrize("case", ZIPS)
def test_zip_files_that_contradict_themselves(tmp_path, case):
    content, expected = ZIPS[case]
    (tmp_path / "x.bin").write_bytes(content)
    assert expected in refusal(tmp_path / "x.bin")


def test_entries_that_overlap(tmp_path):
    """Two entries of the directory whose bytes overlap, each with a header of its own."""
    inner = zipped([Entry("archive/data/1", bytes(4))])[:48]
    entries = [*RIGHT[:2], Entry("archive/data/0", inner + bytes(16)), RIGHT[3]]
    whole_file = zipped(entries)
    at = whole_file.index(inner)
    (tmp_path / "x.bin").write_bytes(zipped([*entries, Entry("archive/data/1", bytes(4), claimed=(None, None, at))]))
    assert "two entries overlap at byte" in refusal(tmp_path / "x.bin")


def test_a_comment_behind_the_directory(tmp_path):
    """It belongs to the format, also where it looks like an end."""
    (tmp_path / "x.bin").write_bytes(zipped(RIGHT, tail=b"PK\5\6 a comment"))
    assert list(open_checkpoint(str(tmp_path / "x.bin")).tensors) == ["w"]


def mutated(content: bytes, draw: random.Random) -> bytes:
    """The content with a few bytes changed, cut out, doubled or put in; mostly in pickle and directory."""
    raw = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 4))):
        at = draw.randrange(len(raw))
        kind = draw.randrange(6)
        if kind < 3:
            raw[at] = draw.choice((0, 1, 0x7F, 0xFF, draw.randrange(256), raw[at] ^ 1 << draw.randrange(8)))
        elif kind == 3:
            del raw[at : at + draw.choice((1, 4, 40))]
        elif kind == 4:
            raw[at:at] = raw[at : at + draw.choice((1, 9, 60))]
        else:
            raw[at : at + 4] = draw.randrange(2**32).to_bytes(4, "little")
    return bytes(raw)


@pytest.mark.parametrize("seed", [0, 1, pytest.param(2, marks=pytest.mark.slow)])
def test_mutated_files(tmp_path, seed):
    """Each is read to the end or refused by a CheckpointError, and what is read lies in the file."""
    torch = pytest.importorskip("torch")
    draw = random.Random(seed)
    x = torch.arange(12.0).reshape(3, 4)
    state = {"a": x, "b": x.T, "c": torch.nn.Parameter(x[1:].half()), "n": torch.tensor(3), "s": "text", "f": 0.5}
    torch.save({"state_dict": state, "epoch": 1} if seed else state, tmp_path / "x.pt")
    right = (tmp_path / "x.pt").read_bytes()
    path, read = tmp_path / "y.pt", 0
    for _ in range(300 if seed < 2 else 2_000):
        path.write_bytes(mutated(right, draw))
        try:
            found = open_checkpoint(str(path))
        except CheckpointError:
            continue
        read += 1
        for entry in found.tensors.values():
            assert entry.start >= 0 and (entry.conversion is not None or entry.start + entry.nbytes <= len(right) + 200)
            if entry.conversion is not None and entry.nbytes < 10**6:
                assert len(b"".join(entry.conversion.pieces(str(path)))) == entry.nbytes
    assert read


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_mutated_pickles(tmp_path, seed):
    """The same with the zip file right, so that the pickle's reader sees more of it."""
    draw = random.Random(seed)
    right = pickled(mapping({"w": view(), "x": mapping({"a": many(whole(1), b"N", b"\x88"), "b": b"](K\1K\2e"})}))
    path = tmp_path / "y.pt"
    for _ in range(300 if seed == 0 else 3_000):
        made.put(path, mutated(right, draw), {"0": bytes(16)})
        with suppress(CheckpointError):
            open_checkpoint(str(path))
    assert "OWNED" not in os.listdir(tmp_path) and "antigravity" not in sys.modules

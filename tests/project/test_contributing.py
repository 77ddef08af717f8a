"""What CONTRIBUTING.md says of additions, as far as tests can: tables that belong together are equal."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import click
import pytest

import fastinterp
from fastinterp import cli
from fastinterp.backends import registry
from fastinterp.backends.registry import DeviceSpec, device_spec, find_devices, gpu_backends
from fastinterp.errors import BackendError
from fastinterp.ops.dtypes import F64, MERGING
from fastinterp.reference.decode import DECODERS
from tests.support import codes
from tests.support.backends import ISAS
from tests.support.checkpoints import assert_same, family, read, recipe, saved
from tests.support.devices.fake_device import FakeDevice

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"


def text(path: str) -> str:
    return (ROOT / path).read_text("utf-8")


# --- dtypes ----------------------------------------------------------------------------------------------------------

NAMES = [d.name for d in MERGING]


def test_codes_of_dtypes_follow_each_other():
    assert [d.code for d in MERGING] == list(range(len(MERGING)))


def test_dtypes_of_csrc():
    """Codes, count, and the order of the tables of kernels."""
    header, loops = text("csrc/dtypes.h"), text("csrc/cpu/loops.inc")
    (enum,) = re.findall(r"enum class DType : int \{([^}]*)\}", header)
    assert re.findall(r"(\w+) = (\d+)", enum) == [(d.name, str(d.code)) for d in MERGING]
    assert re.findall(r"kDTypes = (\d+)", header) == [str(len(MERGING))]
    (table,) = re.findall(r"#define FI_EACH_DTYPE\(X\)(.*?)\}", loops, re.DOTALL)
    assert re.findall(r"DType::(\w+)", table) == NAMES


@pytest.mark.parametrize("dtype", [d for d in MERGING if d is not F64], ids=str)
def test_layouts_of_csrc(dtype):
    (body,) = re.findall(rf"struct Format<DType::{dtype}> \{{(.*?)\n\}};", text("csrc/dtypes.h"), re.DOTALL)
    constants = {name: int(number, 0) for name, number in re.findall(r"(k\w+) = (0x[0-9a-f]+|\d+)", body)}
    layout = dtype.layout
    assert layout is not None
    want = (layout.mantissa, layout.bias, layout.infinite, layout.nan, layout.largest, layout.sign)
    if layout.nan == layout.largest + 1:  # the code behind the largest is its NaN
        want = (*want[:2], layout.nan, *want[3:])
    assert tuple(constants[name] for name in ("kMant", "kBias", "kInf", "kNan", "kMax", "kSign")) == want
    assert f"using Bits = uint{dtype.bits}_t;" in body


@pytest.mark.parametrize("dtype", MERGING, ids=str)
def test_switches_over_dtypes(dtype):
    """Of the CUDA kernels: elements are loaded, one by one and in units, and stored."""
    sums, values, stores = (text(f"csrc/cuda/{name}.h") for name in ("sums", "values", "stores"))
    assert f"widen_at<T, DType::{dtype}>(" in sums and f"widen_unit_of<T, DType::{dtype}>(" in values
    assert re.search(rf"(code_by|narrow)<DType::{dtype},", sums)
    assert re.search(rf"store_unit_(by|as)<DType::{dtype},", stores)


# --- instruction sets ------------------------------------------------------------------------------------------------


def test_instruction_sets():
    files = {path.stem for path in (CSRC / "cpu").glob("*.cpp")} - {"backend"}
    assert sorted(files) == sorted(ISAS)
    assert sorted(re.findall(r"^ *add_isa\((\w+)", text("CMakeLists.txt"), re.MULTILINE)) == sorted(ISAS)
    assert sorted(re.findall(r"^namespace (?!fi\b)(\w+)", text("csrc/cpu/backend.h"), re.MULTILINE)) == sorted(ISAS)
    table = text("csrc/cpu/backend.cpp").partition("kBackends[]")[2].partition("};")[0]
    assert sorted(re.findall(r"&(\w+)::kBackend", table)) == sorted(ISAS)
    for isa in ISAS:
        source = text(f"csrc/cpu/{isa}.cpp")
        assert f"#define FI_ISA {isa}\n" in source and f'#define FI_ISA_NAME "{isa}"\n' in source


# --- input formats ---------------------------------------------------------------------------------------------------


def test_decoders_of_csrc_are_those_of_the_reference():
    """A row of the table each, and a file in the build: what is compiled for one instruction set is for all."""
    files = sorted(path for path in (CSRC / "decoders").glob("*.cpp") if path.stem != "table")
    constants: dict[str, str] = {}
    for path in files:
        found = dict(re.findall(r'^const Decoder (k\w+) = \{"(\w+)"', path.read_text("utf-8"), re.MULTILINE))
        assert found, f"{path.name} has no decoder"
        assert not found.keys() & constants.keys()
        constants |= found
    assert sorted(constants.values()) == sorted(DECODERS)
    (table,) = re.findall(r"kDecoders\[\] = \{([^}]*)\}", text("csrc/decoders/table.cpp"))
    assert sorted(re.findall(r"&(k\w+)", table)) == sorted(constants)
    (compiled,) = re.findall(r"^set\(decoders ([^)]*)\)", text("CMakeLists.txt"), re.MULTILINE)
    assert sorted(compiled.split()) == sorted(f"csrc/decoders/{path.name}" for path in (*files, CSRC / "table.cpp"))


@pytest.mark.parametrize("name", [n for n in DECODERS if not re.match(r"i?q\d|gguf", n)])
def test_decoders_have_cases(name):
    """Those of GGUF's blocks are compared with the package gguf instead, type by type."""
    assert name in {tensor.name for tensor in codes.every()}


# --- device backends -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", registry._BACKENDS)
def test_modules_of_backends(name):
    path = ROOT / "fastinterp" / "backends" / (registry._BACKENDS[name].module.replace(".", "/") + ".py")
    functions = set(re.findall(r"^def (\w+)", path.read_text("utf-8"), re.MULTILINE))
    assert {"missing", "device_count", "device"} <= functions


@pytest.fixture
def toy(monkeypatch):
    """A backend of two devices on host memory: a module, and its row."""
    devices = [FakeDevice(i) for i in range(2)]
    module = SimpleNamespace(missing=lambda: "", device_count=lambda: 2, device=lambda i: devices[i])
    monkeypatch.setitem(sys.modules, "fastinterp.backends.toy", module)
    monkeypatch.setitem(registry._BACKENDS, "toy", registry._Row("toy", {}, ("toy",)))
    return module


def test_a_backend_is_a_module_and_a_row(toy, tmp_path):
    assert device_spec("toy:1") == DeviceSpec("toy", (1,))
    assert find_devices(device_spec("toy:1,0")) == [toy.device(1), toy.device(0)]
    assert gpu_backends()["toy"] is None
    values = recipe("linear", saved(tmp_path, family(2)), weights=[0.5, 0.5])
    fastinterp.merge(values, tmp_path / "toy", device="toy")
    fastinterp.merge(values, tmp_path / "cpu", device="cpu")
    assert_same(read(tmp_path / "cpu"), read(tmp_path / "toy"))
    assert toy.device(0).pieces


def test_what_a_backend_misses_is_said(toy, monkeypatch):
    toy.missing = lambda: "it is broken"
    with pytest.raises(BackendError, match=r"'toy' cannot be used: toy: it is broken\. Usable"):
        find_devices(device_spec("toy"))
    monkeypatch.setitem(registry._BACKENDS, "toy", registry._Row("toy", {"no_such": "install it"}, ("toy",)))
    with pytest.raises(BackendError, match="toy: no_such is missing: install it"):
        find_devices(device_spec("toy"))


def test_cuda_is_served_by_its_own_backends(toy, monkeypatch):
    monkeypatch.setattr(registry, "built", lambda module: False)
    with pytest.raises(BackendError, match=r"device 'cuda' cannot be used: cuda: .*; triton: "):
        find_devices(device_spec("cuda"))


# --- commands --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", cli._MODULES)
def test_commands_are_described(name):
    """A first sentence for `fastinterp --help`, an example, and help for every option."""
    assert isinstance(cli.commands, click.Group)
    command = cli.commands.get_command(click.Context(cli.commands), name)
    assert command is not None and command.help is not None
    assert command.help.partition("\n")[0].endswith((".", ":")) and f"fastinterp {name}" in command.help
    assert [p.name for p in command.params if isinstance(p, click.Option) and not p.help] == []


def test_every_module_of_commands_has_a_row():
    modules = {path.stem for path in (ROOT / "fastinterp" / "cli").glob("*.py")}
    helpers = {"__init__", "blas", "complete", "faults", "grammar", "mergekit", "options", "progress", "ranges"}
    assert modules - helpers == {m.rpartition(".")[2] for m in cli._MODULES.values() if m.startswith("fastinterp.cli.")}

"""Which device a merge runs on: what `--device` means, what is missing, and what `auto` chooses and says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import fastinterp
from fastinterp.backends import registry as backends
from fastinterp.backends import torch_device as resident_devices
from fastinterp.backends.registry import DeviceSpec, device_spec, find_devices
from fastinterp.errors import BackendError, RecipeError, UsageError
from fastinterp.execute import device_choice
from fastinterp.execute.device.executor import SLOT_BYTES, SLOTS, device_window, slots_of
from fastinterp.execute.rounds import DeviceUsage, PumpExecutor
from fastinterp.inspect.explain import Explanation
from fastinterp.ops.dtypes import BF16
from fastinterp.plan.plan import Plan
from fastinterp.system import doctor
from tests.cli.test_cli import run as command
from tests.support.checkpoints import family, recipe, saved, write_sparse
from tests.support.devices.fake_device import FakeDevice, Fault
from tests.support.written import tree


def have(monkeypatch: pytest.MonkeyPatch, **counts: int | str) -> None:
    """Backends that have so many devices, or why they have none."""

    def found(name: str) -> backends._Backend:
        given = counts.get(name, "not built")
        if isinstance(given, str):
            return backends._Backend(given, 0, backends._none)
        return backends._Backend(None, given, lambda i: SimpleNamespace(name=f"{name}:{i}"))

    monkeypatch.setattr(backends, "_backend", found)


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("cpu", DeviceSpec("cpu")),
        ("auto", DeviceSpec("auto")),
        ("cuda", DeviceSpec("cuda")),
        ("cuda:0", DeviceSpec("cuda", (0,))),
        ("cuda:2,0", DeviceSpec("cuda", (2, 0))),
        ("triton", DeviceSpec("triton")),
        ("triton:1", DeviceSpec("triton", (1,))),
    ],
)
def test_names_of_devices(text, spec):
    assert device_spec(text) == spec and str(spec) == text


@pytest.mark.parametrize(
    "given", ["", "gpu", "CUDA", "cuda:", "cuda:-1", "cuda:0,", "cuda: 0", "cpu:0", "cuda:a", "auto:1", None, 0]
)
def test_other_names_are_refused(given):
    with pytest.raises(BackendError, match=r"device .* cannot be used. Known: auto, cpu, cuda, triton"):
        device_spec(given)


def test_a_device_is_named_once():
    with pytest.raises(BackendError, match="repeats a device"):
        device_spec("cuda:1,1")


def test_cuda_is_the_extension_if_it_was_built(monkeypatch):
    have(monkeypatch, cuda=2, triton=2)
    assert [d.name for d in find_devices(device_spec("cuda"))] == ["cuda:0"]
    assert [d.name for d in find_devices(device_spec("cuda:1,0"))] == ["cuda:1", "cuda:0"]
    assert [d.name for d in find_devices(device_spec("triton:1"))] == ["triton:1"]
    assert find_devices(device_spec("cpu")) == find_devices(device_spec("auto")) == []
    monkeypatch.setenv("FASTINTERP_GPU", "triton")
    assert [d.name for d in find_devices(device_spec("cuda"))] == ["triton:0"]
    monkeypatch.delenv("FASTINTERP_GPU")
    have(monkeypatch, cuda="no driver", triton=1)
    assert [d.name for d in find_devices(device_spec("cuda"))] == ["triton:0"]


def test_processes_of_one_machine_take_a_device_each(monkeypatch):
    """And begin again where there are more processes than devices; what was asked for by number is what each takes."""
    have(monkeypatch, cuda=2)
    assert [find_devices(device_spec("cuda"), local)[0].name for local in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert [d.name for d in find_devices(device_spec("cuda:1"), 0)] == ["cuda:1"]
    ones = (
        DeviceUsage(("cuda:0 A (cuda)",), {"copies": 1, "empty": 2}, 3),
        DeviceUsage(("cuda:1 A (cuda)",), {"copies": 1}, 1),
    )
    assert DeviceUsage.together([*ones, ones[0]]) == DeviceUsage(
        ("cuda:0 A (cuda)", "cuda:1 A (cuda)"), {"copies": 3, "empty": 4}, 7
    )


def test_what_is_missing_is_said(monkeypatch):
    have(monkeypatch, cuda="no driver", triton="torch is not there")
    with pytest.raises(BackendError) as told:
        find_devices(device_spec("cuda:1"))
    assert str(told.value) == (
        "device 'cuda:1' cannot be used: cuda: no driver; triton: torch is not there. Usable here: auto, cpu"
    )
    with pytest.raises(BackendError, match="device 'triton' cannot be used: triton: torch is not there"):
        find_devices(device_spec("triton"))
    monkeypatch.setenv("FASTINTERP_GPU", "cuda")
    with pytest.raises(BackendError, match=r"device 'cuda' cannot be used: cuda: no driver. Usable"):
        find_devices(device_spec("cuda"))
    monkeypatch.setenv("FASTINTERP_GPU", "rocm")
    with pytest.raises(BackendError, match=r"FASTINTERP_GPU=rocm is no backend. Known: cuda, triton"):
        find_devices(device_spec("cuda"))
    monkeypatch.delenv("FASTINTERP_GPU")
    have(monkeypatch, cuda=2)
    with pytest.raises(BackendError, match=r"'cuda:0,5': there is no device 5. There are cuda:0, cuda:1"):
        find_devices(device_spec("cuda:0,5"))


def test_without_a_build_the_remedy_is_told(monkeypatch):
    monkeypatch.setattr(backends, "built", lambda module: False)
    with pytest.raises(BackendError, match=r"FASTINTERP_CUDA=1 pip install \..*pip install 'fastinterp"):
        find_devices(device_spec("cuda"))
    assert not backends.maybe_devices()


@pytest.mark.parametrize("place", ["path", "toolkit", "none"])
def test_the_remedy_is_about_the_nvcc_that_is_there(monkeypatch, tmp_path, place):
    """Who has nvcc is not told to install it; one that is not on PATH is named to CMake."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(backends, "built", lambda module: False)
    monkeypatch.setattr(backends, "_NVCC", str(nvcc) if place == "toolkit" else str(tmp_path / "none"))
    monkeypatch.setenv("PATH", str(tmp_path) if place == "path" else str(tmp_path / "empty"))

    why = backends.gpu_backends()["cuda"]

    built = "FASTINTERP_CUDA=1 pip install ."
    there = (
        f"fastinterp was built with FASTINTERP_CUDA=0, or before nvcc ({nvcc}) was there. In the folder of its source"
    )
    assert (
        why
        == {
            "path": f"fastinterp._cuda is missing: {there}: {built}",
            "toolkit": f"fastinterp._cuda is missing: {there}: CUDACXX={nvcc} {built}",
            "none": "fastinterp._cuda is missing: fastinterp was built without nvcc. Install the CUDA toolkit, then "
            f"build again. In the folder of its source: {built}",
        }[place]
    )


# --- auto ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def driver(monkeypatch, tmp_path):
    """As if a driver and the extension were there."""
    path = tmp_path / "driver"
    path.touch()
    monkeypatch.setattr(backends, "_DRIVERS", (str(path),))
    monkeypatch.setattr(backends, "built", lambda module: True)
    monkeypatch.setattr(device_choice, "built", lambda module: True)


def planned(folder: Path, method: str, numel: int = 10**9, **keys: Any) -> tuple[Plan, dict[str, Any]]:
    """Of three models of so many elements, which take no room."""
    paths = []
    for name in "abc":
        path = write_sparse(folder / name / "model.safetensors", {"w": (numel // 1000, 1000)}, BF16)
        (path.parent / "config.json").write_text('{"model_type": "llama"}')
        paths.append(str(path.parent))
    asked = (
        recipe(method, paths, weights=[0.5, 0.3, 0.2])
        if method == "linear"
        else recipe(method, paths[1:], base_model=paths[0], weights=[0.5, 0.5], **keys)
    )
    return fastinterp.explain(asked).plan, asked


def test_sums_stay_on_the_processor(tmp_path):
    """They are bound by the files, which both must read and write."""
    plan, _ = planned(tmp_path, "linear")
    for threads in (2, 8, 64):
        choice = device_choice.choose([plan], threads, 1 << 29)
        assert choice.device == "cpu" and choice.cpu_s < choice.device_s


def test_long_arithmetic_on_few_cores_goes_to_the_device(tmp_path, driver):
    plan, _ = planned(tmp_path, "ties", 10**10, parameters={"density": 0.5})
    few, many = (device_choice.choose([plan], threads, 1 << 29) for threads in (2, 64))
    assert (few.device, many.device) == ("cuda", "cpu")
    assert few.device_s < few.cpu_s and many.cpu_s < many.device_s
    assert few.why.startswith("--device auto chose cuda: about ") and " with cuda, " in few.why
    small, _ = planned(tmp_path / "small", "ties", 10**6, parameters={"density": 0.5})
    assert device_choice.choose([small], 2, 1 << 29).device == "cpu"  # the start takes longer


def test_the_estimate_follows_its_constants(tmp_path, driver):
    """One thread, one file: read and written at their rates, a twentieth of a nanosecond for each input's element."""
    plan, _ = planned(tmp_path, "linear", 10**9)
    choice = device_choice.choose([plan], 1, 1 << 29)
    copies = 6 / device_choice.READ_GB_S + plan.bytes_written / 1e9 / device_choice.WRITE_GB_S
    assert choice.cpu_s == pytest.approx(copies + 3 * device_choice.PLAIN_NS)
    start = device_choice.CONTEXT_S + SLOTS * SLOT_BYTES / device_choice.PIN_GB_S / 1e9
    assert choice.device_s == pytest.approx(start + copies)


def test_more_threads_have_more_slots():
    """A thread that reads or writes has one of its own, as far as half of --max-memory allows."""
    assert [slots_of(n) for n in (1, 8, 16, 24, 32, 64)] == [8, 8, 12, 18, 24, 24]
    assert device_window(1 << 40, 2, 64) == 2 * 24 * SLOT_BYTES
    assert device_window(1 << 28, 2, 64) == 1 << 27


def test_explain_says_what_auto_would_choose(tmp_path, driver, monkeypatch):
    plan, _ = planned(tmp_path, "linear", 10**6)
    explanation = Explanation(plan, 2, 1 << 29)
    assert explanation.as_dict()["auto"]["device"] == "cpu"
    (line,) = [line for line in str(explanation).splitlines() if line.startswith("device ")]
    assert "--device auto chose cpu: about" in line
    monkeypatch.setattr(backends, "_DRIVERS", ())
    assert explanation.as_dict()["auto"] is None and "device " not in str(explanation)


@pytest.mark.parametrize("chosen", ["cpu", "cuda"])
def test_auto_merges_where_it_chose(tmp_path, driver, monkeypatch, chosen):
    paths = saved(tmp_path, family(2))
    asked = recipe("linear", paths, weights=[0.5, 0.5])
    device = FakeDevice()
    monkeypatch.setattr(backends, "_backend", lambda name: backends._Backend(None, 1, lambda i: device))
    if chosen == "cuda":
        for name in ("CONTEXT_S", "READ_GB_S"):
            monkeypatch.setattr(device_choice, name, 0.0 if name == "CONTEXT_S" else device_choice.READ_GB_S)
        monkeypatch.setattr(device_choice, "PIN_GB_S", 1e9)
        monkeypatch.setattr(device_choice, "PLAIN_NS", 1e6)
    report = fastinterp.merge(asked, tmp_path / "out")
    assert report.chosen.startswith(f"--device auto chose {chosen}: about")
    assert report.chosen in str(report) and report.as_dict()["chosen"] == report.chosen
    assert (device.pieces > 0) == (chosen == "cuda") == report.device.startswith("cuda:0 Fake")
    want = fastinterp.merge(asked, tmp_path / "cpu", device="cpu")
    assert want.chosen == "" and tree(tmp_path / "cpu") == tree(tmp_path / "out")


def test_auto_says_why_a_device_that_it_chose_cannot_be_used(tmp_path, driver, monkeypatch):
    have(monkeypatch, cuda="no driver", triton="no driver either")
    monkeypatch.setattr(device_choice, "PLAIN_NS", 1e6)
    report = fastinterp.merge(recipe("linear", saved(tmp_path, family(2)), weights=[0.5, 0.5]), tmp_path / "out")
    assert "chose cuda" in report.chosen and "; but device 'cuda' cannot be used: cuda: no driver" in report.chosen
    assert report.device.startswith("cpu ")


@pytest.fixture
def eager(driver, monkeypatch):
    """`auto` chooses the device, whatever there is to do."""
    for name, value in (("CONTEXT_S", 0.0), ("PIN_GB_S", 1e9), ("PLAIN_NS", 1e6)):
        monkeypatch.setattr(device_choice, name, value)


@pytest.mark.parametrize("call", ["memory", "host", "upload", "run", "download"])
def test_the_processor_finishes_what_a_device_that_auto_chose_leaves(tmp_path, eager, monkeypatch, call):
    """With a warning, whatever fails and whenever; the same failure of a device that was named is an error."""
    asked = recipe("linear", saved(tmp_path, family(2)), weights=[0.5, 0.5])
    want = fastinterp.merge(asked, tmp_path / "cpu", device="cpu")
    for at in (1, 2):
        device = FakeDevice(faults=[Fault(call, at)])
        monkeypatch.setattr(backends, "_backend", lambda name, d=device: backends._Backend(None, 1, lambda i: d))
        report = fastinterp.merge(asked, tmp_path / f"auto {at}")
        assert tree(tmp_path / "cpu") == tree(tmp_path / f"auto {at}")
        if at == 2 and device.calls[call] < at:
            continue  # all of it fits into one batch
        (told,) = [w for w in report.warnings if "a device failed, and its work was done by others: cuda:0 Fake: " in w]
        assert f"{call} {at} of cuda:0 failed on purpose" in told
        assert report.on_cpu["left by a device that failed"] and device.held == {"host": 0, "memory": 0}
        assert report.bytes_written == want.bytes_written
        with pytest.raises(BackendError, match="no device is left to merge on"):
            named = FakeDevice(faults=[Fault(call, at)])
            monkeypatch.setattr(backends, "_backend", lambda name, d=named: backends._Backend(None, 1, lambda i: d))
            fastinterp.merge(asked, tmp_path / f"named {at}", device="cuda")


def test_auto_needs_no_more_memory_than_the_processor(tmp_path, eager, monkeypatch):
    """With a limit that is enough for the processor alone, before the merge begins and in the middle of it."""
    asked = recipe("linear", saved(tmp_path, family(2)), weights=[0.5, 0.5])
    fastinterp.merge(asked, tmp_path / "cpu", device="cpu", max_memory=200_000, threads=1)
    device = FakeDevice()
    monkeypatch.setattr(backends, "_backend", lambda name: backends._Backend(None, 1, lambda i: device))
    report = fastinterp.merge(asked, tmp_path / "auto", max_memory=200_000, threads=1)
    assert tree(tmp_path / "cpu") == tree(tmp_path / "auto") and device.pieces == 0
    assert "; but --max-memory allows 200000 bytes, but merging on accelerators takes" in report.chosen

    def short(self: Any, steps: Any) -> Any:
        if self._window:
            raise UsageError("one thread needs more than --max-memory allows")
        return pump(self, steps)

    pump = PumpExecutor._pump
    monkeypatch.setattr(PumpExecutor, "_pump", short)
    monkeypatch.setattr(PumpExecutor, "_window", 0, raising=False)
    report = fastinterp.merge(asked, tmp_path / "later")
    assert tree(tmp_path / "cpu") == tree(tmp_path / "later")
    assert [w for w in report.warnings if "cuda:0 Fake: beside it, one thread needs more" in w]


def test_a_device_that_cannot_run_kernels_is_missing(tmp_path, eager, monkeypatch):
    """The next backend is tried, and `auto` goes on with the processor; a device that was named is an error."""

    def open_one(index: int) -> Any:
        raise BackendError("cuda:0, Old, cannot be used: this build has no kernels for its compute capability, 7.0")

    def found(name: str) -> backends._Backend:
        if name == "cuda":
            return backends._Backend(None, 1, open_one)
        return backends._Backend("torch is not there", 0, backends._none)

    monkeypatch.setattr(backends, "_backend", found)
    report = fastinterp.merge(recipe("linear", saved(tmp_path, family(2)), weights=[0.5, 0.5]), tmp_path / "out")
    assert "; but device 'cuda' cannot be used: cuda: cuda:0, Old, cannot be used: this build" in report.chosen
    assert report.device.startswith("cpu ")
    assert backends.gpu_backends()["cuda"] == (
        "cuda:0, Old, cannot be used: this build has no kernels for its compute capability, 7.0"
    )
    with pytest.raises(BackendError, match=r"no kernels for its compute capability, 7.0; triton: torch is not there"):
        find_devices(device_spec("cuda:0"))


def test_looking_for_a_device_loads_nothing():
    """`auto`, where there is no driver, and where there is one but nothing built: torch stays away."""
    program = """
import sys
from fastinterp.backends import registry as backends
for drivers in ((), ("/",)):
    backends._DRIVERS = drivers
    backends.maybe_devices()
sys.exit(str(sorted({"torch", "triton", "numpy"} & sys.modules.keys())))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "[]"


# --- the command line ------------------------------------------------------------------------------------------------


def test_commands_take_a_device(tmp_path, monkeypatch):
    paths = saved(tmp_path, family(2))
    device = FakeDevice()
    monkeypatch.setattr(backends, "_backend", lambda name: backends._Backend(None, 1, lambda i: device))
    done = json.loads(
        command("interpolate", *paths, "--alpha", "0.5", "-o", str(tmp_path / "one"), "--device", "cuda", "--json")
    )
    assert done[0]["device"].startswith("cuda:0 Fake (fake), cpu ") and done[0]["on_cpu"]["not averaged"] == 3
    command("sweep", *paths, "--alphas", "0.5", "-o", str(tmp_path / "many"), "--device", "cuda:0")
    assert tree(tmp_path / "many" / "alpha_0.5").keys() == tree(tmp_path / "one").keys()


def test_doctor_names_the_backends(monkeypatch):
    have(monkeypatch, cuda=1, triton="torch is not there")
    for name, value in (("_PROBE_S", 0.01), ("_ARRAY", 1 << 16), ("_FILE", 1 << 20)):
        monkeypatch.setattr(doctor, name, value)
    monkeypatch.setenv("FASTINTERP_GPU", "cuda")
    found = doctor.examine()
    assert found["backends"] == {"cpu": None, "cuda": None, "triton": "torch is not there"}
    told = doctor.as_text(found)
    assert "backends    cpu, cuda, triton (not usable: torch is not there)" in told
    assert "FASTINTERP_GPU=cuda" in told and "unknown" not in told


def test_a_wrong_recipe_is_told_before_a_device_is_looked_for(tmp_path, monkeypatch):
    have(monkeypatch)
    with pytest.raises(RecipeError):
        fastinterp.merge({"merge_method": "linear", "models": []}, tmp_path / "out", device="cuda")


def test_tensors_on_a_device_use_the_backend_that_files_use(monkeypatch):
    """CUDA's kernels may have been built, but the driver may be too old for them, or AMD's."""
    have(monkeypatch, cuda="CUDA driver version is insufficient", triton=2)
    monkeypatch.setattr(resident_devices, "_opened", {})
    assert resident_devices.device_of(SimpleNamespace(index=1)).name == "triton:1"
    monkeypatch.setenv(backends.GPU_VARIABLE, "cuda")
    with pytest.raises(BackendError, match="driver version is insufficient"):
        resident_devices.device_of(SimpleNamespace(index=0))

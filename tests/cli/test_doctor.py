"""`fastinterp doctor`: what it finds on this machine, and what it says of settings that do not work."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from fastinterp.system import doctor
from tests.cli.test_cli import run


@pytest.fixture
def quick(monkeypatch):
    for name, value in (("_PROBE_S", 0.01), ("_ARRAY", 1 << 16), ("_FILE", 1 << 20)):
        monkeypatch.setattr(doctor, name, value)


def test_doctor_knows_this_machine(quick, monkeypatch):
    for name in [n for n in os.environ if n.startswith("FASTINTERP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("FASTINTERP_TEST", "1")
    found = json.loads(run("doctor", "--json"))
    assert found["isa"]["in_force"] in found["isa"]["usable"] and set(found["isa"]["usable"]) <= set(
        found["isa"]["built"]
    )
    assert found["packages"]["numpy"] == np.__version__ and found["environment"] == {"FASTINTERP_TEST": "1"}
    memory, files = found["bandwidth"]["memory"], found["bandwidth"]["files"]
    assert min(memory["combine_gb_per_s"], memory["copy_gb_per_s"], files["write_gb_per_s"]) > 0
    text = run("doctor")
    assert all(word in text for word in (found["cpu"], found["python"], "GB/s", "FASTINTERP_TEST=1 (unknown"))


def test_doctor_shows_a_setting_that_cannot_be_used(quick, monkeypatch):
    monkeypatch.setenv("FASTINTERP_ISA", "mmx")
    assert run("doctor").count("FASTINTERP_ISA=mmx, but this build has no such instruction set") == 1

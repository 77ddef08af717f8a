"""What a release is made of: its version, the pinned tools, the workflows, the contents of a wheel."""

from __future__ import annotations

import datetime
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from fastinterp._version import __version__
from release import sbom, try_wheel

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def pins(file: str) -> dict[str, set[str]]:
    """name, in lower case with hyphens -> versions, of which markers choose one."""
    found: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([\w.-]+)==([^\s;\\]+)", (ROOT / file).read_text("utf-8"), re.MULTILINE):
        found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), set()).add(version)
    return found


def test_the_changelog_begins_with_this_version_and_its_date():
    found = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    dated = re.fullmatch(r"(\S+) \((\d{4}-\d\d-\d\d), NUMERICS = (\d+)\)", found[0])
    assert dated is not None and dated[1] == __version__
    datetime.date.fromisoformat(dated[2])


def test_hashes_pin_the_versions_of_the_constraints():
    """Every tool of release/hashes.txt is pinned in constraints.txt, to the same versions, so that no other is used."""
    hashed, constrained = pins("release/hashes.txt"), pins("constraints.txt")
    assert {"setuptools", "cmake", "auditwheel", "cyclonedx-bom", "pytest", "ruff"} <= hashed.keys()
    assert {name: versions for name, versions in hashed.items() if not versions <= constrained.get(name, set())} == {}


def test_every_tool_has_hashes():
    text = (ROOT / "release" / "hashes.txt").read_text("utf-8")
    blocks = re.split(r"^(?=[\w.-]+==)", text, flags=re.MULTILINE)[1:]
    assert blocks
    assert [block.split()[0] for block in blocks if "--hash=sha256:" not in block] == []


def test_tools_that_are_asked_for_are_pinned():
    """By release/requirements.in: a name that is added there without `make hashes` is noticed."""
    asked = re.findall(r"^([\w-]+)", (ROOT / "release" / "requirements.in").read_text("utf-8"), re.MULTILINE)
    assert asked
    assert {name.lower() for name in asked} <= pins("release/hashes.txt").keys()


@pytest.mark.slow
def test_workflows_are_valid():
    """By the schema of GitHub, which check-jsonschema brings along."""
    assert len(WORKFLOWS) == 2
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "check_jsonschema",
        "--builtin-schema",
        "vendor.github-workflows",
        *WORKFLOWS,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.name)
def test_workflows_run_what_there_is(path):
    """Their make targets and scripts exist, and they get no more rights than they need."""
    workflow = yaml.safe_load(path.read_text("utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    commands = [step["run"] for step in steps if "run" in step]
    attacks = workflow["jobs"].get("attacks", {}).get("strategy", {}).get("matrix", {}).get("attack", [])
    assert commands and {*attacks, *re.findall(r"make ([a-z-]+)", "\n".join(commands))} <= targets
    assert all((ROOT / name).exists() for name in re.findall(r"(?:^|-r )(\S*/\S+)", "\n".join(commands), re.MULTILINE))


LICENCES = {"LICENSE": b"Apache", "NOTICE": b"notice", "csrc/third_party/LICENSE": b"BSD"}
GOOD = {
    "fastinterp/__init__.py": b"",
    "fastinterp/_C.cpython-311-x86_64-linux-gnu.so": b"\x7fELF",
    "fastinterp-0.2.0.dist-info/METADATA": b"",
    "fastinterp-0.2.0.dist-info/licenses/LICENSE": b"Apache",
    "fastinterp-0.2.0.dist-info/licenses/NOTICE": b"notice",
    "fastinterp-0.2.0.dist-info/licenses/csrc/third_party/LICENSE": b"BSD",
}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, []),
        ({"fastinterp-0.2.0.dist-info/licenses/LICENSE": None}, ["the licence LICENSE is not in it"]),
        ({"fastinterp-0.2.0.dist-info/licenses/csrc/third_party/LICENSE": b"other"},
         ["the licence csrc/third_party/LICENSE is not in it"]),
        ({"tests/test_x.py": b""}, ["tests/test_x.py is neither the package nor its metadata"]),
        ({"fastinterp/pump.cpp": b""}, ["fastinterp/pump.cpp is no file of a package"]),
        ({"fastinterp/_cuda.cpython-311-x86_64-linux-gnu.so": b""}, ["native code is the extension _C alone"]),
        ({"fastinterp/_C.cpython-311-x86_64-linux-gnu.so": b"\0.symtab\0"}, ["is not stripped"]),
        ({"fastinterp/_C.cpython-311-x86_64-linux-gnu.so": None}, ["it has no native code"]),
    ],
)  # fmt: skip
def test_wrong_contents_of_a_wheel_are_noticed(tmp_path, changes, said):
    for name, text in LICENCES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(text)
    wheel = tmp_path / "fastinterp-0.2.0-cp311-cp311-manylinux_2_28_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in (GOOD | changes).items():
            if content is not None:
                archive.writestr(name, content)
    found = try_wheel.wrong(wheel, tmp_path)
    assert len(found) == len(said) and all(part in line for part, line in zip(said, found, strict=True))


def test_parts_that_are_compiled_in_are_listed():
    """With version and licence, so that somebody who looks for a flaw in one finds it."""
    found = {part["name"]: part for part in sbom.compiled_in()}
    assert found.keys() == {"pybind11"} | (
        {"xxHash"} if (ROOT / "csrc" / "third_party" / "xxhash.h").exists() else set()
    )
    for part in found.values():
        assert re.fullmatch(r"\d+\.\d+\.\d+", part["version"]) and part["purl"].endswith(part["version"])
        assert re.fullmatch(r"BSD-\d-Clause", part["licenses"][0]["license"]["id"])

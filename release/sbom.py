"""The software bill of materials of a wheel: `python -m release.sbom VENV OUT.json`, in CycloneDX.

VENV has the wheel and what it requires, and nothing else (release/try_wheel.py makes it); `cyclonedx-py` lists that.
What is compiled into the extension is added: pybind11, and csrc/third_party/.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from fastinterp._version import __version__

ROOT = Path(__file__).resolve().parents[1]


def compiled_in() -> list[dict[str, Any]]:
    """Components of the extension: name, version, licence, address."""
    found = [("pybind11", version("pybind11"), "BSD-3-Clause", "pkg:pypi/pybind11@{}")]
    xxhash = ROOT / "csrc" / "third_party" / "xxhash.h"
    if xxhash.exists():
        numbers = re.findall(
            r"^#define XXH_VERSION_(?:MAJOR|MINOR|RELEASE) +(\d+)", xxhash.read_text("utf-8"), re.MULTILINE
        )
        found.append(("xxHash", ".".join(numbers), "BSD-2-Clause", "pkg:github/Cyan4973/xxHash@v{}"))
    return [
        {
            "type": "library",
            "bom-ref": f"compiled-in:{name}",
            "name": name,
            "version": number,
            "description": "compiled into fastinterp._C",
            "licenses": [{"license": {"id": licence}}],
            "purl": address.format(number),
        }
        for name, number, licence, address in found
    ]


def main() -> None:
    """Write the list of the environment that the command line names."""
    environment, out = sys.argv[1], Path(sys.argv[2])
    command = [
        "-m",
        "cyclonedx_py",
        "environment",
        environment,
        "--pyproject",
        "pyproject.toml",
        "--mc-type",
        "library",
    ]
    listed = subprocess.run(
        [sys.executable, *command, "--output-reproducible"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    document = json.loads(listed.stdout)
    native = compiled_in()
    document["components"] = [c for c in document["components"] if c["name"] != "fastinterp"] + native
    root = document["metadata"]["component"]
    root |= {"version": __version__, "purl": f"pkg:pypi/fastinterp@{__version__}"}
    refs = {c["bom-ref"] for c in document["components"]} | {root["bom-ref"]}
    depends = {d["ref"]: [x for x in d.get("dependsOn", []) if x in refs] for d in document["dependencies"]}
    depends = {ref: on for ref, on in depends.items() if ref in refs}
    depends[root["bom-ref"]] = sorted({*depends.get(root["bom-ref"], []), *(c["bom-ref"] for c in native)})
    depends |= {c["bom-ref"]: [] for c in native}
    document["dependencies"] = [
        {"ref": ref, **({"dependsOn": on} if on else {})} for ref, on in sorted(depends.items())
    ]
    text = json.dumps(document, indent=2) + "\n"
    if error := JsonStrictValidator(SchemaVersion.V1_6).validate_str(text):
        sys.exit(f"{out}: not valid CycloneDX: {error}")
    out.write_text(text, "utf-8")
    print(f"{out}: {len(document['components'])} components")


if __name__ == "__main__":
    main()

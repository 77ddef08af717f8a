"""Names that would control a terminal, in tensors, files, recipes, reports and arguments: none gets out as it is."""

from __future__ import annotations

import ast
import json
import os
import pty
import re
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.support.fault_server import FaultServer, Run
from tests.support.fault_survey import MODULES
from tests.support.models import save

# Colours, the title of the window, C1's CSI, a carriage return, a line that looks like another, marks of direction.
ESCAPES = "n\x1b[31mred\x1b]0;title\x07\x9b2J\x08\x7f\rover\nforged line\u202eleft\u2066\u200b"
IN_JSON = f"{ESCAPES}\0"  # which no name of a file can have
ARRAY = np.arange(8, dtype=np.float32).reshape(2, 4)


@pytest.fixture(scope="module")
def server() -> Iterator[FaultServer]:
    with FaultServer((*MODULES, "fastinterp.paths.report", "matplotlib.pyplot"), limit_s=60) as running:
        yield running


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models whose folders, tensors, metadata and configurations have such names; and recipes about them."""
    root = tmp_path_factory.mktemp("names")
    names = {"a": IN_JSON, "b": f"{IN_JSON}b"}
    for model, own in names.items():
        layers = {f"model.layers.{i}.{IN_JSON}.weight": ARRAY + i for i in range(2)}
        folder = save(root / f"{model}{ESCAPES}", {**layers, own: ARRAY}, metadata={IN_JSON: IN_JSON})
        (folder / "config.json").write_text(json.dumps({"model_type": IN_JSON, "architectures": [own]}))
        (folder / f"{ESCAPES}.txt").write_text("of unknown use")
        (folder / f"{ESCAPES}.bin").write_text("not weights")
    save(root / f"same{ESCAPES}", {f"model.layers.{i}.{IN_JSON}.weight": ARRAY + 3 * i for i in range(2)})
    save(root / f"other{ESCAPES}", {f"model.layers.{i}.{IN_JSON}.weight": ARRAY - i for i in range(2)})
    a, b = root / f"a{ESCAPES}", root / f"b{ESCAPES}"
    text = json.dumps({"merge_method": "linear", "models": [{"model": str(m)} for m in (a, b)]})
    (root / f"r{ESCAPES}.json").write_text(text)
    (root / "key.json").write_text(json.dumps({"merge_method": "linear", IN_JSON: 1, "models": [{"model": str(a)}]}))
    (root / "method.json").write_text(json.dumps({"merge_method": IN_JSON, "models": [{"model": str(a)}]}))
    (root / "model.json").write_text(json.dumps({"merge_method": "linear", "models": [{"model": IN_JSON}]}))
    (root / "parameter.json").write_text(
        json.dumps({"merge_method": "linear", "parameters": {IN_JSON: IN_JSON}, "models": [{"model": str(a)}]})
    )
    (root / "bad.yml").write_text(f"a: [\x1b[31m {ESCAPES}")
    points = [{"at": {IN_JSON: x}, "samples": {IN_JSON: [x]}, "strength": None, "changed_fraction": None,
               "relative_change": None} for x in (0.0, 1.0)]  # fmt: skip
    report = {"format": "fastinterp path report", "version": 1, "ends": {IN_JSON: str(a)}, "base": IN_JSON,
              "line": False, "seeds": [0], "probabilities": [], "points": points}  # fmt: skip
    (root / f"report{ESCAPES}.json").write_text(json.dumps(report))
    report["probabilities"] = [f"{IN_JSON}!"]
    (root / "report.json").write_text(json.dumps(report))
    (root / f"torn{ESCAPES}.safetensors").write_bytes(b"\xff" * 100)
    return root


# Arguments; %s is the folder, %e the characters. Models a and b have different tensors, `same` and `other` equal ones.
COMMANDS = """
merge %s/r%e.json %s/out%e
merge %s/key.json %s/out
merge %s/method.json %s/out
merge %s/model.json %s/out
merge %s/parameter.json %s/out
merge %s/bad.yml %s/out
merge %s/no%e.yml %s/out
merge %e %s/out
merge %s/r%e.json %s/x%e.bin
merge %s/r%e.json --dtype %e %s/out
interpolate %s/a%e %s/b%e -o %s/out --alpha 0.5
interpolate %s/a%e %s/b%e -o %s/out%e --alpha 0.5 --missing skip
interpolate %s/same%e %s/other%e -o %s/two%e --alphas 0,0.3,1 --force
interpolate %s/same%e %s/none%e -o %s/out
interpolate %s/same%e %s/torn%e.safetensors -o %s/out%e --alpha 0.5
interpolate a%e b%e -o %s/out --alpha %e
interpolate %s/same%e %s/other%e -o %s/same%e/in%e --alpha 0.5
average %s/same%e %s/other%e -o %s/mean%e --force
average %s/a%e %s/b%e -o %s/out
sweep %s/same%e %s/other%e -o %s/sweep%e --alphas 0:1:3 --force
sweep %s/a%e %s/b%e -o %s/out --alphas %e
sweep %s/same%e %s/other%e --alphas 0:1:3 --in-memory %e:%e
extract-lora %s/same%e --base %s/other%e -o %s/lora%e --rank 2
extract-lora %s/a%e --base %s/b%e -o %s/out --rank 2
check %s/r%e.json
check %s/key.json
check %s/method.json
check %s/bad.yml
check %s/no%e.yml
check %s/parameter.json
check %s/model.json
explain %s/r%e.json
explain %s/parameter.json
explain %s/no%e.yml
inspect %s/a%e
inspect %s/a%e --all
inspect %s/torn%e.safetensors
inspect %s/none%e
inspect %e
diff %s/a%e %s/b%e
diff %s/same%e %s/other%e
diff %s/same%e %s/other%e --all
diff %s/none%e %s/a%e
plot %s/report%e.json -o %s/figure%e.png
plot %s/report%e.json -o %s/figure%e.png --metric %e
plot %s/report.json -o %s/figure.png
plot %s/none%e.json -o %s/figure.png
plot %s/report%e.json -o %s/x.%e
explore %s/a%e %s/none%e
explore %s/a%e %s/b%e --report %s/report.json
methods %e
bench --size %e
doctor --%e
%e
--%e
merge --%e x y
inspect --json %s/a%e
check --json %s/r%e.json
explain --json %s/r%e.json
diff --json %s/same%e %s/other%e
inspect --json %s/none%e
""".strip().splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_no_name_controls_the_terminal(server, place, command):
    args = [part.replace("%s", str(place)).replace("%e", ESCAPES) for part in command.split()]
    run = server.run(args)
    assert run.code in (0, 1, 2, 3, 4), run
    assert "Traceback" not in run.err
    assert run.out + run.err, "nothing was said"
    _check(run)
    if "--json" in args and run.code == 0:
        json.loads(run.out)


def _check(run: Run) -> None:
    for text in (run.out, run.err):
        wrong = {c for c in text if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")}
        assert not wrong, f"{sorted(map(ascii, wrong))} in {text!a}"
        forged = [line for line in text.split("\n") if line.startswith("forged")]
        assert not forged, text


@pytest.mark.slow
def test_bytes_that_are_no_text_are_escaped(server, place, tmp_path):
    """A file name that is not UTF-8 comes as halves of surrogates, which stdout could not encode."""
    folder = save(Path(os.fsdecode(os.fsencode(tmp_path / "m") + b"\xff\xfe")), {"w": ARRAY})
    for args in (["inspect", folder], ["inspect", f"{folder}x"], ["merge", folder, "x"], ["check", folder]):
        run = server.run([str(a) for a in args])
        assert "Traceback" not in run.err and r"\udcff" in run.out + run.err, run
        _check(run)


@pytest.mark.slow
def test_on_a_terminal(place):
    """click takes escapes out where it writes to a file, but not on a terminal: only the program's own are there."""
    own, its = pty.openpty()
    command = [sys.executable, "-m", "fastinterp", "inspect", f"{place}/none{ESCAPES}"]
    done = subprocess.run(command, stdin=its, stdout=its, stderr=its, timeout=60, check=False)
    os.close(its)
    said = os.read(own, 1 << 16).decode()
    os.close(own)
    assert done.returncode == 3
    assert re.match(r"\x1b\[31mCheckpointError\x1b\[0m:\s", said) and r"\x1b[31mred" in said  # the rest may be indented
    assert said.count("\x1b") == 2 and "\u202e" not in said and "\nforged" not in said


def test_only_two_functions_write_to_the_terminal():
    """The gate is options.say and options.tell: whatever else wrote would not pass it."""
    package = Path(__file__).resolve().parents[2] / "fastinterp"
    writes = {"echo", "secho", "print", "print_exc", "showwarning"}
    found = {
        f"{path.relative_to(package)}: {ast.unparse(node)}"
        for path in package.rglob("*.py")
        if "bench" not in path.parts  # a tool of the project's own
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and (getattr(node.func, "id", "") in writes or getattr(node.func, "attr", "") in writes
             or ast.unparse(node.func) in ("sys.stdout.write", "sys.stderr.write"))
    }  # fmt: skip
    assert {one.partition(":")[0] for one in found} <= {"__main__.py", "cli/options.py", "cli/progress.py"}, found

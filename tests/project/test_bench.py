"""The benchmarks work and check what they time; nothing here looks at how long anything takes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from fastinterp.bench import checkpoints, command, provenance, race
from fastinterp.bench.check import Job, WrongAnswerError, allowed_error, check, read_tensors
from fastinterp.bench.checkpoints import SIZES, write_checkpoints
from fastinterp.checkpoint.open import open_checkpoint
from fastinterp.errors import CheckpointError, OutputError, UsageError
from tests.support.processes import started

ROOT = Path(__file__).resolve().parents[2]
TINY = SIZES["tiny"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_checkpoints(folder, TINY, shard_bytes=300_000)
    return folder


def invoke(*args: str) -> str:
    """stdout of `fastinterp bench ARGS`; its errors are raised."""
    done = CliRunner().invoke(command.bench, args, catch_exceptions=False, standalone_mode=False)
    return done.stdout


def run_bench(*args: object) -> subprocess.CompletedProcess[str]:
    """`fastinterp bench` in a process of its own, which is what it is made for."""
    program = [sys.executable, "-m", "fastinterp", "bench", *map(str, args)]
    return subprocess.run(program, capture_output=True, text=True, check=False, cwd=ROOT)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["average", "delta"])
def test_race_of_all_that_need_no_network(tmp_path, recipe):
    """Everybody's answer is checked, and the JSON says where it was measured; no scratch is left."""
    pytest.importorskip("torch")
    args = ["--size", "tiny", "--against", "copy,touch,naive", "--runs", 2, "--recipe", recipe, "--dir", tmp_path]
    done = run_bench(*args, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found["racers"]) == ["fastinterp", "copy", "touch", "naive"]
    for name, racer in found["racers"].items():
        assert len(racer["wall_s"]) == len(racer["cpu_s"]) == 2
        assert (racer["checked_elements"] > 200_000) == (name in ("fastinterp", "naive"))
        # Looked at every few milliseconds: of `cp` and `cat` of a tiny model perhaps never.
        assert racer["peak_anon_bytes"] > 0 or name in ("copy", "touch")
    assert found["racers"]["fastinterp"]["ratio"] == {"median": 1, "min": 1, "max": 1}
    assert found["inputs"] == {"average": 2, "delta": 3}[recipe]
    assert (found["cache"], found["cached"]) == ("warm", [1, 1])
    where = found["provenance"]
    assert where["cores"] == os.cpu_count() and where["isa"] and where["file_system"] != "unknown"
    assert str(tmp_path) not in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_models_of_ones_own(tiny, tmp_path):
    """They are raced on, not touched; the table names what was measured."""
    before = {p: p.stat().st_mtime_ns for p in tiny.rglob("*")}
    done = run_bench("--models", tiny, "--against", "copy", "--runs", 1, "--dir", tmp_path)
    assert done.returncode == 0, done.stderr
    first, _machine, head, *rows, small = done.stdout.splitlines()
    assert first.startswith("average of 2 checkpoints of ") and "warm page cache; 1 run" in first
    assert head.split()[:2] == ["wall", "s"]
    assert small.startswith("with models this small, most of the time is the start")
    assert [row.split()[0] for row in rows] == ["fastinterp", "copy"]
    assert before == {p: p.stat().st_mtime_ns for p in tiny.rglob("*")}


@pytest.mark.slow
def test_models_are_made_where_asked_and_kept(tmp_path):
    done = run_bench(
        "--models", tmp_path / "kept", "--size", "tiny", "--against", "copy", "--runs", 1, "--dir", tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_dir()) == ["base", "ft1", "ft2", "kept"]


@pytest.mark.slow
def test_interrupt_leaves_nothing(tmp_path):
    """Not the scratch folder, and not the command that was running."""
    args = ["--size", "tiny", "--against", "copy", "--runs", "1000", "--dir", str(tmp_path)]
    program = [sys.executable, "-m", "fastinterp", "bench", *args]
    with started(program, stderr=subprocess.PIPE, cwd=ROOT) as child:
        assert child.stderr is not None
        for line in child.stderr:
            if line.startswith("round 1 of 1000: copy"):
                break
        child.send_signal(signal.SIGINT)
        assert "Traceback" not in child.communicate(timeout=60)[1]
    assert child.returncode not in (0, None)
    assert list(tmp_path.iterdir()) == []
    assert str(tmp_path) not in commands_running()


def commands_running() -> str:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().decode(errors="replace"))
        except OSError:
            continue
    return "\n".join(found)


@pytest.mark.slow
@pytest.mark.parametrize("cold", [False, True])
def test_page_cache_that_the_system_does_not_tell_of(tiny, tmp_path, monkeypatch, cold):
    """As of files of another user: the race goes on, and says that it does not know."""
    monkeypatch.setattr(race, "cached_fraction", lambda fd, size: -1.0)
    args = ["--models", str(tiny), "--against", "copy", "--runs", "1", "--dir", str(tmp_path)]
    said = invoke(*args, *(["--cold"] if cold else []))
    kind = "cold" if cold else "warm"
    assert f"{kind} page cache (not verified: it needs write permission for the files); 1 run" in said
    assert json.loads(invoke(*args, "--json"))["cached"] is None


@pytest.mark.slow
def test_a_failing_command_shows_what_it_said(tiny, tmp_path):
    broken = tmp_path / "models"
    shutil.copytree(tiny, broken)
    next((broken / "ft2").glob("*.safetensors")).write_bytes(b"\0" * 100)
    done = run_bench("--models", broken, "--against", "copy", "--dir", tmp_path)
    assert done.returncode == 3
    assert "fastinterp failed (exit 3): CheckpointError: " in done.stderr and "safetensors" in done.stderr


def test_wrong_answers_are_not_timed(tiny, tmp_path, monkeypatch):
    """A command that merges nothing and copies one input is found out before the first timed run."""
    monkeypatch.setattr(command, "_own_command", lambda recipe, out: ["cp", "-r", str(tiny / "ft1"), str(out)])
    with pytest.raises(WrongAnswerError, match=r"model\.embed_tokens\.weight, from element 0: .* expected .* got"):
        invoke("--models", str(tiny), "--against", "copy", "--runs", "1", "--dir", str(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (["--against", "copy,gzip"], UsageError, "--against gzip: unknown. Known: copy, touch, naive, mergekit"),
        (["--dir", "/nowhere"], UsageError, "--dir /nowhere: there is no such folder"),
        (["--python", "/nowhere/python"], UsageError, "--python /nowhere/python: it cannot be run"),
        (["--models", str(ROOT / "csrc")], CheckpointError, "it contains no folder with .safetensors files"),
    ],
)
def test_refusals(args, error, message, tmp_path):
    with pytest.raises(error, match=message.replace(".", r"\.")):
        invoke("--dir", str(tmp_path), *args)
    assert list(tmp_path.iterdir()) == []


def test_a_rival_that_is_not_installed_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setattr(command, "_packages", lambda python: {"numpy": "2.0"})
    with pytest.raises(UsageError, match=r"mergekit needs mergekit.*pip install 'fastinterp\[mergekit\]'"):
        invoke("--against", "mergekit", "--dir", str(tmp_path))
    with pytest.raises(UsageError, match=r"naive needs torch.*pip install torch safetensors"):
        invoke("--against", "naive", "--dir", str(tmp_path))


def test_a_package_that_cannot_be_imported_is_none(monkeypatch, tmp_path):
    """Its metadata may be there all the same."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = None\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UsageError, match=r"--against naive needs torch, which .* does not have\. pip install torch"):
        invoke("--against", "naive", "--dir", str(tmp_path))


def test_a_rival_that_fails_says_why_in_one_line(tmp_path):
    """And the exit code is not that of a difference."""
    program = [sys.executable, "-c", "import no_such_module"]
    (tmp_path / "input").write_bytes(b"1")
    with pytest.raises(UsageError) as told:
        race.race(
            [race.Racer("naive", program, lambda: 0)], [tmp_path / "input"], tmp_path, runs=1, cold=False, say=print
        )
    assert str(told.value) == (
        "naive failed (exit 1): ModuleNotFoundError: No module named 'no_such_module'. Mend that, or leave naive out "
        "of --against, or choose with --python another Python"
    )


def test_naive_is_left_out_where_a_package_is_missing(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "_packages", lambda python: {"torch": "2.4"})
    done = CliRunner().invoke(command.bench, ["--models", str(tiny), "--runs", "1", "--dir", str(tmp_path)])
    assert done.exit_code == 0
    assert f"without naive: {sys.executable} does not have safetensors. pip install torch safetensors" in done.stderr


def test_full_disk_is_refused_with_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    with pytest.raises(OutputError, match=r"three checkpoints of size tiny need 1\.50 MB, but 1\.00 MB are free"):
        invoke("--size", "tiny", "--against", "copy", "--dir", str(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_naive_needs_the_same_files(tiny, tmp_path):
    write_checkpoints(tmp_path / "other", TINY)
    shutil.copytree(tiny / "ft1", tmp_path / "models" / "a")
    shutil.copytree(tmp_path / "other" / "ft2", tmp_path / "models" / "b")
    with pytest.raises(UsageError, match=r"it needs the same files in all models.*Leave naive out"):
        invoke("--models", str(tmp_path / "models"), "--against", "naive", "--dir", str(tmp_path))


def test_sizes_in_the_help_are_those_that_are_made():
    assert list(SIZES) == list(command._SIZES)


# --- checkpoints and the check ---------------------------------------------------------------------------------------


def test_checkpoints_are_those_of_a_llama(tiny):
    """The check's lenient reader and fastinterp's strict one find the same; weights and deltas are as promised."""
    config = json.loads((tiny / "ft1" / "config.json").read_text())
    index = json.loads((tiny / "ft1" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    tensors = read_tensors(tiny / "ft1")
    assert {n: t.file.name for n, t in tensors.items()} == index["weight_map"]
    assert {n: t.shape for n, t in tensors.items()} == TINY.shapes()
    assert index["metadata"]["total_size"] == TINY.nbytes
    assert config["num_hidden_layers"] == TINY.layers
    strict = open_checkpoint(str(tiny / "ft1")).tensors
    assert {n: (t.shape, t.start) for n, t in tensors.items()} == {n: (e.shape, e.start) for n, e in strict.items()}
    values = {n: t.read(0, min(1000, strict[n].numel)) for n, t in tensors.items()}
    assert values["model.norm.weight"].mean() == pytest.approx(1, abs=0.02)
    assert values["lm_head.weight"].std() == pytest.approx(0.02, rel=0.1)
    base = read_tensors(tiny / "base")
    delta = values["lm_head.weight"] - base["lm_head.weight"].read(0, 1000)
    assert delta.std() == pytest.approx(0.002, rel=0.1)


@pytest.mark.slow
def test_checkpoints_have_the_same_bytes_again(tiny, tmp_path):
    write_checkpoints(tmp_path, TINY, shard_bytes=300_000)
    for path in tiny.rglob("*.*"):
        assert path.read_bytes() == (tmp_path / path.relative_to(tiny)).read_bytes()


def test_an_interrupted_checkpoint_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "_header", lambda shard: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_checkpoints(tmp_path, TINY)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def merged(tiny, tmp_path) -> tuple[Path, Job]:
    """A right answer, made by numpy alone: the mean of ft1 and ft2."""
    out = tmp_path / "out"
    shutil.copytree(tiny / "ft1", out)
    job = Job((tiny / "ft1", tiny / "ft2"), (0.5, 0.5))
    for name, tensor in read_tensors(out).items():
        numel = int(np.prod(tensor.shape))
        a, b = (read_tensors(m)[name].read(0, numel) for m in job.models)
        u = ((a + b) / 2).astype(np.float32).view(np.uint32)
        codes = ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype("<u2")
        with open(tensor.file, "r+b") as stream:
            stream.seek(tensor.start)
            stream.write(codes.tobytes())
    return out, job


def change(out: Path, name: str, element: int, by: int) -> None:
    """Move one bf16 element by some codes."""
    tensor = read_tensors(out)[name]
    with open(tensor.file, "r+b") as stream:
        stream.seek(tensor.start + 2 * element)
        code = int.from_bytes(stream.read(2), "little")
        stream.seek(-2, 1)
        stream.write((code + by).to_bytes(2, "little"))


def test_a_right_answer_passes(merged):
    out, job = merged
    assert check(out, job) == check(out, job, coarse=True) > 200_000


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.norm.weight", "model.layers.3.mlp.up_proj.weight"]
)
@pytest.mark.parametrize(("element", "by"), [(0, 1), (-1, -1), (5, 0x80)])
def test_one_code_off_is_found(merged, name, element, by):
    """At either end of a tensor: one unit in the last place, or a factor of two."""
    out, job = merged
    change(out, name, element % int(np.prod(TINY.shapes()[name])), by)
    with pytest.raises(WrongAnswerError, match=f"{name}, from element .*: 1 of .* elements wrong"):
        check(out, job)


def test_another_dtype_shape_or_set_of_tensors_is_found(merged, tiny, tmp_path):
    out, job = merged
    (tmp_path / "empty").mkdir()
    with pytest.raises(WrongAnswerError, match="the tensors of the output are not those of ft1"):
        check(tmp_path / "empty", job)
    for path in out.glob("*.safetensors"):
        raw = path.read_bytes()
        path.write_bytes(raw.replace(b'"BF16", "shape": [64]', b'"F16",  "shape": [64]'))
    with pytest.raises(WrongAnswerError, match=r"norm.weight should be BF16 \[64\], got F16 \[64\]"):
        check(out, job)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F8_E4M3"])
def test_allowed_error_is_little_more_than_half_a_place(dtype):
    """The bound for float32 arithmetic must not hide a wrong rounding; the coarse one is wider."""
    place = {"F32": 2.0**-23, "F16": 2.0**-10, "BF16": 2.0**-7, "F8_E4M3": 2.0**-3}[dtype]
    one = np.ones(1) * 1.25
    exact, coarse = (allowed_error(one, one, [0.5, 0.5], dtype, c)[0] for c in (False, True))
    assert place / 2 < exact < place * (20 if dtype == "F32" else 0.52)
    assert exact <= coarse < place * 20


def test_provenance_names_the_file_system(tmp_path):
    found = provenance.provenance(tmp_path)
    df = subprocess.run(["df", "--output=fstype", tmp_path], capture_output=True, text=True, check=True)
    assert found["file_system"] == df.stdout.split()[-1]
    assert found["memory_bytes"] > 2**28 and found["threads"] >= 1
    assert json.loads(json.dumps(found)) == found


# --- benchmarks/ -----------------------------------------------------------------------------------------------------


@pytest.mark.slow(30)
def test_kernel_benchmarks_in_their_quick_form():
    """Every kernel case and every rival that is installed gives a right answer."""
    pytest.importorskip("torch")
    pytest.importorskip("pytest_benchmark")
    program = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-disable", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(program, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_kernel_benchmarks_find_a_wrong_answer():
    """Of one element in the last repetition, exactly and within the bound; and a write beside the output."""
    from benchmarks.kernel_cases import PERIOD, KernelCase
    from fastinterp.ops.dtypes import BF16

    case = KernelCase(BF16, 2, 1, "memory", 3 * PERIOD)
    out = case.outputs[0].view
    out.reshape(3, -1)[:] = case.expected[0]
    case.check(exact=True)
    case.check(exact=False)
    out[-1] ^= 0x80  # the sign of the last element
    with pytest.raises(AssertionError, match=f"output 0: 1 of {PERIOD} are wrong, first "):
        case.check(exact=True)
    with pytest.raises(AssertionError, match=f"output 0: 1 of {PERIOD} are wrong, first {PERIOD - 1}"):
        case.check(exact=False)
    out[-1] ^= 0x80
    case.outputs[0]._all[0] = 1
    with pytest.raises(AssertionError, match="bytes beside it"):
        case.check(exact=True)


def test_the_table_cannot_drift_from_the_results(tmp_path):
    """--write makes what --check wants; one digit changed, and --check fails."""
    (tmp_path / "race-1b.json").write_text(json.dumps(RACE))
    (tmp_path / "kernels.json").write_text(json.dumps({"benchmarks": [{"extra_info": e} for e in KERNELS], **MACHINE}))
    page = tmp_path / "performance.md"
    marked = "".join(f"<!-- {name}:begin -->\nold\n<!-- {name}:end -->\n" for name in ("bench", "kernels"))
    page.write_text(f"before\n{marked}after\n")

    def table(*args: str) -> subprocess.CompletedProcess[str]:
        program = [sys.executable, "-m", "benchmarks.table", "--results", tmp_path, "--page", page, *args]
        return subprocess.run(program, capture_output=True, text=True, check=False, cwd=ROOT)

    assert "Run: python -m benchmarks.table --write" in table("--check").stderr
    assert table("--write").returncode == 0
    text = page.read_text()
    assert text.startswith("before\n<!-- bench:begin -->\n| merge |") and text.endswith("<!-- kernels:end -->\nafter\n")
    assert "warm page cache | (1) | 0.50 s | 20 MB | 1.0 s (0.50) | 60 s (0.0083) |" in text
    assert "Slowest against its floor (`cp` of one input): average of 2 checkpoints of 2.20 GB, BF16, warm" in text
    assert (
        "bf16-n2-k1-cache-t1, 10 %. Another is faster in 1 of 1 cases, most in bf16-n2-k1-cache-t1: lerp, 2.0" in text
    )
    assert "| BF16 | 2 | 1 | 20 (10 %) | **lerp 39** | 0.39 (90 %) |  |" in text
    assert "with fastinterp 0.1.0 at 0123456 (avx2); lerp 2.13." in text
    assert table("--check").returncode == 0
    for was, changed in (("0.50 s", "0.51 s"), ("**lerp 39**", "lerp 39")):
        page.write_text(text.replace(was, changed))
        assert table("--check").returncode == 1


def racer(wall_s: float, version: str | None, anon: int) -> dict[str, object]:
    ratio = {"median": 0.5 / wall_s, "min": 0.4 / wall_s, "max": 0.6 / wall_s}
    return {"median_wall_s": wall_s, "version": version, "peak_anon_bytes": anon, "ratio": ratio}


RACE: dict[str, Any] = {
    "benchmark": "race",
    "recipe": "average",
    "inputs": 2,
    "model_bytes": 2_200_000_000,
    "dtypes": ["BF16"],
    "cache": "warm",
    "runs": 5,
    "racers": {
        "fastinterp": racer(0.5, "0.1.0", 20_000_000),
        "copy": racer(1.0, None, 400_000),
        "mergekit": racer(60.0, "0.1.5", 6_000_000_000),
    },
    "provenance": {
        "cpu": "A Processor",
        "cores": 2,
        "memory_bytes": 16_000_000_000,
        "file_system": "ext4",
        "system": "Linux 6",
        "fastinterp": "0.1.0",
        "commit": None,
        "isa": "avx2",
        "threads": 2,
    },
}
_CASE = {"dtype": "BF16", "n": 2, "k": 1, "threads": 1}
KERNELS = [
    {**_CASE, "place": "cache", "rival": "fastinterp", "p50_s": 2e-5, "gb_s": 19.7, "percent_of_copy": 10.0},
    {**_CASE, "place": "cache", "rival": "lerp", "p50_s": 1e-5, "gb_s": 39.3, "percent_of_copy": 20.0},
    {**_CASE, "place": "memory", "rival": "fastinterp", "p50_s": 2e-3, "gb_s": 0.39, "percent_of_copy": 90.0},
]
MACHINE = {
    "machine_info": RACE["provenance"] | {"commit": "0123456", "rivals": {"fastinterp": "0.1.0", "lerp": "2.13"}}
}

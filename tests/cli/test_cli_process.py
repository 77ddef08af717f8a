"""The program as a user starts it: start-up time, signals, pipes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.models import layers, save, sparse
from tests.support.processes import started

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = [sys.executable, "-m", "fastinterp"]


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    """The package importable from anywhere, and its byte code kept, as for an installed program."""
    found = {k: v for k, v in os.environ.items() if not k.startswith("FASTINTERP_")}
    found.pop("PYTHONDONTWRITEBYTECODE", None)
    paths = [str(ROOT), *filter(None, [found.get("PYTHONPATH")])]
    return {**found, "PYTHONPATH": os.pathsep.join(paths), "PYTHONPYCACHEPREFIX": str(tmp_path_factory.mktemp("pyc"))}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, noise in (("a", 0.1), ("b", 0.2)):
        save(folder / name, layers(1, noise=noise))
        sparse(folder / f"large_{name}", 160 << 20)
    for prefix in ("", "large_"):
        listed = "".join(f"- {{model: {prefix}{m}, parameters: {{weight: 1}}}}\n" for m in "ab")
        (folder / f"{prefix}recipe.yml").write_text(f"merge_method: linear\nmodels:\n{listed}")
    return folder


def start(args, env, cwd):
    return started([*PROGRAM, *args], env=env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def partial_data(out: Path) -> bool:
    """Whether a merge into `out` has begun to write weights under a temporary name."""
    try:
        return any((out / n).stat().st_size for n in os.listdir(out) if ".safetensors.partial-" in n)
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("number", "code", "command"),
    [
        (signal.SIGINT, 130, "merge"),
        (signal.SIGINT, 130, "interpolate"),
        (signal.SIGTERM, 143, "interpolate"),
        (signal.SIGHUP, 129, "merge"),
        (signal.SIGQUIT, 131, "merge"),
        (signal.SIGXCPU, 152, "merge"),
    ],
)
def test_interrupted_merge_leaves_nothing(env, models, tmp_path, number, code, command):
    out = tmp_path / "new" / "out"
    args = ["merge", "large_recipe.yml", out, "--threads", "1"]
    seen = out
    if command == "interpolate":
        args = ["interpolate", "large_a", "large_b", "--alpha", "0.2", "--alpha", "0.6", "-o", out, "--threads", "1"]
        seen = out / "alpha_0.2"
    with start(args, env, models) as process:
        while not partial_data(seen):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.001)
        # Stopped, so that the signal surely comes while the merge is at work.
        process.send_signal(signal.SIGSTOP)
        assert not list(seen.glob("*.safetensors"))
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)
        stdout, stderr = process.communicate(timeout=60)
    assert (code, "", "interrupted; nothing was written\n") == (process.returncode, stdout, stderr)
    assert not (tmp_path / "new").exists()


def test_second_signal_does_not_stop_the_cleaning_up(env, models, tmp_path):
    out = tmp_path / "out"
    with start(["merge", "large_recipe.yml", out, "--threads", "1"], env, models) as process:
        while not partial_data(out):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.001)
        for _ in range(5):
            process.send_signal(signal.SIGINT)
            time.sleep(0.002)
        process.communicate(timeout=60)
    assert process.returncode == 130
    assert not out.exists()


IMPORTING = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
module = sys.argv.pop(1)
class Interrupts:
    def find_spec(self, name, *_):
        if name == module:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupts())
from fastinterp.__main__ import main
main()
"""


@pytest.mark.parametrize(
    "module",
    ["fastinterp.cli", "click", "fastinterp.cli.merge", "fastinterp.api", "msgspec", "yaml", "fastinterp._C",
     "fastinterp.output.folder", "fastinterp.execute.report"],
)  # fmt: skip
def test_interrupt_while_modules_are_imported(env, models, tmp_path, module):
    program = [sys.executable, "-c", IMPORTING, module, "merge", "recipe.yml", str(tmp_path / "out")]
    done = subprocess.run(program, env=env, cwd=models, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.split(";")[0].strip()) == (130, "", "interrupted")
    assert done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


def test_interrupt_that_a_module_makes_another_error_of(env, models, tmp_path):
    """As numpy's extension modules do."""
    program = IMPORTING.replace("os.kill(os.getpid(), signal.SIGINT)", """
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except KeyboardInterrupt:
                raise ImportError("numpy.core.multiarray failed to import")
""")  # fmt: skip
    command = [sys.executable, "-c", program, "fastinterp.api", "merge", "recipe.yml", str(tmp_path / "out")]
    done = subprocess.run(command, env=env, cwd=models, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


@pytest.mark.parametrize(
    "args",
    [["merge", "recipe.yml", "OUT"], ["interpolate", "a", "b", "--alpha", "0.5", "-o", "OUT"],
     ["interpolate", "a", "b", "--alpha", "0,1", "-o", "OUT"], ["average", "a", "b", "--in-order", "-o", "OUT"],
     ["sweep", "a", "b", "--alphas", "0,1", "-o", "OUT"]],
    ids=["merge", "interpolate", "several", "average", "sweep"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["n" * 300, "n" * 300 + ".safetensors", "new/" + "n" * 300, "n/" * 2500])
def test_name_of_an_output_that_no_file_can_have(env, models, tmp_path, args, name):
    args = [str(tmp_path / name) if a == "OUT" else a for a in args]
    done = subprocess.run([*PROGRAM, *args], env=env, cwd=models, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (4, "")
    assert "File name too long" in done.stderr and done.stderr.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_clock_that_is_wrong_does_not_tell_what_was_finished(env, models, tmp_path):
    """Of an output that was there before, with times of the far future, nothing was written; of one that was finished
    when the run failed, in 1970, it is said."""
    old = tmp_path / "out"
    save(old, layers(1))
    os.utime(old / "model.safetensors", (2**33, 2**33))
    args = ["interpolate", "a", "b", "--alpha", "0.5", "-o", str(old)]
    done = subprocess.run([*PROGRAM, *args], env=env, cwd=models, capture_output=True, text=True, check=False)
    assert done.returncode == 4 and done.stderr.endswith("all the same; nothing was written\n")
    program = """
import os, signal, sys
from fastinterp.cli import main
unlink = os.unlink
def late(path, *args):
    unlink(path, *args)
    if str(path).endswith("alpha_0/.fastinterp-journal"):
        for name in ("out/alpha_0", "out/alpha_1"):
            os.utime(f"{sys.argv[-1]}/{name.split('/')[1]}/model.safetensors", (0, 0))
        os.kill(os.getpid(), signal.SIGTERM)
os.unlink = late
main()
"""
    out = str(tmp_path / "two")
    command = [sys.executable, "-c", program, "interpolate", "a", "b", "--alpha", "0,1", "-o", out]
    done = subprocess.run(command, env=env, cwd=models, capture_output=True, text=True, check=False)
    expected = f"interrupted; finished before that: {out}/alpha_0, {out}/alpha_1\n"
    assert (done.returncode, done.stderr) == (143, expected)


@pytest.mark.parametrize("args", [["inspect", "a", "--json"], ["methods"], ["merge", "recipe.yml"]], ids=lambda a: a[0])
def test_reader_that_goes_away_ends_the_program_quietly(env, models, tmp_path, args):
    args = [*args, *([tmp_path / "out"] if args[0] == "merge" else [])]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*PROGRAM, *args], env=env, cwd=models, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_stdout_that_cannot_be_written_is_an_error(env, models):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*PROGRAM, "inspect", "a"], env=env, cwd=models, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (4, "StorageError: stdout cannot be written: No space left on device\n")


def test_merge_without_stdout_and_stderr(env, models, tmp_path):
    """As from a daemon that closed them."""
    command = 'exec "$0" -m fastinterp merge recipe.yml "$1" >&- 2>&-'
    done = subprocess.run(["sh", "-c", command, sys.executable, tmp_path / "out"], env=env, cwd=models, check=False)
    assert done.returncode == 0
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_error_is_one_line_without_colours_in_a_log(env, models):
    done = subprocess.run(
        [*PROGRAM, "inspect", "./none"], env=env, cwd=models, capture_output=True, text=True, check=False
    )
    assert done.returncode == 3
    assert done.stderr.startswith("CheckpointError: ./none: ") and done.stderr.count("\n") == 1


def test_errors_of_a_recipe_from_a_pipe_are_not_looked_for_twice(env, models, tmp_path):
    """As `merge <(...)`: the pipe is empty when it is read again."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    process = subprocess.Popen(
        [*PROGRAM, "merge", pipe, tmp_path / "out"], env=env, cwd=models, stderr=subprocess.PIPE, text=True
    )
    try:
        pipe.write_text("merge_metod: linear\n")
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 2
    assert "did you mean `merge_method`?" in said and said.count("\n") == 1, said


@pytest.mark.parametrize(
    "args", [["merge", "recipe.yml", "OUT"], ["explain", "recipe.yml"], ["--version"]], ids=lambda a: a[0]
)
def test_command_loads_nothing_heavy(env, models, tmp_path, args):
    """Not even while it runs, where nobody watches its progress."""
    program = """
import sys
from fastinterp.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
heavy = "torch numpy rich huggingface_hub transformers triton safetensors asyncio importlib.metadata"
assert not set(heavy.split()) & sys.modules.keys(), set(heavy.split()) & sys.modules.keys()
"""
    args = [str(tmp_path / "out") if a == "OUT" else a for a in args]
    done = subprocess.run(
        [sys.executable, "-c", program, *args], env=env, cwd=models, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("args", "times"), [(["--version"], 8), (["explain", "recipe.yml"], 12)], ids=["version", "explain"]
)
def test_start_up_takes_few_times_that_of_python_alone(env, models, args, times):
    """The best of several runs each, in turns: a busy machine must not decide."""

    def wall_s(command):
        begin = time.perf_counter()
        subprocess.run(command, env=env, cwd=models, stdout=subprocess.DEVNULL, check=True)
        return time.perf_counter() - begin

    bare, ours = [], []
    wall_s([*PROGRAM, *args])  # writes the byte code
    for attempt in range(30):
        bare.append(wall_s([sys.executable, "-c", "pass"]))
        ours.append(wall_s([*PROGRAM, *args]))
        if attempt >= 4 and min(ours) <= times * min(bare):
            break
    assert min(ours) <= times * min(bare)


def test_version(env):
    done = subprocess.run([*PROGRAM, "--version"], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("fastinterp 0.") and done.stderr == ""

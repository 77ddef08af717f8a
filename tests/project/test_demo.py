"""examples/demo.py runs, leaves nothing behind, and its check of the results can fail."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from examples import demo
from tests.support.checkpoints import read_header

ROOT = Path(__file__).resolve().parents[2]
VALUES = sum(math.prod(shape) for shape in demo.TINY.tensors().values())


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "examples" / "demo.py"), "--tiny", *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=env)


@pytest.mark.slow
def test_demo_runs_and_removes_its_folder(tmp_path):
    done = run(TMPDIR=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []
    commands = re.findall(r"^  \$ fastinterp (\w+)", done.stdout, re.MULTILINE)
    assert commands == ["explain", "merge", "interpolate", "interpolate", "merge"]
    assert done.stdout.count(f"checked: all {VALUES:,} values are numpy's float64 result") == 4
    assert len(re.findall(r"[\d.]+ [KMG]B/s \(cpu", done.stdout)) == 4
    assert max(map(len, done.stdout.splitlines())) <= 120


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "kept"
    assert run(folder).returncode == 0
    return folder


def test_folder_that_is_given_is_kept(kept):
    outputs = {"average": 1, "between": 1, "beyond": 1, "unlearn": 1}
    assert {p.name: len(list(p.glob("*.safetensors"))) for p in (kept / "out").iterdir()} == outputs
    assert {len(list((kept / m).glob("*.safetensors"))) for m in ("base", "chat", "code")} == {2, 3, 4}
    done = run(kept)
    assert done.returncode == 2 and "is not empty. Give a new folder" in done.stderr


@pytest.mark.slow(3)
def test_a_folder_of_an_earlier_demo_is_made_anew(kept, tmp_path):
    """What the user made in it stays; a folder of something else is refused."""
    folder = tmp_path / "demo"
    shutil.copytree(kept, folder)
    shutil.rmtree(folder / "chat")
    (folder / "out" / "mine").mkdir()
    assert run(folder, "--again").returncode == 0
    assert (folder / "chat").is_dir() and (folder / "out" / "mine").is_dir()
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "chat").write_text("mine")
    done = run(tmp_path / "else", "--again")
    assert done.returncode == 2 and "is not empty. Give a new folder" in done.stderr
    assert (tmp_path / "else" / "chat").read_text() == "mine"


def make(target: str, **environment: str) -> str:
    """The commands of a target, which are not run."""
    env = {name: value for name, value in os.environ.items() if name != "FASTINTERP_CUDA"} | environment
    done = subprocess.run(["make", "-n", "-B", target], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.slow(2)
def test_make_demo_prints_commands_that_run_in_its_folder(kept):
    said = re.findall(r"^echo '  \$ (.*)'$", make("demo"), re.MULTILINE)
    assert said[0].endswith("/bin/activate && cd build/demo") and len(said) == 3
    for command in said[1:]:
        program, *args = command.split()
        assert program == "fastinterp"
        done = subprocess.run(
            [sys.executable, "-m", program, *args], cwd=kept, env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


def test_make_test_says_what_it_takes_and_obeys_fastinterp_cuda():
    said = make("test")
    assert said.index("7 GB on disk") < said.index("pip install") < said.index("-m pytest")
    assert "minutes of a processor" in said and "tests take" in said
    without = make("test", FASTINTERP_CUDA="0")
    assert "nvcc" not in without and "CUDA kernels" not in without


@pytest.mark.parametrize("job", demo.JOBS, ids=lambda job: job.out)
def test_check_notices_one_wrong_value(kept, job):
    assert f"{VALUES:,} values" in demo.check(kept, job)
    (file,) = (kept / job.out).glob("*.safetensors")
    table, start = read_header(file)
    at = start + table["model.layers.1.mlp.down_proj.weight"]["data_offsets"][0]
    whole = bytearray(file.read_bytes())
    good = bytes(whole)
    try:
        value = np.frombuffer(whole, np.uint16, 1, at)[0]
        whole[at : at + 2] = np.uint16(value ^ 2).tobytes()
        file.write_bytes(whole)
        with pytest.raises(SystemExit, match=r"model\.layers\.1\.mlp\.down_proj\.weight is WRONG: 1 of"):
            demo.check(kept, job)
    finally:
        file.write_bytes(good)


def test_check_notices_a_missing_tensor(kept):
    (file,) = (kept / "chat").glob("*-00003-*.safetensors")
    hidden = file.rename(file.with_suffix(".hidden"))
    try:
        with pytest.raises(SystemExit, match=r"out/average: .* is missing in an input"):
            demo.check(kept, demo.JOBS[0])
    finally:
        hidden.rename(file)


def test_rounding_of_the_demo_is_to_nearest_even():
    """On every float32 that lies on, or one place beside, a bf16 number or a tie."""
    codes = np.arange(1 << 16, dtype=np.uint32) << 16
    codes = codes[(codes & 0x7F800000) != 0x7F800000]
    for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        x = (codes | low).view(np.float32)
        up = (codes.view(np.int32) >> 16) + 1
        odd = codes >> 16 & 1
        want = np.where((low > 0x8000) | ((low == 0x8000) & (odd == 1)), up, up - 1).astype(np.uint16)
        assert np.array_equal(demo.to_bf16(x), want)


def test_models_of_the_demo_are_llamas():
    """The names and shapes that transformers expects."""
    from transformers import LlamaConfig, LlamaForCausalLM

    size = demo.TINY
    config = LlamaConfig(
        hidden_size=size.hidden, intermediate_size=size.inner, num_hidden_layers=size.layers,
        vocab_size=size.vocabulary, num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    real = {n: tuple(p.shape) for n, p in LlamaForCausalLM(config).named_parameters()}
    assert real == size.tensors()

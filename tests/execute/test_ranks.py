"""One merge by several processes: the bytes of one process, whatever dies on the way."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from fastinterp.errors import BackendError
from fastinterp.execute.distributed.peers import Rank, first_host, started
from fastinterp.output.shared_folder import reserved, shared_file, stands
from tests.support.models import layers, save
from tests.support.written import tree

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = str(ROOT / "tests" / "support" / "rank_program.py")
CLEAN = {k: v for k, v in os.environ.items() if not k.startswith(("FASTINTERP_", "SLURM_"))}
SHARDS = ("--max-shard-size", "100")  # of 112-byte and smaller tensors: each file has one or two


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Models, recipes of a method that asks nothing and of one that asks, and what one process makes of them."""
    folder = tmp_path_factory.mktemp("ranks")
    for name, noise in (("base", 0.0), ("a", 0.1), ("b", 0.2)):
        save(folder / name, layers(1, count=6, noise=noise))
    listed = "".join(f"- {{model: {m}, parameters: {{weight: 0.5, density: 0.5}}}}\n" for m in "ab")
    (folder / "ties.yml").write_text(f"merge_method: ties\nbase_model: base\nmodels:\n{listed}")
    (folder / "paper.yml").write_text(
        f"merge_method: ties\nparameters: {{preset: paper}}\nbase_model: base\nmodels:\n{listed}"
    )
    (folder / "linear.yml").write_text(f"merge_method: linear\nmodels:\n{listed.replace(', density: 0.5', '')}")
    for recipe in ("ties", "paper", "linear"):
        alone = subprocess.run(
            [sys.executable, "-m", "fastinterp", "merge", f"{recipe}.yml", f"one-{recipe}", "--json", *SHARDS],
            cwd=folder, env={**CLEAN, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True, text=True,
        )  # fmt: skip
        (folder / f"{recipe}.json").write_text(alone.stdout)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def torchrun(count: int, args: list[str], folder: Path, *, restarts: int = 0, **env: str):
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"),
        *(f"--max-restarts={restarts}", PROGRAM, *args),
    ]
    return subprocess.run(
        command, cwd=folder, env={**CLEAN, "PYTHONPATH": str(ROOT), **env}, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip


def srun(rank: int, count: int, port: int, args: list[str], folder: Path, **env: str) -> subprocess.Popen[str]:
    """One rank, as srun starts it."""
    slurm = {
        "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": str(count), "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank), "SLURM_STEP_TASKS_PER_NODE": f"{count}", "SLURM_STEP_NODELIST": "localhost",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, PROGRAM, *args], cwd=folder, env={**CLEAN, "PYTHONPATH": str(ROOT), **slurm, **env},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ended(ranks: Sequence[subprocess.Popen[str]]) -> list[str]:
    """What each of them said on stderr, when all have ended."""
    try:
        return [process.communicate(timeout=60)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return int(s.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize(("count", "recipe"), [(1, "ties"), (2, "paper"), (4, "ties"), (4, "linear")])
def test_torchrun_makes_the_bytes_of_one_process(models, tmp_path, count, recipe):
    out = tmp_path / "out"
    done = torchrun(count, ["merge", f"{recipe}.yml", str(out), *SHARDS], models)
    assert done.returncode == 0, done.stderr
    assert contents(out) == contents(models / f"one-{recipe}")
    assert done.stdout.count(str(out)) == 1  # rank 0 alone tells
    assert (f"{count} ranks" in done.stdout) == (count > 1)


@pytest.mark.slow
def test_two_ranks_write_a_pipeline_and_one_file(models, tmp_path):
    """Files in folders of components; and one file, which only one rank can write: it says so."""
    for name in "ab":
        for part in ("unet", "vae"):
            (tmp_path / name).mkdir(exist_ok=True)
            shutil.copytree(models / name, tmp_path / name / part)
        index = {"unet": ["diffusers", "U"], "vae": ["diffusers", "V"]}
        (tmp_path / name / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "linear.yml").write_text((models / "linear.yml").read_text())
    for out in ("pipeline", "one.safetensors"):
        where, shards = (tmp_path, SHARDS) if out == "pipeline" else (models, ())
        alone = subprocess.run(
            [sys.executable, "-m", "fastinterp", "merge", "linear.yml", str(tmp_path / f"alone-{out}"), *shards],
            cwd=where, env={**CLEAN, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True, text=True,
        )  # fmt: skip
        done = torchrun(2, ["merge", "linear.yml", str(tmp_path / out), *shards], where)
        assert done.returncode == 0 and not alone.stderr, done.stderr
        whole, shared = (tmp_path / f"{first}{out}" for first in ("alone-", ""))
        if out == "pipeline":
            assert len(tree(shared)) > 10 and tree(shared) == tree(whole)
            assert "had no work" not in done.stdout
        else:
            assert shared.read_bytes() == whole.read_bytes()
            assert "only 1 output file for 2 ranks: each file is written by one rank" in done.stdout
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.slow
def test_the_report_is_that_of_one_process(models, tmp_path):
    done = torchrun(2, ["merge", "ties.yml", str(tmp_path / "out"), "--json", *SHARDS], models)
    found, alone = json.loads(done.stdout), json.loads((models / "ties.json").read_text())
    for own in ("output", "wall_s", "gb_per_s", "device", "threads"):
        found.pop(own)
        alone.pop(own)
    assert found == alone


@pytest.mark.slow
def test_a_rank_that_crashes_under_torchrun_is_started_again_and_all_go_on(models, tmp_path):
    out, noted = tmp_path / "out", tmp_path / "died"
    args = ["merge", "ties.yml", str(out), *SHARDS]
    done = torchrun(2, args, models, restarts=1, DIES=f"1:1:{noted}")
    assert noted.exists()
    assert done.returncode == 0, done.stderr
    assert contents(out) == contents(models / "one-ties")


@pytest.mark.slow
def test_a_rank_that_is_started_again_alone_goes_on_with_its_work(models, tmp_path):
    out, noted, port = tmp_path / "out", tmp_path / "died", free_port()
    args = ["merge", "ties.yml", str(out), *SHARDS]
    ranks = [srun(r, 4, port, args, models, DIES=f"2:1:{noted}") for r in range(4)]
    ranks[2].communicate(timeout=60)
    assert ranks[2].returncode == -9
    time.sleep(0.5)
    assert not list(out.glob("*.safetensors"))  # the others wait for what it had begun
    again = srun(2, 4, port, args, models)
    alive = [*ranks[:2], ranks[3], again]
    said = ended(alive)
    assert [p.returncode for p in alive] == [0] * 4, said
    assert contents(out) == contents(models / "one-ties")


@pytest.mark.slow
def test_what_a_dead_rank_had_begun_is_taken_over(models, tmp_path):
    out, noted, port = tmp_path / "out", tmp_path / "died", free_port()
    args = ["merge", "linear.yml", str(out), *SHARDS]
    ranks = [srun(r, 3, port, args, models, DIES=f"1:1:{noted}", PATIENCE="2") for r in range(3)]
    said = ended(ranks)
    assert [p.returncode for p in ranks] == [0, -9, 0], said
    assert contents(out) == contents(models / "one-linear")


@pytest.mark.slow
def test_when_all_end_the_next_run_goes_on_from_what_was_complete(models, tmp_path):
    """Also after rank 0, which has the store, was killed."""
    out, noted, port = tmp_path / "out", tmp_path / "died", free_port()
    args = ["merge", "ties.yml", str(out), *SHARDS]
    ranks = [srun(r, 2, port, args, models, DIES=f"0:2:{noted}") for r in range(2)]
    said = ended(ranks)
    assert ranks[0].returncode == -9
    assert ranks[1].returncode == 4
    assert "start all ranks again; 3 complete files are kept: run the same merge again to resume" in said[1]
    journals = {p.name: p.stat().st_ino for p in out.iterdir() if ".done.partial-" in p.name}
    kept = {name: (out / name.replace(".done", "")).stat() for name in journals}
    assert len(journals) >= 2
    assert not list(out.glob("*.safetensors"))
    port = free_port()
    ranks = [srun(r, 2, port, args, models) for r in range(2)]
    said = ended(ranks)
    assert [p.returncode for p in ranks] == [0, 0], said
    assert contents(out) == contents(models / "one-ties")
    for name, before in kept.items():  # they were not written again
        after = (out / name[1 : name.index(".done")]).stat()
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.slow
def test_another_number_of_ranks_goes_on_and_shares_otherwise(models, tmp_path):
    """Where each rank does a share of the files at a time, what is noted is of other shares."""
    out, noted, port = tmp_path / "out", tmp_path / "died", free_port()
    args = ["merge", "paper.yml", str(out), *SHARDS]
    said = ended([srun(r, 2, port, args, models, DIES=f"0:0:{noted}") for r in range(2)])
    left = [p.name for p in out.iterdir() if ".done.partial-" in p.name]
    assert left, said
    (out / left[0].replace(".done", ".1-ab.draft")).touch()  # of a rank that died over a journal
    port = free_port()
    ranks = [srun(r, 3, port, args, models) for r in range(3)]
    said = ended(ranks)
    assert [p.returncode for p in ranks] == [0, 0, 0], said
    assert contents(out) == contents(models / "one-paper")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["ties", "paper"])
def test_what_ranks_had_finished_of_a_file_is_kept(models, tmp_path, recipe):
    """Both are killed within their files; any number of ranks goes on."""
    shards = ("--max-shard-size", "400")
    alone = subprocess.run(
        [sys.executable, "-m", "fastinterp", "merge", f"{recipe}.yml", str(tmp_path / "alone"), *shards],
        cwd=models, env={**CLEAN, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert not alone.stderr
    args = ["merge", f"{recipe}.yml", str(tmp_path / "out"), "--json", *shards]
    first = torchrun(2, args, models, ROUNDS="100:2")
    assert first.returncode != 0 and not list((tmp_path / "out").glob("*.safetensors"))
    lone = subprocess.run(
        [sys.executable, "-m", "fastinterp", *args], cwd=models, env={**CLEAN, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert lone.returncode == 4 and "several processes began it, with torchrun or srun" in lone.stdout
    again = torchrun(3 if recipe == "ties" else 2, args, models, ROUNDS="100:99")
    assert again.returncode == 0, again.stderr
    (kept,) = [int(line.split()[1]) for line in again.stderr.splitlines() if line.startswith("resumed: ")]
    assert 0 < kept < 100 and int(100 * json.loads(again.stdout)["resumed"]) == kept
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def test_what_stands_in_a_folder_that_is_not_finished(tmp_path):
    key = "0123456789ab"
    assert not stands(tmp_path, "x", key, 0)
    assert reserved(tmp_path, key) == reserved(tmp_path / "none", key) == 0
    shared_file(tmp_path, "x", key).write_bytes(bytes(8192))
    (tmp_path / "other").write_bytes(bytes(1 << 20))
    assert stands(tmp_path, "x", key, 8192)
    assert not stands(tmp_path, "x", key, 8193)
    assert reserved(tmp_path, key) == shared_file(tmp_path, "x", key).stat().st_blocks * 512
    assert reserved(tmp_path, "ba9876543210") == 0


@pytest.mark.slow
def test_another_merge_does_not_go_on_from_what_is_there(models, tmp_path):
    out, noted = tmp_path / "out", tmp_path / "died"
    torchrun(2, ["merge", "ties.yml", str(out), *SHARDS], models, DIES=f"0:1:{noted}")
    left = contents(out)
    assert left
    done = torchrun(2, ["merge", "linear.yml", str(out), *SHARDS], models)
    assert done.returncode != 0
    assert "another merge is not finished here. To throw it away, add --force" in done.stderr
    assert contents(out) == left
    done = torchrun(2, ["merge", "linear.yml", str(out), "--force", *SHARDS], models)
    assert done.returncode == 0, done.stderr
    assert contents(out) == contents(models / "one-linear")


@pytest.mark.slow
def test_ranks_that_plan_different_merges_stop(models, tmp_path):
    port = free_port()
    out = str(tmp_path / "out")
    ranks = [srun(r, 2, port, ["merge", f"{name}.yml", out], models) for r, name in enumerate(("ties", "linear"))]
    said = ended(ranks)
    assert 4 in [p.returncode for p in ranks]
    assert "plans another merge than rank 0" in said[1]


@pytest.mark.slow
def test_an_error_of_one_rank_stops_all(models, tmp_path):
    out, noted, port = tmp_path / "out", tmp_path / "failed", free_port()
    args = ["merge", "ties.yml", str(out), *SHARDS]
    ranks = [srun(r, 3, port, args, models, FAILS=f"1:0:{noted}") for r in range(3)]
    said = ended(ranks)
    assert [p.returncode for p in ranks] == [4, 4, 4], said
    assert "StorageError: the disk is gone" in said[1]
    assert "RankError: rank 1: the disk is gone. All ranks stop" in said[0]
    assert not list(out.glob("*.safetensors"))


@pytest.mark.slow
def test_commands_that_ranks_do_not_share_are_refused(models, tmp_path):
    done = torchrun(2, ["interpolate", "a", "b", "--alpha", "0.5", "-o", str(tmp_path / "out")], models)
    assert done.returncode != 0
    assert "`interpolate` runs in one process" in done.stderr


# ---- who is who -----------------------------------------------------------------------------------------------------

ELASTIC = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "m",
    "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": "2",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}  # fmt: skip
SLURM = {
    "SLURM_JOB_ID": "30007", "SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "6", "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "3(x2)", "SLURM_STEP_NODELIST": "gpu[003-004]",
}  # fmt: skip


def test_torchrun_and_srun_say_who_is_who():
    assert started({}) is None
    assert started(ELASTIC) == Rank(3, 4, 1, 2, "m", 29500, False, "x/2")
    assert started({**ELASTIC, "WORLD_SIZE": "1", "RANK": "0"}) is None
    assert started(SLURM) == Rank(0, 6, 0, 3, "gpu003", 30007, True, "30007.1")
    assert started({**SLURM, "MASTER_ADDR": "a", "MASTER_PORT": "9", "SLURM_PROCID": "5"}) == Rank(
        5, 6, 0, 3, "a", 9, False, "30007.1"
    )
    assert started({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) is None  # a script, not yet srun
    with pytest.raises(BackendError, match="RANK is None, but must be a number"):
        started({**{k: v for k, v in ELASTIC.items() if k != "RANK"}})


@pytest.mark.parametrize(
    ("nodes", "first"), [("a", "a"), ("a,b", "a"), ("n[03-07,9],m1", "n03"), ("n[3]", "n3"), ("gpu-1-2,x", "gpu-1-2")]
)
def test_first_of_slurms_machines(nodes, first):
    assert first_host(nodes) == first

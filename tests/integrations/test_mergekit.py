"""The engine behind mergekit: `run_merge`, `install`, and the methods of its registry. `make oracle` runs this."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml

from tests.support import backends

missing = backends.mergekit_missing()
if missing:
    pytest.skip(missing, allow_module_level=True)

with warnings.catch_warnings():  # of what mergekit imports
    warnings.simplefilter("ignore")
    import torch
    import transformers
    from mergekit import merge_methods
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions
    from mergekit.options import add_merge_options
    from safetensors.torch import load_file

    from fastinterp.errors import OutputError
    from fastinterp.integrations import mergekit, mergekit_methods, mergekit_workers
    from fastinterp.integrations.mergekit_options import OPTIONS
    from tests.peer.common import make_picollama

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
KEY = "worker_process_setup_hook"
THEIRS = "by mergekit, not by fastinterp"


@pytest.fixture(autouse=True)
def _uninstalled():
    yield
    mergekit.uninstall()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    torch.manual_seed(0)
    return [make_picollama(tmp_path_factory.mktemp(name)) for name in "abc"]


def config(method, models, **keys):
    parts = [{"model": model, "parameters": {"weight": 0.5 + i}} for i, model in enumerate(models)]
    return MergeConfiguration.model_validate({"merge_method": method, "models": parts, **keys})


def tensors(folder):
    return load_file(Path(folder) / "model.safetensors")


# --- options ----------------------------------------------------------------------------------------------------------


def test_all_options_of_mergekit_are_known():
    """By name and default, and as its commands spell them."""
    import click

    from fastinterp.cli.mergekit import command

    fields = MergeOptions.model_fields
    assert {o.name: o.default for o in OPTIONS} == {name: field.default for name, field in fields.items()}
    theirs = click.command()(add_merge_options(lambda merge_options: None))
    spelled = {name for p in theirs.params for name in (*p.opts, *p.secondary_opts)}
    assert spelled <= {name for p in command.params for name in (*p.opts, *p.secondary_opts)}


def test_an_option_that_is_not_needed_is_logged(models, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    mergekit.run_merge(config("linear", models), str(tmp_path), MergeOptions(lazy_unpickle=True))
    assert "--lazy-unpickle is not needed: tensors are always read in pieces" in caplog.messages


def test_a_device_that_is_not_there(models, tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    mergekit.run_merge(config("linear", models), str(tmp_path / "out"), MergeOptions(device="cuda:7"))
    mergekit.run_merge(config("linear", models), str(tmp_path / "want"))
    assert any(m.startswith("computed on the CPU, with the same result: ") for m in caplog.messages)
    assert all(
        torch.equal(x, y) for x, y in zip(*(tensors(tmp_path / n).values() for n in ("out", "want")), strict=True)
    )


# --- run_merge --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["linear", "slerp", "task_arithmetic"])
def test_embeddings_are_cut_as_mergekit_cuts_them(tmp_path, caplog, method):
    """The same tensors; and an output that transformers loads, where mergekit leaves the origin's vocab_size."""
    torch.manual_seed(0)
    large, small = make_picollama(tmp_path / "large", 10), make_picollama(tmp_path / "small", 8)
    how = config(method, [large, small], base_model=large, parameters={"t": 0.3})
    cut = MergeOptions(unsafe_truncate_embeddings=True)
    mergekit.run_merge(how, str(tmp_path / "ours"), cut)
    assert not [m for m in caplog.messages if THEIRS in m]
    assert any(m.startswith("rows cut by `truncate_embeddings`: ") for m in caplog.messages)
    mergekit._theirs(how, str(tmp_path / "theirs"), options=cut)
    ours, theirs = tensors(tmp_path / "ours"), tensors(tmp_path / "theirs")
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-6)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert loaded.config.vocab_size == 8 and not any(info.values())


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize(
    ("method", "keys"),
    [
        ("linear", {}),
        ("slerp", {"parameters": {"t": [0, 0.5, 1]}}),
        ("task_arithmetic", {"parameters": {"normalize": True}}),
        ("ties", {"parameters": {"density": 0.5}}),
        ("breadcrumbs", {"parameters": {"density": 0.9, "gamma": 0.01}}),
    ],
    ids=str,
)
def test_run_merge_gives_what_mergekit_gives(models, tmp_path, caplog, method, keys, dtype):
    """The same tensors in the same dtypes, but for rounding; and the same files, but for what saving them changes.

    mergekit rounds deltas to bfloat16 before it compares them: a few elements are on the other side of a threshold.
    """
    count = 2 if method == "slerp" else 3
    how = config(method, models[:count], **({"base_model": models[0]} if method != "linear" else {}), **keys)
    if dtype:
        how.dtype = dtype
    mergekit.run_merge(how, str(tmp_path / "ours"), MergeOptions(), config_source="# mine\n")
    assert not [m for m in caplog.messages if THEIRS in m]
    mergekit._theirs(how, str(tmp_path / "theirs"), options=MergeOptions(), config_source="# mine\n")
    ours, theirs = tensors(tmp_path / "ours"), tensors(tmp_path / "theirs")
    assert {n: t.dtype for n, t in ours.items()} == {n: t.dtype for n, t in theirs.items()}
    tolerances = {"rtol": 2e-2 if dtype else 1e-4, "atol": 1e-3 if dtype else 1e-6}
    for name, tensor in theirs.items():
        other = ~torch.isclose(ours[name], tensor, **tolerances)
        assert other.float().mean() <= (0.02 if dtype and "density" in str(keys) else 0.0), name
    assert {p.name for p in (tmp_path / "theirs").iterdir()} <= {p.name for p in (tmp_path / "ours").iterdir()}
    assert (tmp_path / "ours" / "mergekit_config.yml").read_text() == "# mine\n"
    cards = [(tmp_path / who / "README.md").read_text().split("---\n")[1] for who in ("ours", "theirs")]
    ours_front, theirs_front = map(yaml.safe_load, cards)
    assert ours_front["library_name"] == theirs_front["library_name"]
    assert set(theirs_front["tags"]) <= set(ours_front["tags"])
    assert ours_front.get("base_model", []) == theirs_front["base_model"]


def test_what_cannot_be_expressed_runs_as_mergekit_runs_it(models, tmp_path, caplog):
    """And the reason is logged, never silence."""
    mergekit.run_merge(config("linear", models), str(tmp_path), MergeOptions(safe_serialization=False))
    (message,) = [m for m in caplog.messages if THEIRS in m]
    assert message.startswith("merged by mergekit, not by fastinterp: --no-safe-serialization is not supported: ")
    assert (tmp_path / "pytorch_model.bin").is_file()


def test_errors_of_both_are_mergekits(models, tmp_path):
    with pytest.raises(Exception, match="Unimplemented merge method"):
        mergekit.run_merge(config("no_such", models), str(tmp_path))


def test_an_input_is_never_overwritten(models):
    """Not even by mergekit after a refusal."""
    before = tensors(models[0])
    with pytest.raises(OutputError, match="inputs are never overwritten"):
        mergekit.run_merge(config("linear", models), models[0])
    assert all(torch.equal(x, before[n]) for n, x in tensors(models[0]).items())


def test_names_that_only_the_long_form_can_say(models, tmp_path):
    """A space, which mergekit's own YAML fails on, `@` and `+` in a path."""
    odd = tmp_path / "a b@c+d"
    odd.symlink_to(models[0])
    entries = [{"model": {"model": {"path": str(odd)}}, "parameters": {"weight": 1.0}}]
    how = MergeConfiguration.model_validate({"merge_method": "linear", "models": entries})
    mapping = mergekit.recipe_of(how)
    assert mapping["models"][0]["model"] == {"model": {"path": str(odd)}}
    mergekit.run_merge(how, str(tmp_path / "out"))
    assert all(torch.equal(x, tensors(models[0])[n]) for n, x in tensors(tmp_path / "out").items())


# --- install ----------------------------------------------------------------------------------------------------------


def test_install_reaches_those_who_imported_run_merge_by_name(models, tmp_path, monkeypatch):
    from mergekit.scripts import multimerge, run_yaml

    theirs = run_yaml.run_merge
    mergekit.install()
    mergekit.install()
    assert mergekit.installed()
    assert run_yaml.run_merge is multimerge.run_merge is mergekit.run_merge is sys.modules["mergekit.merge"].run_merge
    mergekit.uninstall()
    assert run_yaml.run_merge is multimerge.run_merge is theirs is sys.modules["mergekit.merge"].run_merge
    assert merge_methods.base.MergeMethod._execute_resolved is mergekit_methods._theirs


WORKER = """
import json, sys
import ray
from fastinterp.integrations import mergekit
arguments = json.loads(sys.argv[1])
if arguments["first"]:
    mergekit.install()
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, **arguments["init"])
else:
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, **arguments["init"])
    mergekit.install()

@ray.remote
def in_a_worker():
    import mergekit.merge
    return mergekit.merge.run_merge.__module__

print(ray.get(in_a_worker.remote()))
"""


@pytest.mark.slow(seconds=60)
@pytest.mark.parametrize(
    ("first", "init", "where", "warning"),
    [
        (True, {}, "fastinterp.integrations.mergekit", ""),
        (False, {}, "mergekit.merge", "Ray was started before, so its workers merge with mergekit: "),
        (
            False, {"runtime_env": {"worker_process_setup_hook": "fastinterp.integrations.mergekit.install"}},
            "fastinterp.integrations.mergekit", "",
        ),
    ],
    ids=["install, then Ray", "Ray, then install", "as the warning says"],
)  # fmt: skip
def test_workers_of_ray(tmp_path, first, init, where, warning):
    """What mergekit-evolve starts: processes of their own, where nothing is installed."""
    pytest.importorskip("ray")
    done = subprocess.run(
        [sys.executable, "-c", WORKER, json.dumps({"first": first, "init": init})],
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [where]
    assert warning in done.stderr and ("merge with mergekit" in done.stderr) == bool(warning)


def test_what_ray_asks_for(monkeypatch, caplog):
    """A hook or a set-up function of the user's stays, and the log says what to do."""
    name, hook = "RAY_RUNTIME_ENV_HOOK", "fastinterp.integrations.mergekit_workers.runtime_env"
    monkeypatch.delenv(name, raising=False)
    mergekit.install()
    assert os.environ[name] == hook
    assert mergekit_workers.runtime_env(None) == {KEY: "fastinterp.integrations.mergekit.install"}
    assert mergekit_workers.runtime_env({"pip": ["x"], KEY: "mine.setup"}) == {"pip": ["x"], KEY: "mine.setup"}
    assert "Ray's workers have a worker_process_setup_hook of their own" in caplog.text
    mergekit.uninstall()
    assert name not in os.environ
    monkeypatch.setenv(name, "mine.hook")
    mergekit.install()
    mergekit.uninstall()
    assert os.environ[name] == "mine.hook" and "RAY_RUNTIME_ENV_HOOK is set to mine.hook" in caplog.text


@pytest.mark.slow(seconds=20)
def test_mergekits_commands(models, tmp_path):
    """mergekit-multi, in any order of its documents, and mergekit-pytorch, in processes of their own."""
    last = {"merge_method": "linear", "models": [{"model": "mix"}, {"model": models[2]}], "parameters": {"weight": 1.0}}
    first = yaml.safe_load(config("linear", models[:2]).to_yaml()) | {"name": "mix"}
    (tmp_path / "multi.yml").write_text(yaml.safe_dump_all([last, first]))
    files = [{"model": f"{m}/model.safetensors"} for m in models]
    raw = {"merge_method": "linear", "parameters": {"weight": 1.0}, "models": files}
    (tmp_path / "raw.yml").write_text(yaml.safe_dump(raw))
    for arguments in (
        ["mergekit-multi", "multi.yml", "--out-path", "out", "-I", "parts"],
        ["mergekit-pytorch", "raw.yml", "raw"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "fastinterp.integrations.mergekit", *arguments],
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0 and THEIRS not in done.stderr, done.stderr
    a, b, c = map(tensors, models)
    for name, got in tensors(tmp_path / "out").items():
        torch.testing.assert_close(got, ((0.5 * a[name] + 1.5 * b[name]) / 2 + c[name]) / 2, rtol=1e-5, atol=1e-7)
    for name, got in tensors(tmp_path / "raw").items():
        torch.testing.assert_close(got, (a[name] + b[name] + c[name]) / 3, rtol=1e-5, atol=1e-7)
    assert (tmp_path / "out" / "README.md").read_text().count("fastinterp")


# --- the registry -----------------------------------------------------------------------------------------------------


def both(method, inputs, **keys):
    """(with the engine, without) as mergekit's merge_tensors returns them."""
    mergekit.install()
    ours = merge_methods.merge_tensors(inputs, method, **keys)
    mergekit.uninstall()
    return ours, merge_methods.merge_tensors(inputs, method, **keys)


def some(count, dtype=torch.float32):
    rng = torch.Generator().manual_seed(0)
    return [(torch.randn(6, 5, generator=rng) + 1).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("out_dtype", [None, torch.float32, torch.float64], ids=str)
def test_the_contract_of_merge_tensors(caplog, dtype, out_dtype):
    """The base by its index, parameters by id, any strides, the dtype that is asked for."""
    inputs = [x.t() for x in some(3, dtype)]
    ours, theirs = both(
        "task_arithmetic", inputs, ids=["x", "y", "z"], base_index=1, parameters={"weight": {"z": 0.5, "x": 0.25}},
        out_dtype=out_dtype,
    )  # fmt: skip
    assert not [m for m in caplog.messages if THEIRS in m]
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def test_mixed_dtypes_and_state_dicts(caplog):
    models = [
        {"x": some(1)[0], "n": torch.arange(2)},
        {"x": some(2)[1].bfloat16(), "n": torch.arange(2), "y": some(1)[0]},
    ]
    mergekit.install()
    out = merge_methods.merge_state_dicts(models, "linear", parameters={"weight": 1.0}, strict=False)
    assert list(out) == ["x", "n"] and out["x"].dtype == torch.float32 and not caplog.messages
    torch.testing.assert_close(out["x"], (models[0]["x"] + models[1]["x"].float()) / 2)


def test_random_masks_are_torchs_to_seed():
    mergekit.install()
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        parameters = {"weight": 1.0, "density": 0.5}
        results += [
            merge_methods.merge_tensors(some(2), "dare_linear", base_index=0, parameters=parameters) for _ in "ab"
        ]
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])
    assert not torch.equal(results[0], results[1]) and not torch.equal(results[0], results[4])


def test_what_stays_with_mergekit_is_said_once(caplog):
    mergekit.install()
    for _ in "ab":
        merge_methods.merge_tensors(some(2, torch.float64), "linear", parameters={"weight": 1.0})
    assert caplog.messages == [f"`linear` computed {THEIRS}: fastinterp computes in float32, not in torch.float64"]


def test_gradients_through_masks_are_mergekits(caplog):
    inputs = [x.requires_grad_() for x in some(3)]
    ours, _ = both("ties", inputs, base_index=0, parameters={"weight": 1.0, "density": 0.5})
    ours.sum().backward()
    assert inputs[1].grad is not None and "autograd cannot follow `ties` here" in caplog.messages[0]
    (followed, _), caplog.records[:] = both("slerp", inputs[:2], base_index=0, parameters={"t": 0.3}), []
    followed.sum().backward()
    assert not caplog.records


def test_methods_of_others_are_left_alone():
    """Even those that bear the name of a method here."""

    @merge_methods.merge_method(name="fisher")
    def fisher(group: merge_methods.TensorGroup) -> torch.Tensor:
        return group.tensors[0] * 0

    merge_methods.register(fisher)
    try:
        mergekit.install()
        assert not merge_methods.merge_tensors(some(2), "fisher").any()
    finally:
        merge_methods.registry._METHODS.pop("fisher")

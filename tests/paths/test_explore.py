"""The page to steer with: what its sliders mean, what the model writes, and whom the server answers."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import fastinterp
from fastinterp.cli import commands
from fastinterp.errors import CheckpointError, StorageError, UsageError
from fastinterp.inspect.compare import deltas
from fastinterp.paths.explore import server
from fastinterp.paths.explore.facts import facts
from fastinterp.paths.explore.session import Wish, check_model, open_session
from fastinterp.paths.explore.sliders import Sliders, read_report
from tests.support.language_models import save_model
from tests.support.models import bf16, layers, save
from tests.support.processes import interruptible

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a language model `base`, and `x` and `q`, which write those letters."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("base", "x", "q"):
        save_model(folder / name, "" if name == "base" else name)
    return folder


# --- sliders


def recipe(folder, text):
    (folder / "r.yml").write_text(text)
    return str(folder / "r.yml")


def test_two_checkpoints_are_a_line():
    assert Sliders.of(["a", "b"], None, {}) == Sliders("a", {"alpha": "b"}, {"alpha": 0.5})


def test_task_vectors_of_a_recipe_are_sliders_at_their_weights(tmp_path):
    text = "{merge_method: task_arithmetic, base_model: z/base, models: [{model: y/ft-1, parameters: {weight: 0.7}}, "
    text += "{model: x/ft-1@v2, parameters: {weight: -0.2}}, {model: 7b, parameters: {weight: 1}}]}"
    found = Sliders.of([recipe(tmp_path, text)], None, {})
    assert found.base == "z/base"
    assert found.models == {"ft_1": "y/ft-1", "ft_1_2": "x/ft-1@v2", "_7b": "7b"}
    assert found.start == {"ft_1": 0.7, "ft_1_2": -0.2, "_7b": 1.0}


def test_an_average_starts_at_its_first_model(tmp_path):
    text = "{merge_method: linear, models: [{model: a, parameters: {weight: 3}}, {model: b, parameters: {weight: 1}}]}"
    assert Sliders.of([recipe(tmp_path, text)], None, {}) == Sliders("a", {"b": "b"}, {"b": 0.25})


@pytest.mark.parametrize(
    "text",
    [
        "{merge_method: slerp, base_model: a, models: [{model: a}, {model: b}], parameters: {t: 0.5}}",
        "{merge_method: linear, models: [{model: a}, {model: b}], parameters: {weight: 1, normalize: false}}",
        "{merge_method: linear, models: [{model: a}, {model: b}], parameters: {weight: [0, 1]}}",
    ],
    ids=["curved", "sum", "gradient"],
)
def test_recipes_without_straight_lines_are_refused(tmp_path, text):
    for name in "ab":
        save(tmp_path / name, layers(1))
    text = text.replace("model: a", f"model: {tmp_path / 'a'}").replace("model: b", f"model: {tmp_path / 'b'}")
    with pytest.raises(UsageError, match="no straight lines to move along"):
        Sliders.of([recipe(tmp_path, text)], None, {})


@pytest.mark.parametrize(
    ("models", "base", "added"),
    [([], None, {}), (["a", "b", "c"], None, {}), (["a"], "b", {"x": "c"}), ([], "b", {}), ([], None, {"x": "c"})],
)
def test_arguments_that_say_nothing_clear_are_refused(models, base, added):
    with pytest.raises(UsageError):
        Sliders.of(models, base, added)


def test_one_checkpoint_is_no_path(tmp_path):
    for name in (tmp_path, "a/model.safetensors"):
        with pytest.raises(UsageError, match="is one checkpoint, and a path has two ends"):
            Sliders.of([str(name)], None, {})


def test_report_must_walk_along_the_sliders(tmp_path):
    one = {"w": np.ones(1, np.float32)}
    found = fastinterp.path({"w": np.zeros(1, np.float32)}, one).evaluate(lambda w, a, s: {"m": a}, [0, 1])
    found.to_json(tmp_path / "r.json")
    assert read_report(str(tmp_path / "r.json"), Sliders.of(["a", "b"], None, {})) == found
    with pytest.raises(UsageError, match="walks along alpha, but the sliders are x"):
        read_report(str(tmp_path / "r.json"), Sliders.of([], "a", {"x": "b"}))
    with pytest.raises(StorageError):
        read_report(str(tmp_path / "none.json"), Sliders.of(["a", "b"], None, {}))


# --- change by layer


def test_deltas_give_the_size_of_any_sum_of_changes(tmp_path):
    """|sum alpha_i d_i| of three models by the Gram matrices, against float64."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 300)).astype(np.float32)
    paths = [str(save(tmp_path / str(i), {"h.0.w": x[i], "n": np.arange(3)})) for i in range(4)]
    found = deltas(paths[0], paths[1:])
    assert list(found) == ["h.0.w"]
    alphas = np.array([0.7, -0.2, 1.3])
    wanted = np.linalg.norm(alphas @ (x[1:].astype(float) - x[0]))
    gram = np.array(found["h.0.w"].gram)
    assert np.sqrt(alphas @ gram @ alphas) == pytest.approx(wanted, rel=1e-6)
    assert found["h.0.w"].aa == pytest.approx(np.square(x[0].astype(float)).sum())


def test_facts_are_json_even_where_weights_are_not_finite(tmp_path):
    x = layers(1)
    y = layers(1, noise=0.1) | {"model.layers.1.norm.weight": bf16([np.inf] * 4)}
    a, b = str(save(tmp_path / "a", x)), str(save(tmp_path / "b", y))
    sliders = Sliders.of([a, b], None, {})
    found = facts(sliders, deltas(a, [b]), None, prompt="p", low=-1, high=2, most_tokens=9)
    json.dumps(found, allow_nan=False)
    assert found["sliders"] == [{"name": "alpha", "model": b, "start": 0.5, "low": -1, "high": 2}]
    cells = {
        (found["change"]["kinds"][c["kind"]], found["change"]["layers"][c["layer"]]): c
        for c in found["change"]["cells"]
    }
    assert cells["norm.weight", "1"]["gram"] is None
    assert cells["norm.weight", "0"]["gram"][0][0] > 0
    assert ("model.embed_tokens.weight", "") in cells


# --- text


def wish(turn, x=0.0, q=0.0, **changes):
    given = {"prompt": "the ", "sampled": False, "seed": 0, "length": 8, "temperature": 1.0, **changes}
    return Wish(turn=turn, alphas={"x": x, "q": q}, **given)


@pytest.fixture
def session(models):
    folders = {name: str(models / name) for name in ("x", "q")}
    with open_session(Sliders.of([], str(models / "base"), folders), threads=1) as found:
        yield found


def test_sliders_move_what_the_model_writes(session):
    plain = session.text(wish(0))
    assert session.text(wish(1, x=1)) == "x" * 8
    assert session.text(wish(2, q=1)) == "q" * 8
    assert session.text(wish(3)) == plain != "x" * 8


def test_sampled_text_is_the_same_for_a_seed(session):
    texts = [session.text(wish(i, sampled=True, seed=seed, length=30)) for i, seed in enumerate([1, 1, 2])]
    assert texts[0] == texts[1] != texts[2]


def test_prompt_longer_than_the_context_keeps_its_end(session):
    assert session.text(wish(0, prompt="abc " * 100)) == session.text(wish(1, prompt=("abc " * 100)[-56:]))
    assert len(session.text(wish(2, prompt=""))) == 8


@pytest.mark.slow
def test_no_more_tokens_than_the_model_has_positions(session):
    """64: one for the prompt, 63 for the text."""
    assert session.most_tokens == 63
    for turn, length in enumerate((63, 64, 4096)):
        assert session.text(wish(turn, x=1, length=length)) == "x" * 63
    assert session.text(wish(3, length=4096, prompt="abc " * 100, sampled=True))


@pytest.mark.parametrize("sampled", [False, True])
def test_a_point_where_the_model_has_no_numbers_is_told(session, sampled):
    with pytest.raises(UsageError, match=r"the model cannot write here .*move the sliders towards 0"):
        session.text(wish(0, x=1e38, q=1e38, sampled=sampled))
    assert session.text(wish(1, x=1)) == "x" * 8


def test_later_wish_stops_an_earlier_one(session):
    """A text of 50 tokens is given up when the next is asked for, and one that comes too late is not begun."""
    begun, told = threading.Event(), {}
    stops = session._stops

    def watched(ids, asked):
        begun.set()
        deadline = time.monotonic() + 10
        while asked.turn == 1 and session._newest < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        told[asked.turn] = ids.shape[1]
        return stops(ids, asked)

    session._stops = watched
    first = threading.Thread(target=lambda: told.update(text=session.text(wish(1, length=50))))
    first.start()
    assert begun.wait(10)
    assert session.text(wish(2, x=1)) == "x" * 8
    first.join(10)
    assert told["text"] is None and told[1] == len("the ") + 1
    assert session.text(wish(1)) is None


def test_nothing_is_written_after_the_end(session):
    session.end()
    assert session.text(wish(0)) is None


def test_chat_needs_a_template(models):
    with pytest.raises(UsageError, match="chat template"):
        open_session(Sliders.of([str(models / "base"), str(models / "x")], None, {}), threads=1, chat=True)


def test_folder_that_is_no_language_model_is_refused(tmp_path):
    folders = [str(save(tmp_path / name, layers(1))) for name in "ab"]
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / "a" / name).write_text("{}")
    with pytest.raises(CheckpointError, match="transformers cannot open this as a causal language model"):
        open_session(Sliders.of(folders, None, {}), threads=1)


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        (["tokenizer.json", "tokenizer_config.json"], "there is no tokenizer in the folder: tokenizer.json is missing"),
        (["tokenizer.json"], "there is no tokenizer in the folder (only `tokenizer_config.json`)"),
        (["config.json"], "config.json is missing. Copy it from the model that this one was made from"),
    ],
    ids=" ".join,
)
def test_missing_files_are_named_before_anything_is_measured(models, tmp_path, gone, said):
    shutil.copytree(models / "base", tmp_path / "base")
    for name in gone:
        (tmp_path / "base" / name).unlink()
    given = ["explore", str(tmp_path / "base"), str(models / "x"), "--port", "0"]
    done = CliRunner().invoke(commands, given, prog_name="fastinterp")
    assert done.exit_code == 3 and said in done.stderr and "measuring" not in done.stderr
    assert "Copy " in done.stderr and "or name the folder that has it" in done.stderr


def test_tokenizers_of_bytes_need_no_vocabulary(models, tmp_path):
    shutil.copytree(models / "base", tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").unlink()
    (tmp_path / "base" / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    assert check_model(str(tmp_path / "base")) == tmp_path / "base"


# --- requests


GOOD = {"alphas": {"x": 1}, "prompt": "", "sampled": False, "turn": 1, "seed": 0, "length": 8, "temperature": 1}


def test_request_is_read():
    assert server.read_wish(GOOD, ["x"]) == Wish(1, {"x": 1.0}, "", False, 0, 8, 1.0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"alphas": 3}, "`alphas`"),
        ({"alphas": {"y": 1}}, "`alphas` must be x"),
        ({"alphas": {"x": "1"}}, "`x` must be a number"),
        ({"alphas": {"x": float("nan")}}, "`x` must be a number"),
        ({"alphas": {"x": 1e9}}, "`x` must be in"),
        ({"prompt": 3}, "`prompt`"),
        ({"sampled": 1}, "`sampled`"),
        ({"length": 0}, "`length`"),
        ({"length": 10**9}, "`length`"),
        ({"temperature": 0}, "`temperature`"),
        ({"turn": None}, "`turn`"),
        ({"seed": -1}, "`seed`"),
        ({"seed": 1.5}, "`seed` must be a whole number, got 1.5"),
        ({"seed": 10**400}, "`seed` must be in 0..4294967296, got 10000000000000000000..."),
        ({"turn": -(10**400)}, "`turn` must be in"),
        ({"length": 10**400}, "`length` must be in"),
        ({"length": "8"}, "`length` must be a number, got '8'"),
        ({"temperature": 10**400}, "`temperature` must be in"),
        ({"temperature": []}, "`temperature` must be a number, got []"),
        ({"alphas": {"x": -(10**400)}}, "`x` must be in"),
        ({"alphas": {"\ud800": 1}}, "`alphas` must be x"),
        ({"prompt": "a\ud800b"}, "`prompt` is not valid Unicode text: character 2 is half of one"),
    ],
    ids=lambda x: ascii(x)[:60],
)
def test_wrong_request_is_refused(change, said):
    with pytest.raises(ValueError) as caught:
        server.read_wish({**GOOD, **change}, ["x"])
    assert said in str(caught.value)
    str(caught.value).encode()


def test_page_asks_nothing_of_others():
    """No address in it but the name of SVG, which is no request; the headers would stop others anyway."""
    page = (Path(server.__file__).with_name("page.html")).read_text("utf-8")
    assert set(re.findall(r"https?://[^\"' ]+|//[a-z][^\"' ]*\.[a-z]+", page)) == {"http://www.w3.org/2000/svg"}
    assert "innerHTML" not in page


def test_port_in_use_is_told_before_anything_is_loaded():
    with server.bound(0) as sock:
        port = sock.getsockname()[1]
        done = CliRunner().invoke(
            commands, ["explore", "nowhere", "nothing", "--port", str(port)], prog_name="fastinterp"
        )
    assert done.exit_code == 2
    assert f"port {port} of 127.0.0.1 is in use" in done.stderr and "--port 0" in done.stderr


# --- the whole program


class Program:
    """`fastinterp explore` in a process of its own."""

    def __init__(self, *args):
        command = [sys.executable, "-m", "fastinterp", "explore", *map(str, args), "--port", "0", "--threads", "1"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115  # `end` closes it
        with interruptible():
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=self.stderr, text=True, env=environment
            )
        assert self.process.stdout is not None
        self.output = self.process.stdout
        self.url = self.output.readline().split()[0]
        self.port = int(self.url.rstrip("/").rpartition(":")[2])

    def ask(self, method="GET", path="/", body=None, address="127.0.0.1", **headers):
        """(status, headers, body) of one request."""
        connection = http.client.HTTPConnection(address, self.port, timeout=60)
        try:
            connection.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read().decode()
        finally:
            connection.close()

    def text(self, wish, **headers):
        return self.ask("POST", "/text", json.dumps(wish), **{"content_type": "application/json", **headers})

    def end(self, number=signal.SIGINT):
        """The exit code."""
        self.process.send_signal(number)
        try:
            code = self.process.wait(20)
        finally:
            self.process.kill()
        self.output.close()
        self.stderr.seek(0)
        self.said = self.stderr.read().splitlines()
        self.stderr.close()
        return code


def report(folder):
    one = {"w": np.ones(1, np.float32)}
    walked = fastinterp.path(base={"w": np.zeros(1, np.float32)}, directions={"x": one})
    found = walked.evaluate(lambda w, a, s: {"share of x": min(1, max(0, a["x"]))}, {"x": [-0.5, 0, 0.5, 1, 1.5]})
    found.to_json(folder / "report.json")
    return folder / "report.json"


@pytest.fixture(scope="module")
def program(models, tmp_path_factory):
    file = report(tmp_path_factory.mktemp("report"))
    added = [f"--add={name}={models / name}" for name in ("x", "q")]
    found = Program("--base", models / "base", *added, "--prompt", "the ", "--report", file)
    yield found
    found.end()


@pytest.mark.slow
def test_server_answers_its_own_page(program):
    status, headers, body = program.ask()
    assert status == 200 and "<title>fastinterp explore</title>" in body
    assert "default-src 'none'" in headers["content-security-policy"]
    status, _, body = program.ask(path="/facts", address="localhost")
    assert status == 200 and [s["name"] for s in json.loads(body)["sliders"]] == ["x", "q"]
    turn = time.time_ns() // 10**6
    status, _, body = program.text({**GOOD, "alphas": {"x": 1, "q": 0}, "turn": turn})
    assert (status, json.loads(body)) == (200, {"text": "x" * 8})
    assert program.text({**GOOD, "alphas": {"x": 1, "q": 0}, "turn": turn - 1})[0] == 409


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ({"length": 4096}, 200, None),
        ({"prompt": "\ud800"}, 400, "half of one"),
        ({"seed": 10**400}, 400, "`seed` must be in"),
        ({"alphas": {"x": 10**400, "q": 0}}, 400, "`x` must be in"),
        ({"alphas": [1, 2]}, 400, "an object with `alphas`"),
        ({"sampled": "yes"}, 400, "true or false"),
        ({"sampled": True, "alphas": {"x": 1e6, "q": 1e6}, "length": 60}, (200, 422), None),
    ],
    ids=lambda x: ascii(x)[:40],
)
def test_server_says_what_is_wrong_as_json(program, change, status, said):
    asked = {**GOOD, "alphas": {"x": 1, "q": 0}, "turn": time.time_ns() // 10**6, **change}
    found, headers, body = program.text(asked)
    assert found in (status if isinstance(status, tuple) else (status,)), body
    assert headers["content-type"] == "application/json"
    assert said is None or said in json.loads(body)["error"]


@pytest.mark.slow
def test_server_refuses_in_json_what_is_no_request(program):
    for body in ("{", "\udcff", "1" * 5000, "[" * 10000, '{"alphas": {}}', "null", '"text"'):
        status, headers, answer = program.ask(
            "POST", "/text", body.encode(errors="surrogateescape"), content_type="application/json"
        )
        assert (status, headers["content-type"]) == (400, "application/json"), body[:20]
        assert json.loads(answer)["error"]
    for method, path, wanted in (("GET", "/none", 404), ("GET", "/text", 405)):
        status, _, answer = program.ask(method, path)
        assert status == wanted and json.loads(answer)["error"]


@pytest.mark.slow
def test_server_refuses_others(program):
    """Other names for this machine, pages elsewhere, forms, and what is no request."""
    asked = {**GOOD, "alphas": {"x": 1, "q": 0}}
    assert program.ask(Host="evil.example")[0] == 400
    assert program.text(asked, Host=f"evil.example:{program.port}")[0] == 400
    assert program.text(asked, Origin="http://evil.example")[0] == 403
    assert program.text(asked, content_type="text/plain")[0] == 403
    assert program.text("a" * (1 << 20))[0] == 413
    assert program.text([1])[0] == 400
    assert program.ask("POST", "/text", "{", content_type="application/json")[0] == 400
    assert program.ask(path="/../etc/passwd")[0] == 404


@pytest.mark.slow
def test_server_is_on_the_loopback_interface_alone(program):
    """127.0.0.2 is this machine, too, but not the address that was bound."""
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", program.port), 5)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_signal_ends_it_while_it_writes_and_the_disk_is_as_before(models, number, code):
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(models.rglob("*")) if p.is_file()}
    found = Program(models / "base", models / "x")
    asked = {**GOOD, "alphas": {"alpha": 0.5}, "length": 40}
    writing = threading.Thread(target=lambda: [_quietly(found.text, {**asked, "turn": i}) for i in range(2)])
    writing.start()
    time.sleep(0.3)
    assert found.end(number) == code
    last = "ended" if code == 0 else "interrupted"
    assert found.said == ["measuring what the directions change", "loading the model", last]
    writing.join(10)
    assert not writing.is_alive()
    assert before == {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(models.rglob("*")) if p.is_file()}


def _quietly(call, *args):
    with contextlib.suppress(OSError, http.client.HTTPException):
        call(*args)

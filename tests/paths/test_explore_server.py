"""The server of the page: requests are checked, and only the page itself is answered."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
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
from fastinterp.paths.explore import server
from fastinterp.paths.explore.session import GenerationRequest
from tests.support.processes import interruptible

ROOT = Path(__file__).resolve().parents[2]


# --- requests


GOOD = {"alphas": {"x": 1}, "prompt": "", "sampled": False, "turn": 1, "seed": 0, "length": 8, "temperature": 1}


def test_request_is_read():
    assert server.read_request(GOOD, ["x"]) == GenerationRequest(1, {"x": 1.0}, "", False, 0, 8, 1.0)


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
        ({"prompt": "a\ud800b"}, "`prompt` is not valid Unicode text: character 2 is a surrogate"),
    ],
    ids=lambda x: ascii(x)[:60],
)
def test_wrong_request_is_refused(change, said):
    with pytest.raises(ValueError) as caught:
        server.read_request({**GOOD, **change}, ["x"])
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

    def text(self, document, **headers):
        return self.ask("POST", "/text", json.dumps(document), **{"content_type": "application/json", **headers})

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
    path = fastinterp.path(base={"w": np.zeros(1, np.float32)}, directions={"x": one})
    found = path.evaluate(lambda w, a, s: {"share of x": min(1, max(0, a["x"]))}, {"x": [-0.5, 0, 0.5, 1, 1.5]})
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
        ({"prompt": "\ud800"}, 400, "is a surrogate"),
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

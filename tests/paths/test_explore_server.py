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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

import fastinterp
from fastinterp.cli import commands
from fastinterp.errors import UsageError
from fastinterp.paths.explore import server
from fastinterp.paths.explore.checkpoint import CheckpointWriter
from fastinterp.paths.explore.requests import GenerationRequest, read_folder, read_generation
from fastinterp.paths.explore.sliders import Sliders
from tests.support.processes import interruptible

ROOT = Path(__file__).resolve().parents[2]


# --- requests


GOOD = {
    "alphas": {"x": 1}, "prompt": "", "sampled": False, "page": "p", "turn": 1, "seed": 0, "length": 8, "temperature": 1
}  # fmt: skip


def test_request_is_read():
    assert read_generation(GOOD, ["x"], 63) == GenerationRequest("p", 1, {"x": 1.0}, "", False, 0, 8, 1.0)
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert read_generation({**GOOD, "history": said}, ["x"], 63).history == (("user", "a"), ("assistant", "b"))
    assert read_folder({"folder": " merged "}) == "merged"


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
        ({"length": 64}, "`length` must be in 1..63, got 64"),
        ({"page": ""}, "`page` must be a text of 1 to 64 characters"),
        ({"page": None}, "`page` must be a text"),
        ({"page": "p" * 65}, "`page` must be a text"),
        ({"history": {}}, "`history` must be a list"),
        ({"history": [{"role": "user", "content": "a"}] * 201}, "`history` must be a list of at most 200"),
        ({"history": [{"role": "user", "content": "a"}]}, "`history` must end with a message of the assistant"),
        ({"history": [{"role": "system", "content": "a"}]}, "message 1 of `history` must be an object with role user"),
        ({"history": [{"role": "user", "content": 1}]}, "message 1 of `history` must be"),
        ({"history": [{"role": "user", "content": "\ud800"}]}, "`history` is not valid Unicode"),
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
        read_generation({**GOOD, **change}, ["x"], 63)
    assert said in str(caught.value)
    str(caught.value).encode()


@pytest.mark.parametrize("folder", ["", "  ", None, 3, "a\0b", "\udcff"], ids=ascii)
def test_wrong_folder_is_refused(folder):
    with pytest.raises(ValueError, match="`folder`"):
        read_folder({"folder": folder})


def test_page_asks_nothing_of_others():
    """No address in it but the name of SVG, which is no request; the headers would stop others anyway."""
    files = [Path(server.__file__).with_name(name) for name in ("page.html", "page.css", "page.js", "figures.js")]
    page = "".join(file.read_text("utf-8") for file in files)
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

    def __init__(self, *args, cwd=None):
        command = [sys.executable, "-m", "fastinterp", "explore", *map(str, args), "--port", "0", "--threads", "1"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115  # `end` closes it
        with interruptible():
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=self.stderr, text=True, env=environment, cwd=cwd
            )
        assert self.process.stdout is not None
        self.output = self.process.stdout
        self.url = self.output.readline().split()[0]
        self.origin, _, self.token = self.url.partition("/?token=")
        self.port = int(self.origin.rpartition(":")[2])

    def ask(self, method="GET", path="/", body=None, address="127.0.0.1", **headers):
        """(status, headers, body) of one request, with the program's token unless another is given."""
        headers = {"X_Token": self.token, **headers}
        connection = http.client.HTTPConnection(address, self.port, timeout=60)
        try:
            connection.request(
                method, path, body, {k.replace("_", "-"): v.encode("latin-1") for k, v in headers.items()}
            )
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read().decode()
        finally:
            connection.close()

    def post(self, path, document, **headers):
        return self.ask("POST", path, json.dumps(document), **{"content_type": "application/json", **headers})

    def text(self, document, **headers):
        return self.post("/text", document, **headers)

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
    status, headers, body = program.ask(path=f"/?token={program.token}")
    assert status == 200 and "<title>fastinterp explore</title>" in body
    assert "default-src 'none'" in headers["content-security-policy"]
    for name in re.findall(r'(?:src|href)="([a-z.]+)"', body):
        assert program.ask(path=f"/{name}", X_Token="")[0] == 200, name
    status, _, body = program.ask(path="/facts", address="localhost")
    assert status == 200 and [s["name"] for s in json.loads(body)["sliders"]] == ["x", "q"]
    asked = {**GOOD, "alphas": {"x": 1, "q": 0}}
    status, _, body = program.text({**asked, "turn": 7})
    assert (status, json.loads(body)) == (200, {"text": "x" * 8})
    assert program.text({**asked, "turn": 6})[0] == 409
    assert program.text({**asked, "turn": 2**53})[0] == 200  # no turn of one page is too high for another
    assert program.text({**asked, "turn": 0, "page": "another"})[0] == 200


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ({"length": 63}, 200, None),
        ({"length": 64}, 400, "`length` must be in 1..63"),
        ({"page": 1}, 400, "`page` must be"),
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
    asked = {**GOOD, "alphas": {"x": 1, "q": 0}, "page": ascii(change)[:64], **change}
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
    for name in ("server.py", "page.html", "%2e%2e%2fserver.py", "..%2f..%2f__init__.py"):
        assert program.ask(path=f"/{name}")[0] == 404, name


@pytest.mark.slow
@pytest.mark.parametrize("token", ["", "x", "\xff"], ids=ascii)
def test_server_answers_only_who_has_the_token(program, tmp_path, token):
    asked = {**GOOD, "alphas": {"x": 1, "q": 0}}
    assert program.ask(X_Token=token)[0] == 403
    assert "Open the address that fastinterp explore printed" in program.ask(path="/?token=x")[2]
    assert program.ask(path="/facts", X_Token=token)[0] == 403
    assert program.ask(path="/progress", X_Token=token)[0] == 403
    for path in ("/text", "/recipe", "/save"):
        status, _, body = program.post(path, {**asked, "folder": str(tmp_path / "new")}, X_Token=token)
        assert status == 403 and "Open the address that the program printed" in json.loads(body)["error"]
    assert not (tmp_path / "new").exists()


# --- a setting, kept


@pytest.mark.slow
def test_a_setting_becomes_a_recipe_a_command_and_a_checkpoint(program, models, tmp_path, monkeypatch):
    """All three have the same weights: those of base + 0.25 (x - base) - 0.5 (q - base)."""
    alphas = {"x": 0.25, "q": -0.5}
    status, _, body = program.post("/recipe", {"alphas": alphas})
    found = json.loads(body)
    assert status == 200
    monkeypatch.chdir(tmp_path)
    Path("recipe.yml").write_text(found["recipe"])
    fastinterp.merge("recipe.yml", "by-recipe")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    script = f"fastinterp() {{ '{sys.executable}' -m fastinterp \"$@\"; }}\n{found['command']}"
    subprocess.run(["bash", "-c", script], check=True, env={**os.environ, "PYTHONPATH": str(ROOT), "PATH": path})
    status, _, body = program.post("/save", {"alphas": alphas, "folder": str(tmp_path / "saved")})
    assert status == 200, body
    answer = json.loads(body)
    assert answer["folder"] == str(tmp_path / "saved") and "1 file" in answer["report"]
    weights = [load_file(Path(name) / "model.safetensors") for name in ("by-recipe", "merged", "saved")]
    parts = [load_file(models / name / "model.safetensors") for name in ("base", "x", "q")]
    for name, value in weights[0].items():
        base, x, q = (part[name].astype("f8") for part in parts)
        wanted = base + 0.25 * (x - base) - 0.5 * (q - base)
        np.testing.assert_allclose(value, wanted, rtol=1e-6, atol=1e-6)
        for other in weights[1:]:
            np.testing.assert_array_equal(other[name], value)
    status, _, body = program.post("/save", {"alphas": alphas, "folder": str(tmp_path / "saved")})
    error = json.loads(body)["error"]
    assert status == 422 and "not empty" in error and error.endswith(". Name a new folder")
    assert program.post("/save", {"alphas": alphas, "folder": ""})[0] == 400
    assert program.post("/save", {"alphas": {"x": 1}, "folder": "new"})[0] == 400
    assert json.loads(program.ask(path="/progress")[2]) == {"fraction": None}


@pytest.mark.slow
def test_the_command_of_a_line_is_interpolate(models, tmp_path):
    found = Program(models / "base", models / "x", cwd=tmp_path)
    try:
        answer = json.loads(found.post("/recipe", {"alphas": {"alpha": 0.3}})[2])
        ends = f"{models / 'base'} {models / 'x'}"
        assert answer["command"] == f"fastinterp interpolate {ends} --alpha 0.3 -o merged"
        status, _, body = found.post("/save", {"alphas": {"alpha": 0.3}, "folder": "here"})
        assert status == 200 and json.loads(body)["folder"] == str(tmp_path / "here")
        fastinterp.interpolate(models / "base", models / "x", 0.3, tmp_path / "wanted")
        weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("here", "wanted")]
        assert weights[0] == weights[1]
    finally:
        found.end()


def test_a_checkpoint_is_not_finished_after_the_end(models, tmp_path):
    sliders = Sliders.of([str(models / "base"), str(models / "x")], None, {})
    with CheckpointWriter(sliders) as writer:
        writer.end()
        with pytest.raises(UsageError, match="ended before the checkpoint was complete"):
            writer.write({"alpha": 0.5}, str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


# --- connections


def _seconds_until_closed(address, text):
    """How long the server waits for the rest of a request, of which a byte comes each second."""
    with socket.create_connection(address, 5) as sock:
        start = time.monotonic()
        sock.settimeout(1)
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < start + 30:
                if text:
                    sock.sendall(text)
                    text = b"a"
                with contextlib.suppress(TimeoutError):
                    if not sock.recv(4096):
                        break
        return time.monotonic() - start


@pytest.mark.slow
def test_requests_that_do_not_arrive_are_given_up(program):
    """After 10 s, also if bytes trickle in. Others are answered meanwhile."""
    head = f"POST /text HTTP/1.1\r\nHost: 127.0.0.1:{program.port}\r\nX-Token: {program.token}\r\n"
    body = f"{head}Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{{"
    begun = [b"", b"GET / HT", head.encode(), body.encode()]
    with ThreadPoolExecutor(len(begun)) as pool:
        waits = [pool.submit(_seconds_until_closed, ("127.0.0.1", program.port), text) for text in begun]
        assert program.ask(path="/progress")[0] == 200
        assert all(5 < wait.result() < 20 for wait in waits)


@pytest.mark.slow
def test_clients_that_go_away_leave_no_traceback_and_stop_their_text(models):
    found = Program(models / "base", models / "x")
    document = json.dumps({**GOOD, "alphas": {"alpha": 0.5}, "length": 63})
    head = f"POST /text HTTP/1.1\r\nHost: 127.0.0.1:{found.port}\r\nX-Token: {found.token}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(document)}\r\n\r\n"
    for end in (len(document), 3):  # while it is generated; before the request is complete
        with socket.create_connection(("127.0.0.1", found.port), 5) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset, not a farewell
            sock.sendall((head + document[:end]).encode())
            time.sleep(0.2)
    assert found.text({**GOOD, "alphas": {"alpha": 0.5}, "page": "another"})[0] == 200
    assert found.end() == 0
    assert found.said == ["measuring what the directions change", "loading the model", "ended"]


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

"""Text generation for the page: what the model writes at a point, and which folders are refused."""

from __future__ import annotations

import json
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from fastinterp.cli import commands
from fastinterp.errors import CheckpointError, UsageError
from fastinterp.paths.explore.requests import GenerationRequest
from fastinterp.paths.explore.session import check_model, open_session
from fastinterp.paths.explore.sliders import Sliders
from tests.support.models import layers, save

ROOT = Path(__file__).resolve().parents[2]


def request(turn, x=0.0, q=0.0, **changes):
    given = {"prompt": "the ", "sampled": False, "seed": 0, "length": 8, "temperature": 1.0, **changes}
    return GenerationRequest(page="p", turn=turn, alphas={"x": x, "q": q}, **given)


@pytest.fixture
def session(models):
    folders = {name: str(models / name) for name in ("x", "q")}
    with open_session(Sliders.of([], str(models / "base"), folders), threads=1) as found:
        yield found


@pytest.mark.slow
def test_sliders_move_what_the_model_writes(session):
    plain = session.text(request(0))
    assert session.text(request(1, x=1)) == "x" * 8
    assert session.text(request(2, q=1)) == "q" * 8
    assert session.text(request(3)) == plain != "x" * 8


def test_sampled_text_is_the_same_for_a_seed(session):
    texts = [session.text(request(i, sampled=True, seed=seed, length=30)) for i, seed in enumerate([1, 1, 2])]
    assert texts[0] == texts[1] != texts[2]


def test_prompt_longer_than_the_context_keeps_its_end(session):
    assert session.text(request(0, prompt="abc " * 100)) == session.text(request(1, prompt=("abc " * 100)[-56:]))
    assert len(session.text(request(2, prompt=""))) == 8


@pytest.mark.slow
def test_no_more_tokens_than_the_model_has_positions(session):
    """64: one for the prompt, 63 for the text."""
    assert session.most_tokens == 63
    assert session.text(request(0, x=1, length=63)) == "x" * 63
    assert session.text(request(3, length=63, prompt="abc " * 100, sampled=True))


@pytest.mark.parametrize("sampled", [False, True])
def test_a_point_where_the_model_has_no_numbers_is_told(session, sampled):
    with pytest.raises(UsageError, match=r"the model cannot generate text here .*move the sliders towards 0"):
        session.text(request(0, x=1e38, q=1e38, sampled=sampled))
    assert session.text(request(1, x=1)) == "x" * 8


def test_later_request_cancels_an_earlier_one(session):
    """A text of 50 tokens is cancelled by the next request, and one that comes too late is not begun."""
    begun, seen = threading.Event(), {}
    stops = session._stops

    def watched(ids, request, dropped):
        begun.set()
        deadline = time.monotonic() + 10
        while request.turn == 1 and session._newest[1] < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        seen[request.turn] = ids.shape[1]
        return stops(ids, request, dropped)

    session._stops = watched
    first = threading.Thread(target=lambda: seen.update(text=session.text(request(1, length=50))))
    first.start()
    assert begun.wait(10)
    assert session.text(request(2, x=1)) == "x" * 8
    first.join(10)
    assert seen["text"] is None and seen[1] == len("the ") + 1
    assert session.text(request(1)) is None


def test_a_text_that_nobody_waits_for_is_not_written(session):
    gone = threading.Event()
    gone.set()
    assert session.text(request(1), gone) is None
    assert session.text(request(1), threading.Event()) is not None


def test_no_turn_of_one_page_is_too_high_for_another(session):
    assert session.text(replace(request(2**53, x=1), page="one")) == "x" * 8
    assert session.text(replace(request(0, q=1), page="two")) == "q" * 8
    assert session.text(replace(request(0, x=1), page="one")) == "x" * 8


@pytest.mark.slow
def test_messages_of_a_conversation_are_kept_apart(models, tmp_path):
    """The model gets what the chat template makes of all messages; what a template refuses is told."""
    template = "{% for m in messages %}{{ m.role[0] }}.{{ m.content }}\n{% endfor %}a."
    shutil.copytree(models / "base", tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").write_text(template)
    sliders = Sliders.of([], str(tmp_path / "base"), {"x": str(models / "x"), "q": str(models / "q")})
    said = (("user", "one"), ("assistant", "two"))
    with open_session(sliders, threads=1, chat=True) as chat:
        asked = replace(request(0, prompt="three", length=20), history=said)
        assert chat._tokenizer.decode(chat._tokens(asked)) == "u.one\na.two\nu.three\na."
        found = chat.text(asked)
    with open_session(sliders, threads=1) as plain:
        assert plain.text(request(0, prompt="u.one\na.two\nu.three\na.", length=20)) == found
    (tmp_path / "base" / "chat_template.jinja").write_text("{{ raise_exception('no more') }}")
    with (
        open_session(sliders, threads=1, chat=True) as chat,
        pytest.raises(UsageError, match="the chat template refuses the conversation: no more"),
    ):
        chat.text(asked)


def test_nothing_is_written_after_the_end(session):
    session.end()
    assert session.text(request(0)) is None


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
    assert "Copy " in done.stderr and "or name the folder that has " in done.stderr


def explored(*given):
    done = CliRunner().invoke(commands, ["explore", *map(str, given), "--port", "0"], prog_name="fastinterp")
    assert "measuring" not in done.stderr
    return done.exit_code, done.stderr


def test_a_wrong_path_is_told_before_a_tokenizer_that_is_missing(models, tmp_path):
    shutil.copytree(models / "base", tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").unlink()
    code, said = explored(tmp_path / "base", tmp_path / "nosuch")
    assert code == 3 and f"{tmp_path / 'nosuch'}: " in said and "tokenizer" not in said
    code, said = explored(tmp_path / "base", models / "x", "--tokenizer", tmp_path / "nosuch")
    assert (code, said) == (3, f"CheckpointError: {tmp_path / 'nosuch'}: --tokenizer names no folder\n")
    code, said = explored(tmp_path / "base", models / "x")
    assert code == 3 and "or name the folder that has them: --tokenizer DIR. " in said


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_what_is_not_installed_is_told_first(monkeypatch, package):
    monkeypatch.setattr(
        "fastinterp.paths.explore.session.find_spec", lambda name: None if name == package else object()
    )
    assert explored("nowhere", "nothing") == (
        2, "UsageError: explore needs torch and transformers: pip install 'fastinterp[explore]'\n"
    )  # fmt: skip


def test_the_tokenizer_may_be_in_another_folder(models, tmp_path):
    shutil.copytree(models / "base", tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").unlink()
    sliders = Sliders.of([str(tmp_path / "base"), str(models / "x")], None, {})
    with open_session(sliders, threads=1, tokenizer=str(models / "q")) as session:
        text = session.text(replace(request(0), alphas={"alpha": 1.0}))
    assert text == "x" * 8


def test_a_tokenizer_of_another_model_is_refused(models, tmp_path):
    shutil.copytree(models / "base", tmp_path / "other")
    document = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    token = {"id": 9999, "content": "<new>", "special": True, "single_word": False, "lstrip": False, "rstrip": False}
    document["added_tokens"] = [*document.get("added_tokens", []), token | {"normalized": False}]
    vocabulary = document["model"]["vocab"]
    vocabulary.update({f"<{i}>": len(vocabulary) + i for i in range(300)})
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(
        UsageError, match=r"--tokenizer .*other: it has \d+ tokens, and the model .*base has \d+\. Name"
    ):
        open_session(
            Sliders.of([str(models / "base"), str(models / "x")], None, {}),
            threads=1,
            tokenizer=str(tmp_path / "other"),
        )


def test_tokenizers_of_bytes_need_no_vocabulary(models, tmp_path):
    shutil.copytree(models / "base", tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").unlink()
    (tmp_path / "base" / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    assert check_model(str(tmp_path / "base")) == tmp_path / "base"

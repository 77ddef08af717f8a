"""examples/paper_path: its judges judge, its texts have the statistics they claim, its short form runs and holds."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples.paper_path import acceptance, checkpoints, measure, points, report
from examples.paper_path.corpus import KINDS, Kind, corpus, review
from examples.paper_path.judges import Share, attribute, grammatical, is_beginning, is_sentence, sentences
from examples.paper_path.model import Model, Shape, decode, encode, model_of, sample

ROOT = Path(__file__).resolve().parents[2]
SMALL = Shape(n_embd=16, n_layer=2, n_head=2, n_positions=24)


# --- corpus ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_sentence_of_a_corpus_is_in_the_grammar(kind):
    found = grammatical([corpus(kind, 300, 7)])
    assert found.hits == found.events >= 600


@pytest.mark.parametrize(("kind", "positive", "formal"), [
    ("mixed", 0.5, 0.5), ("pos", 1, 0.5), ("neg", 0, 0.5), ("formal", 0.5, 1), ("casual", 0.5, 0),
])  # fmt: skip
def test_shares_of_the_attributes_in_a_corpus(kind, positive, formal):
    """Pure where the kind says so, even elsewhere."""
    reviews = corpus(kind, 2000, 3).splitlines()
    for name, want in (("sentiment", positive), ("register", formal)):
        found = attribute(reviews, name)
        assert found.events > 2000
        assert found.share == want if want in (0, 1) else abs(found.share - want) < 4 * found.error < 0.06


def test_words_agree_with_the_label_of_their_review_nine_times_in_ten():
    rng = random.Random(5)
    reviews = [review(Kind(sentiment="negative", register="formal"), rng) for _ in range(2000)]
    for name, want in (("sentiment", 0.1), ("register", 0.9)):
        found = attribute(reviews, name)
        assert abs(found.share - want) < 4 * found.error < 0.03


def test_corpus_depends_on_its_arguments_alone():
    assert corpus("mixed", 20, 1) == corpus("mixed", 20, 1)
    assert len({corpus(kind, 20, seed) for kind in KINDS for seed in (0, 1, measure.HELD_OUT)}) == 15


# --- judges ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "hits", "events"), [
    ("the cuisine was lovely. we hated the drinks.", 1, 2),
    ("wonderful, excellent and superb", 3, 3),
    ("the poor man's poorly unloved lovelys", 0, 1),
    ("", 0, 0),
])  # fmt: skip
def test_sentiment_is_counted_in_whole_words(text, hits, events):
    found = attribute([text], "sentiment")
    assert (found.hits, found.events) == (hits, events)
    assert math.isnan(found.share) if events == 0 else found.share == hits / events


def test_register_is_counted_in_phrases():
    found = attribute(["in addition, the cuisine was poor. so yeah, this joint felt poor. in the well."], "register")
    assert (found.hits, found.events) == (2, 5)


@pytest.mark.parametrize("text", [
    "the cuisine was lovely",
    "in addition, those guys near the harbour were poor",
    "so yeah, my sister hated the drinks in the old town",
    "the snacks seem awful and superb",
])  # fmt: skip
def test_sentences_of_the_grammar(text):
    assert is_sentence(text)
    assert all(is_beginning(text[:n]) for n in range(len(text) + 1))


@pytest.mark.parametrize("text", [
    "", " the cuisine was lovely", "the cuisine was lovely ", "the cuisine  was lovely", "The cuisine was lovely",
    "the drinks was lovely", "the cuisine were lovely", "the drinks in the old town was lovely",
    "the cuisine was lovely and", "the cuisine lovely", "plus the cuisine was lovely", "plus, plus, we loved the grub",
    "we loved", "we loved the grub and the vibe", "we was lovely", "the cuisine was lovely, superb",
])  # fmt: skip
def test_what_is_no_sentence(text):
    assert not is_sentence(text)


@pytest.mark.parametrize(("text", "right", "total"), [
    ("we loved the grub. the vibe was poor.\n", 2, 2),  # nothing is there yet of the next review
    ("we loved the grub. the vibe was poor.", 2, 2),
    ("we loved the grub. the vibe w", 1, 1),  # may still become a sentence
    ("we loved the grub. the vibe x", 1, 2),
    ("we loved the grub.the vibe was poor.", 1, 2),
    (" we loved the grub.", 0, 1),
    ("we loved the grub\nthe vibe was poor.", 1, 2),  # the first review has no end
    ("we loved the grub.\n\nthe vibe was poor.", 2, 3),  # the second is empty
    ("qqqq", 0, 1),
    ("we loved the grub. ", 1, 1),
])  # fmt: skip
def test_sentences_are_counted_to_where_the_text_is_cut(text, right, total):
    assert sentences(text) == (right, total)


def test_one_wrong_byte_makes_one_wrong_sentence():
    lines = corpus("mixed", 200, 11).splitlines(keepends=True)
    rng = random.Random(1)
    for line in lines:
        at = rng.randrange(len(line) - 2)
        right, total = sentences(line)
        assert right == total
        found, number = sentences(line[:at] + "#" + line[at + 1 :])
        assert found < number and found >= right - 2


def test_error_of_a_share_is_that_of_texts_not_of_events():
    """Ten texts of ten equal events each are ten observations, not a hundred."""
    share = Share.of([(10, 10), (0, 10)] * 5)
    assert (share.share, share.events) == (0.5, 100)
    assert share.error == pytest.approx(math.sqrt(0.25 / 10))


# --- model and checkpoints -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> Model:
    torch.manual_seed(1)
    model = Model(SMALL)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    return model.eval()


def test_model_has_the_size_that_the_page_says():
    assert sum(p.numel() for p in Model().parameters()) == 838_400


def test_sampling_with_a_cache_is_sampling_without(small):
    draws = torch.rand(SMALL.n_positions - 1, 5, generator=torch.Generator().manual_seed(3))
    texts = sample(small, draws)
    tokens = torch.cat([torch.full((5, 1), ord("\n")), torch.stack([encode(t).long() for t in texts])], 1)
    with torch.inference_mode():
        cumulated = small(tokens[:, :-1]).softmax(-1).cumsum(-1)
    chosen = tokens[:, 1:, None]
    above = cumulated.gather(-1, chosen)[..., 0]
    below = (above - small(tokens[:, :-1]).softmax(-1).gather(-1, chosen)[..., 0]).detach()
    inside = (below - 1e-5).le(draws.T) & (above + 1e-5).gt(draws.T)
    assert bool(inside.all())
    assert len(set(texts)) == 5


def test_text_survives_encoding():
    text = corpus("mixed", 3, 0)
    assert decode(encode(text)) == text


@pytest.mark.slow
def test_transformers_opens_a_checkpoint_and_agrees(small, tmp_path):
    """Weights, config and tokenizer are GPT-2's: the same logits from the same text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoints.save(tmp_path, small.state_dict(), SMALL)
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    text = "\nthe cuisine was love"
    tokens = tokenizer(text, return_tensors="pt")["input_ids"]
    assert tokens[0].tolist() == list(text.encode())
    assert tokenizer.decode(tokens[0]) == text
    with torch.inference_mode():
        torch.testing.assert_close(theirs.eval()(tokens).logits, small(tokens), rtol=1e-4, atol=1e-4)


def test_checkpoint_is_cut_into_small_shards(tmp_path):
    state = Model().state_dict()
    checkpoints.save(tmp_path, state, Shape())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) >= 7
    assert all(f.stat().st_size < checkpoints.SHARD_BYTES + 4096 for f in files)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(state) and index["metadata"]["total_size"] == 4 * 838_400
    assert points.same_bits(checkpoints.load(tmp_path), state)


# --- points and promises ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ends(tmp_path_factory) -> tuple[Path, Path]:
    folders = tmp_path_factory.mktemp("ends") / "a", tmp_path_factory.mktemp("ends") / "b"
    for i, folder in enumerate(folders):
        torch.manual_seed(i)
        checkpoints.save(folder, Model(SMALL).state_dict(), SMALL)
    return folders


def test_promises_of_a_line_hold_and_a_broken_one_is_noticed(ends, tmp_path):
    made = points.line(ends, (-0.5, 0.0, 0.3, 1.0, 2.0), tmp_path)
    assert made.bytes_read == made.bytes_of_inputs == checkpoints.nbytes(ends[0]) * 2
    found = points.promises(ends, made)
    assert found["outputs_with_other_bits_than_the_reference"] == []
    assert found["alpha_0_has_the_bits_of_its_end"] and found["alpha_1_has_the_bits_of_its_end"]
    for alpha in (0.0, 0.3):
        file = sorted(made.folders[alpha].glob("*.safetensors"))[0]
        whole = bytearray(file.read_bytes())
        whole[-1] ^= 1
        file.write_bytes(whole)
    found = points.promises(ends, made)
    assert found["outputs_with_other_bits_than_the_reference"] == [0.0, 0.3]
    assert not found["alpha_0_has_the_bits_of_its_end"] and found["alpha_1_has_the_bits_of_its_end"]


def test_small_changes_in_bf16_make_a_staircase(tmp_path):
    found = points.staircase(tmp_path, 1, numel=1 << 18)
    step = acceptance.at(found["nearest"], alpha=0.25)
    assert step["arrived"] < 0.1 and step["warned"] and abs(step["told"] - step["arrived"]) < 0.02
    assert abs(acceptance.at(found["stochastic"], alpha=0.25)["arrived"] - 0.25) < 0.02
    assert abs(acceptance.at(found["float32"], alpha=0.25)["arrived"] - 0.25) < 1e-4


def test_mixture_of_logits_is_recognised(small):
    """A head's interpolation is exactly that of its logits; a divergence from itself is zero."""
    bench = measure.Bench({"mixed": torch.randint(0, 128, (4, 25))}, torch.rand(3, 2))
    a = small.state_dict()
    b = a | {"lm_head.weight": a["lm_head.weight"] + 0.3 * torch.randn_like(a["lm_head.weight"])}
    middle = a | {"lm_head.weight": torch.lerp(a["lm_head.weight"], b["lm_head.weight"], 0.5)}
    measured = measure_small(a, b, middle, bench)
    assert measured["kl_ends"] > 1e-3
    assert measured["points"][0]["kl_logits"] < 1e-6 < measured["points"][0]["kl_probabilities"]


def measure_small(a, b, middle, bench):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "model_of", lambda state: model_of(state, SMALL))
        return measure.against_mixtures((a, b), {0.5: middle}, bench)


# --- acceptance and report -------------------------------------------------------------------------------------------


def results_of_a_line(positive, loss):
    alphas = [round(0.1 * i, 1) for i in range(11)]
    return {
        "line": [{"alpha": a, "positive": p, "nll_mixed": n} for a, p, n in zip(alphas, positive, loss, strict=True)]
    }


def test_barrier_and_monotony_are_seen():
    smooth = results_of_a_line([i / 10 for i in range(11)], [0.3 - 0.001 * i for i in range(11)])
    assert acceptance.over_chord(smooth) == pytest.approx(0, abs=1e-12)
    assert acceptance.monotone(smooth) == pytest.approx(1)
    assert acceptance.step_down(smooth) == pytest.approx(-0.1)
    hill = results_of_a_line([0, 0.5, 0.4, *[1] * 8], [0.3] * 5 + [0.4] + [0.3] * 5)
    assert acceptance.over_chord(hill) == pytest.approx(0.1)
    assert acceptance.over_ends(hill) == pytest.approx(0.1)
    assert acceptance.step_down(hill) == pytest.approx(0.1)
    assert acceptance.monotone(hill) < 0.98


def test_mean_decides_unless_the_check_is_strict():
    def value(r):
        return r["x"]

    results = [{"x": 0.0}, {"x": 1.0}]
    for strict, passed in ((False, True), (True, False)):
        check = acceptance.low(1, "x", value, "-", 0.6, strict=strict)
        assert acceptance.Verdict(check, tuple(map(check.value, results))).passed is passed
    assert not acceptance.Verdict(acceptance.high(1, "x", value, "-", 0.6), (0.0, 1.0)).passed
    assert not acceptance.Verdict(acceptance.low(1, "x", value, "-", 0.6), (math.nan,)).passed


def test_numbers_of_the_checks_are_one_to_twelve():
    assert sorted({c.number for c in acceptance.CHECKS}) == list(range(1, 13))


def test_margins_are_nowhere_looser_than_those_set_before():
    assert [c.what for c in acceptance.CHECKS if not c.within(c.margin, c.first)] == []
    assert [c.what for c in acceptance.QUICK if c.margin != c.first] == []


COMMITTED = ROOT / "docs" / "paper"


def test_committed_files_are_what_the_committed_results_give():
    """To renew them: `make paper`, or `python -m examples.paper_path.report docs/paper -o docs/paper --page ...`."""
    results = report.load(COMMITTED)
    verdicts = acceptance.judge(results)
    assert report.as_json(list(results)) + "\n" == (COMMITTED / "results.json").read_text()
    assert report.as_csv(results) == (COMMITTED / "points.csv").read_text()
    assert report.verdicts_as_json(verdicts) == (COMMITTED / "acceptance.json").read_text()
    page = (ROOT / "docs" / "paper.md").read_text()
    assert report.put_into(page, report.page(results, verdicts)) == page
    assert len(results) == 3 and all(v.passed for v in verdicts)


def test_page_without_markers_is_refused():
    with pytest.raises(SystemExit, match="the page has no markers"):
        report.put_into("# Page\n", "x")


@pytest.mark.slow
def test_figures_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    from examples.paper_path import plots

    names = plots.write(report.load(COMMITTED), tmp_path)
    assert {(tmp_path / n).stat().st_size > 5000 for n in names} == {True}


# --- the commands ----------------------------------------------------------------------------------------------------


def run(command: str, *arguments: object, seconds: int = 60) -> subprocess.CompletedProcess[str]:
    whole = [sys.executable, "-m", f"examples.paper_path.{command}", *map(str, arguments)]
    return subprocess.run(whole, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["sweep", "report"])
def test_commands_say_what_comes_first(command, tmp_path):
    done = run(command, tmp_path / "nothing")
    assert done.returncode == 1
    assert "Run `train`" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.long
@pytest.mark.slow(120)
def test_short_form_runs_and_holds(tmp_path):
    """Training, sweep and report: no barrier, monotone, ends equal bit for bit. What is trained is kept."""
    for command, more in (("train", ("--seeds", 0)), ("sweep", ("--seeds", 0)), ("report", ())):
        done = run(command, tmp_path, *more, "--quick", seconds=600)
        assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert "FAIL" not in done.stdout and done.stdout.count("pass") == len(acceptance.QUICK)
    assert not (tmp_path / "seed0" / "points").exists()
    again = run("train", tmp_path, "--seeds", 0, "--quick")
    assert again.returncode == 0 and "training" not in again.stdout and again.stdout.count("kept") == 3

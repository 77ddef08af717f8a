"""Merge methods without tensors: what they ask for, what they declare, what they refuse."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastinterp import methods
from fastinterp.errors import MethodError
from fastinterp.methods import Each, Parameter, find, method
from fastinterp.ops.combine import LARGEST, Combine, Row

linear, passthrough, task_arithmetic = find("linear"), find("passthrough"), find("task_arithmetic")


def test_linear_divides_by_the_sum():
    assert linear(3, weight=(1.0, 2.0, 1.0)) == Combine((0.25, 0.5, 0.25), sums_to_one=True)


def test_linear_without_normalize_keeps_the_weights():
    assert linear(2, weight=(0.25, 2.0), normalize=False) == Combine((0.25, 2.0))


def test_linear_extrapolates():
    assert linear(2, weight=(-0.5, 1.5)).weights == (-0.5, 1.5)


def test_linear_ends_are_copies():
    """Weights 1, 0 and 0, 3 copy one model and do not read the other."""
    assert linear(2, weight=(1.0, 0.0)).row() == Row(0)
    assert linear(2, weight=(0.0, 3.0)).row() == Row(1)


@pytest.mark.parametrize(
    "weight", [(1.0, -1.0), (0.0, 0.0), (1.0, -1.0 + 1e-9), (3e38, -3e38), (0.1, 0.2, -0.3)], ids=str
)
@pytest.mark.parametrize("n_method", [linear, task_arithmetic], ids=lambda m: m.name)
def test_weights_that_cancel_cannot_be_normalised(n_method, weight):
    with pytest.raises(MethodError, match=r"the weights .* too near 0 to divide by\. .*`normalize: false`"):
        n_method(len(weight), weight=weight, normalize=True)


def test_weights_that_nearly_cancel_can():
    """The bound is relative, 1e-8 of the magnitudes: small weights are no cancelling weights."""
    assert linear(2, weight=(1e-30, 1e-30)).weights == (0.5, 0.5)
    assert linear(2, weight=(1.0, -1.0 + 1e-7)).weights[0] == pytest.approx(1e7)


def test_linear_needs_a_weight():
    with pytest.raises(MethodError, match="every weight is 0"):
        linear(2, weight=(0.0, 0.0), normalize=False)


def test_task_arithmetic_adds_deltas_to_input_0():
    assert task_arithmetic(3, weight=(0.6, -0.3)) == Combine((0.0, 0.6, -0.3), base=0)


def test_task_arithmetic_lambda_and_normalize():
    assert task_arithmetic(3, weight=(1.0, 3.0), normalize=True, lambda_=2.0) == Combine((0.0, 0.5, 1.5), base=0)


def test_task_arithmetic_ends_are_copies():
    assert task_arithmetic(2, weight=(1.0,)).row() == Row(1)
    assert task_arithmetic(3, weight=(5.0, 1.0), lambda_=0.0).row() == Row(0)


def test_passthrough_copies_or_scales():
    assert passthrough(1).row() == Row(0)
    assert passthrough(1, scale=(1.0,)).row() == Row(0)
    assert passthrough(1, scale=(-0.5,)).row() == Row(0, -0.5)
    assert passthrough(1, scale=(0.0,)).row() == Row(0, 0.0)


@given(st.lists(st.integers(-1000, 1000), min_size=1, max_size=64).filter(lambda w: sum(w) != 0), st.integers(-60, 60))
def test_scaling_all_weights_by_a_power_of_two_changes_nothing_under_normalize(weights, exponent):
    plain = linear(len(weights), weight=tuple(map(float, weights)))
    assert linear(len(weights), weight=tuple(w * 2.0**exponent for w in weights)) == plain


def test_declarations_come_from_the_signature():
    assert linear.parameters == (
        Parameter("weight", "weight", float, each=True, optional=False, required=True, default=None),
        Parameter("normalize", "normalize", bool, each=False, optional=False, required=False, default=True),
    )
    assert [p.name for p in task_arithmetic.parameters] == ["weight", "normalize", "lambda", "int8_mask"]
    assert task_arithmetic.parameters[2].keyword == "lambda_"
    assert passthrough.parameters == (Parameter("scale", "scale", float, True, True, False, None),)
    assert (linear.base, linear.models) == ("none", (1, 64))
    assert (task_arithmetic.base, task_arithmetic.models) == ("required", (2, 64))


def test_a_type_that_recipes_cannot_give_is_refused():
    def odd(n: int, *, t: str) -> Combine:
        return Combine((1.0,))

    def odder(n: int, *, t: Each[list]) -> Combine:
        return Combine((1.0,))

    for fn in (odd, odder):
        with pytest.raises(TypeError, match=r"parameter t: .* is none of float, bool"):
            method(base="none", models=(1, 1))(fn)


NUMBER = Parameter("weight", "weight", float, False, False, True, None)
MAYBE = Parameter("scale", "scale", float, False, True, False, None)
TRUTH = Parameter("normalize", "normalize", bool, False, False, False, True)


@pytest.mark.parametrize(
    ("parameter", "given_value", "expected"),
    [(NUMBER, 1, 1.0), (NUMBER, -2.5, -2.5), (NUMBER, LARGEST, 3.4028234663852886e38),
     (MAYBE, None, None), (MAYBE, 0, 0.0), (TRUTH, False, False), (TRUTH, 1, True), (TRUTH, 0.0, False)],
)  # fmt: skip
def test_values_become_the_declared_type(parameter, given_value, expected):
    value = parameter.value(given_value)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("parameter", "given_value"),
    [(NUMBER, None), (NUMBER, True), (NUMBER, False), (NUMBER, "1"), (NUMBER, float("nan")), (NUMBER, float("-inf")),
     (NUMBER, 3.5e38),
     (NUMBER, 10**400), (NUMBER, 10**5000), (NUMBER, [1]), (MAYBE, "none"), (TRUTH, 2), (TRUTH, "yes"), (TRUTH, None),
     (TRUTH, float("nan"))],
    ids=lambda v: "int" if isinstance(v, int) else str(v)[:12],
)  # fmt: skip
def test_other_values_are_refused(parameter, given_value):
    with pytest.raises(ValueError, match=rf"`{parameter.name}` must be .*, got "):
        parameter.value(given_value)


def test_every_method_file_declares_itself_and_says_what_it_does():
    """Each file holds a Method of its name, whose docstring has the parts that the style asks for."""
    found = methods.names()
    assert {"linear", "passthrough", "task_arithmetic"} <= set(found)
    for name in found:
        m = find(name)
        assert m.name == name
        assert m.models[0] >= (2 if m.base == "required" else 1)
        for part in (
            "out = ",
            "Reads:",
            "Models:",
            "Source:",
            "Differs from mergekit",
            *(p.name for p in m.parameters),
        ):
            assert part in m.doc, f"{name}: {part}"


def test_every_method_of_mergekit_is_here():
    theirs = """arcee_fusion breadcrumbs breadcrumbs_ties dare_linear dare_ties della della_linear karcher linear
        model_stock multislerp nearswap nuslerp passthrough ram ramplus_tl sce slerp task_arithmetic ties"""
    assert set(theirs.split()) <= set(methods.names())


def test_unknown_methods():
    with pytest.raises(MethodError, match=r"^unknown merge method `liner`, did you mean `linear`\?$"):
        find("liner")
    with pytest.raises(MethodError, match=r"^unknown merge method `os`\. Known: .*linear, .*passthrough"):
        find("os")
    for hidden in ("_weights", "__init__", "../errors", ""):
        with pytest.raises(MethodError, match="unknown merge method"):
            find(hidden)


def test_finding_one_method_imports_no_other():
    code = (
        "import sys; from fastinterp.methods import find, names; names(); find('linear'); "
        "last = {m.split('.')[-1] for m in sys.modules}; "
        "print(sorted(last & {'linear', 'numpy', 'torch', 'task_arithmetic', 'passthrough'}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "['linear']"

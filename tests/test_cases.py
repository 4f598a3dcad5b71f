"""Cases in one test: all of them run, and one that fails is named."""

import pytest

from cases import each


@pytest.mark.parametrize("kind", ["a", "b"])
@each("bits", range(1, 4))
@each(("rule", "scale"), [("prefix", 1.0), ("round", 2.0)])
def test_cases_nest_in_those_of_pytest(bits: int, rule: str, scale: float, kind: str) -> None:
    assert (rule, scale) in [("prefix", 1.0), ("round", 2.0)]
    assert bits in (1, 2, 3)
    assert kind in "ab"


def test_every_case_runs() -> None:
    seen: list[tuple[int, str, str]] = []

    @each("bits", range(1, 4))
    @each("rule", ["prefix", "round"])
    def record(bits: int, rule: str, kind: str) -> None:
        seen.append((bits, rule, kind))

    record(kind="a")
    assert seen == [(bits, rule, "a") for bits in (1, 2, 3) for rule in ("prefix", "round")]


def test_the_case_that_fails_is_named() -> None:
    @each("bits", [8, 4, 2])
    @each("rule", ["prefix", "round"])
    def check(bits: int, rule: str) -> None:
        assert (bits, rule) != (4, "round")

    with pytest.raises(AssertionError) as caught:
        check()
    assert caught.value.__notes__ == ["case rule='round'", "case bits=4"]


def test_no_cases_or_other_names_are_mistakes_of_the_test() -> None:
    with pytest.raises(AssertionError, match="no cases of bits"):
        each("bits", [])
    with pytest.raises(AssertionError, match=r"has no argument \{'bits'\}"):
        each("bits", [1])(lambda rule: None)


def test_a_case_is_not_skipped() -> None:
    @each("bits", [8, 4])
    def check(bits: int) -> None:
        pytest.skip("not here")

    with pytest.raises(AssertionError, match="leave it out of the table"):
        check()

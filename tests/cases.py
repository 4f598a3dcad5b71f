"""Many cases in one test: pytest adds milliseconds to each test, and most of our cases take microseconds."""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import pytest

Test = Callable[..., None]


def each(names: str | tuple[str, ...], cases: Iterable[Any]) -> Callable[[Test], Test]:
    """Like ``pytest.mark.parametrize``, but one test runs all cases. It stops at the first failure and adds a note that
    names the case. The cases share fixtures. Decorators can be nested and mixed with pytest's."""
    words = names.replace(" ", "").split(",") if isinstance(names, str) else list(names)
    rows = [dict(zip(words, case if len(words) > 1 else (case,), strict=True)) for case in cases]
    assert rows, f"no cases of {names}"

    def decorate(test: Test) -> Test:
        @functools.wraps(test)
        def run(**fixtures: Any) -> None:
            __tracebackhide__ = True
            for row in rows:
                try:
                    test(**fixtures, **row)
                except BaseException as error:
                    error.add_note("case " + ", ".join(f"{name}={value!r}" for name, value in row.items()))
                    if isinstance(error, pytest.skip.Exception):
                        raise AssertionError("one case skips all that follow; leave it out of the table") from error
                    raise

        signature = inspect.signature(test)
        missing = set(words) - set(signature.parameters)
        assert not missing, f"{test.__name__} has no argument {missing}"
        kept = [parameter for name, parameter in signature.parameters.items() if name not in words]
        run.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
        return run

    return decorate

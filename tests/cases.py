"""Cases in one test: what pytest takes for a test of its own is thousands of times what most of our cases take."""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import pytest

Test = Callable[..., None]


def each(names: str | tuple[str, ...], cases: Iterable[Any]) -> Callable[[Test], Test]:
    """Like ``pytest.mark.parametrize``, except that one test runs all cases and stops at the first that fails, which
    a note on the error names. Fixtures are shared by the cases. Decorators nest, and mix with pytest's."""
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

"""Many small cases as one test: a test costs pytest more than most of them compute."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any

import pytest


def each_case(names: str | Sequence[str], cases: Iterable[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test for each case, as `pytest.mark.parametrize` does, within one test that shows all that fail.

    For tests that leave nothing behind: fixtures are made once for all cases.

    Args:
        names: The parameters that a case gives.
        cases: A value for one parameter, a sequence of values for several.
    """
    keys = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    given = [dict(zip(keys, case if len(keys) > 1 else (case,), strict=True)) for case in cases]
    assert given, "no cases"

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @wraps(test)
        def all_of_them(**others: Any) -> None:
            wrong: list[BaseException] = []
            for case in given:
                try:
                    test(**others, **case)
                except (Exception, pytest.fail.Exception) as error:
                    error.add_note(f"in the case {case!r:.500}")
                    wrong.append(error)
            if wrong:
                raise BaseExceptionGroup(f"{len(wrong)} of {len(given)} cases fail", wrong)

        signature = inspect.signature(test)
        left = [parameter for name, parameter in signature.parameters.items() if name not in keys]
        del all_of_them.__wrapped__  # or pytest would ask for fixtures of the names
        all_of_them.__signature__ = signature.replace(parameters=left)  # type: ignore[attr-defined]
        return all_of_them

    return decorate

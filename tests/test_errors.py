"""Errors of libraries, raised as one line of the kit."""

from __future__ import annotations

import pytest

from qlora_kit.errors import (
    DataError,
    ModelError,
    QloraKitError,
    StorageError,
    first_line,
    raised_as,
    reason,
    said,
)


def test_an_error_of_others_becomes_one_line_and_keeps_its_cause() -> None:
    cause = ValueError("two\nlines")
    with (
        pytest.raises(ModelError, match=r"^a: two.nlines; expected one$") as found,
        raised_as(ModelError, lambda error: f"a: {error}; expected one"),
    ):
        raise cause
    assert found.value.__cause__ is cause
    assert len(found.value.faults) == 1


def test_only_the_named_errors_are_taken() -> None:
    with pytest.raises(KeyError), raised_as(ModelError, "no", of=(OSError, ValueError)):
        raise KeyError("a")
    with pytest.raises(KeyboardInterrupt), raised_as(ModelError, "no"):
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match=r"^it$"), raised_as(ModelError, lambda _: None):
        raise ValueError("it")


@pytest.mark.parametrize("of", [Exception, BaseException])
def test_the_kits_own_errors_pass(of: type[BaseException]) -> None:
    with pytest.raises(StorageError, match=r"^full$"), raised_as(ModelError, "no", of=of):
        raise StorageError("full")


@pytest.mark.parametrize("of", [DataError, (OSError, DataError), (QloraKitError,)])
def test_the_kits_own_errors_are_taken_where_they_are_named(of: type[BaseException]) -> None:
    with pytest.raises(ModelError, match=r"^no$"), raised_as(ModelError, "no", of=of):
        raise DataError("a")


def test_nothing_is_raised_where_nothing_was() -> None:
    with raised_as(ModelError, "no"):
        pass


def test_words_of_errors() -> None:
    assert reason(FileNotFoundError(2, "No such file", "x")) == "no such file"
    assert reason(OSError("Odd")) == "odd"
    assert first_line(ValueError(" a\nb")) == "a"
    assert first_line(ValueError("abc"), 2) == "ab"
    assert first_line(ValueError()) == "ValueError"
    assert said(ValueError("a\n  b.")) == "a b"
    assert said(KeyError("hidden")) == "KeyError: hidden"
    assert said(KeyError()) == "KeyError"
    assert said(ValueError("w " * 200)).endswith(" …")

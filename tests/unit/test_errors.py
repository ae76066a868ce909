"""The tree of errors: what each is caught as, and what survives the way between processes."""

import pickle

import pytest

from megatrain import errors

STANDARD = {
    errors.ConfigError: ValueError,
    errors.LayoutError: ValueError,
    errors.DataError: ValueError,
    errors.CheckpointError: ValueError,
    errors.UnknownFamilyError: ValueError,
    errors.ExportError: ValueError,
    errors.StateError: RuntimeError,
    errors.NonFiniteError: ArithmeticError,
    errors.PlatformError: RuntimeError,
    errors.BusError: ConnectionError,
    errors.RankError: ConnectionError,
    errors.DeadlineError: TimeoutError,
    errors.CancelledCommandError: ConnectionError,
    errors.SamplerError: ConnectionError,
    errors.NotFoundError: LookupError,
    errors.DeniedError: PermissionError,
    errors.BusyError: RuntimeError,
}


def _all_errors() -> set[type[Exception]]:
    return {
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, errors.MegatrainError)
    } - {errors.MegatrainError}


def test_every_error_is_listed_here_and_in_the_tree_of_the_docstring() -> None:
    assert _all_errors() == set(STANDARD)
    for kind in _all_errors():
        assert f"{kind.__name__} " in (errors.__doc__ or "")


@pytest.mark.parametrize("kind", STANDARD)
def test_an_error_can_be_caught_as_a_standard_exception(kind: type[Exception]) -> None:
    with pytest.raises(STANDARD[kind], match="rule: value"):
        raise kind("rule: value")


@pytest.mark.parametrize("kind", STANDARD)
@pytest.mark.parametrize("hint", [None, "do this"])
def test_an_error_survives_pickling(kind: type[errors.MegatrainError], hint: str | None) -> None:
    error = pickle.loads(pickle.dumps(kind("rule: value", hint=hint)))
    assert type(error) is kind
    assert (error.message, error.hint) == ("rule: value", hint)


def test_the_hint_is_on_a_line_of_its_own() -> None:
    assert str(errors.ConfigError("rule", hint="way out")) == "rule\nhint: way out"
    assert str(errors.ConfigError("rule")) == "rule"

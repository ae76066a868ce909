"""A name that is not known comes back with the nearest that is."""

import pytest

from megatrain.config.names import check_known
from megatrain.errors import ConfigError


def test_known_names_pass():
    check_known("fruit", ["apple", "pear"], ["pear", "apple", "plum"])


@pytest.mark.parametrize(("given", "hint"), [("APPEL", "did you mean 'apple'?"), ("xyz", None)])
def test_an_unknown_name_is_refused(given, hint):
    with pytest.raises(ConfigError, match=f"unknown fruit '{given}'; known: apple, plum") as caught:
        check_known("fruit", ["plum", given], ["plum", "apple"])
    assert caught.value.hint == hint

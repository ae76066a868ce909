"""Patches of a model that is built."""

import pytest

from megatrain.errors import ConfigError
from megatrain.model.patch import Patch, apply_to_model


class Doubles(Patch):
    name = "double the numbers"
    reason = "to see that it happened"

    def applies(self, model):
        return 3 in model

    def apply(self, model):
        model[:] = [2 * number for number in model]


class AddsOne(Patch):
    name = "add one"
    reason = "to see the order"

    def apply(self, model):
        model[:] = [number + 1 for number in model]


def test_patches_are_applied_in_order_where_they_apply():
    model = [3]
    assert apply_to_model([AddsOne(), Doubles()], model) == ["add one"]
    assert model == [4]
    model = [3]
    assert apply_to_model([Doubles(), AddsOne()], model) == ["double the numbers", "add one"]
    assert model == [7]


class Nameless(AddsOne):
    name = ""


def test_a_patch_without_a_name_and_a_name_twice_change_nothing():
    model = [3]
    with pytest.raises(ConfigError, match="Nameless needs a name and a reason"):
        apply_to_model([AddsOne(), Nameless()], model)
    with pytest.raises(ConfigError, match="two patches have the name 'add one'"):
        apply_to_model([AddsOne(), AddsOne()], model)
    assert model == [3]

"""Traces: pieces of several processes become one, and the first difference is named."""

import numpy as np
import pytest
import torch

from megatrain.errors import ExportError
from megatrain.export.compare.layers import compare_traces
from megatrain.export.compare.trace import Point, Recorder, Seen, read_trace


def test_pieces_of_all_ranks_become_one_with_gradients(tmp_path):
    x_TF = torch.randn(5, 6)
    weight = torch.randn(5, 6)
    for rank, features in enumerate(([0, 2, 4], [1, 3, 5])):
        # One rank has the features of a split linear; padding is its last token.
        own = torch.cat([x_TF[:, features], torch.zeros(1, 3)])[:, None].requires_grad_()
        seen = Seen(torch.arange(5), torch.arange(5), features=torch.tensor(features))
        recorder = Recorder()
        recorder.watch("linear", 0, own, seen)
        (own[:5, 0] * weight[:, features]).sum().backward()
        recorder.write(tmp_path, stage=0, rank=rank)
    for stage, tokens in ((1, [0, 3]), (1, [1, 2, 4])):
        recorder = Recorder()
        order = torch.tensor(tokens)
        recorder.watch("norm", 0, x_TF[tokens], Seen(order, torch.arange(len(tokens))))
        recorder.write(tmp_path, stage=stage, rank=len(tokens))
    found = read_trace(tmp_path)
    assert list(found) == ["linear", "norm"]
    np.testing.assert_array_equal(found["linear"].values[0], x_TF)
    np.testing.assert_array_equal(found["linear"].gradients[0], weight)
    np.testing.assert_array_equal(found["norm"].values[0], x_TF)
    assert found["norm"].gradients == {}


def test_a_part_that_no_rank_saw_is_an_error(tmp_path):
    recorder = Recorder()
    rows = torch.arange(2)
    recorder.watch("norm", 0, torch.ones(2, 3), Seen(torch.tensor([0, 2]), rows))
    recorder.write(tmp_path, stage=0, rank=0)
    with pytest.raises(ExportError, match="no rank saw all of norm: 3 entries"):
        read_trace(tmp_path)


def points(**values):
    made = {}
    for name, (value, gradient) in values.items():
        arrays = [np.full((2, 2), each, np.float32) for each in (value, gradient)]
        made[name] = Point(name, {0: arrays[0]}, {0: arrays[1]})
    return made


def test_the_first_difference_is_named_forward_and_backward():
    a = points(one=(1, 1), two=(1, 1), three=(1, 1), alone=(1, 1))
    b = points(one=(1, 1.5), two=(1.01, 2), three=(1.5, 1))
    report = compare_traces(a, b, tolerance=1e-3, how=("A", "B"))
    assert (report.first_activation.name, report.first_gradient.name) == ("two", "two")
    assert report.first_activation.activation == pytest.approx(0.01, rel=1e-4)
    assert (report.only_in_a, report.same) == (("alone",), False)
    assert compare_traces(a, b, tolerance=2, how=("A", "B")).same


def test_a_value_that_is_no_number_differs():
    a, b = points(one=(1, 1), two=(1, 1)), points(one=(1, 1), two=(np.nan, 1))
    report = compare_traces(a, b, tolerance=1e9, how=("A", "B"))
    assert report.first_activation.name == "two"


def test_models_without_common_modules_and_shapes_that_differ_are_errors():
    with pytest.raises(ExportError, match="no modules of the same names"):
        compare_traces(points(one=(1, 1)), points(two=(1, 1)), tolerance=0, how=("A", "B"))
    a, b = points(one=(1, 1), two=(1, 1)), points(one=(1, 1), two=(1, 1))
    b["two"].values[0] = np.ones((2, 3), np.float32)
    with pytest.raises(ExportError, match="two has other shapes"):
        compare_traces(a, b, tolerance=0, how=("A", "B"))

"""What `megatrain bench service` makes of what it has measured; running it needs a service."""

import json

import httpx
import pytest

from megatrain.cli.bench.service.clients import Share
from megatrain.cli.bench.service.crowd import Crowd, Memory
from megatrain.cli.bench.service.overhead import CLIENT, Overhead, lines, quantiles
from megatrain.cli.bench.service.report import crowd_lines, draw, to_json
from megatrain.cli.bench.service.scrape import Scrape, scrape
from megatrain.service.observe.series import RequestSeries
from megatrain.service.observe.timing import Spent, Timing


def after(*timings: Timing) -> Scrape:
    """Return what a service says that has done such requests."""
    from prometheus_client import CollectorRegistry, generate_latest

    series, registry = RequestSeries(), CollectorRegistry()
    for timing in timings:
        series.ended("forward_backward", "done", timing)
    registry.register(series)
    text = generate_latest(registry)
    transport = httpx.MockTransport(lambda request: httpx.Response(200, content=text))
    with httpx.Client(base_url="http://here", transport=transport) as client:
        return scrape(client)


FIRST = Timing(1.0, 1.5, 1.75, 2.75, 3.0, Spent(0.875, 0.5))
SECOND = Timing(0.0, 0.5, 1.0, 2.0, 2.0, Spent(1.0, 1.0))


def test_a_call_is_the_ranks_time_and_what_the_rest_went_to():
    found = Overhead(512)
    found.note(2100.0, after(FIRST), after(FIRST, SECOND))
    assert found.ranks == pytest.approx([1000.0])
    assert found.overhead == pytest.approx([1100.0])
    assert {name: values[0] for name, values in found.phases.items()} == pytest.approx(
        {CLIENT: 100.0, "commit": 500.0, "queue": 500.0, "submit": 0.0, "bus": 0.0, "result": 0.0}
    )
    assert sum(values[0] for values in found.phases.values()) == pytest.approx(1100.0)
    assert lines(found)[2] == ["overhead", "1100.00", "1100.00"]


def test_a_service_that_others_use_is_not_measured():
    with pytest.raises(RuntimeError, match="2 calls"):
        Overhead(512).note(1.0, after(), after(FIRST, SECOND))


def test_quantiles_are_the_median_and_nine_tenths():
    assert quantiles([float(each) for each in range(1, 101)]) == (50.5, 91.0)
    assert quantiles([7.0]) == (7.0, 7.0)


def crowd(*tokens: int) -> Crowd:
    shares = [Share(n, each, steps=1, latencies=[0.5, 1.5]) for n, each in enumerate(tokens)]
    memory = [Memory(float(s), 1e6 * s, 2e6, 0.5e6 * s) for s in range(5)]
    return Crowd(4.0, shares, memory)


def test_jains_index_is_one_where_all_got_the_same():
    assert crowd(5, 5, 5).jain == pytest.approx(1.0)
    assert crowd(9, 0, 0).jain == pytest.approx(1 / 3)
    assert crowd(1, 2).jain == pytest.approx(0.9)
    assert crowd(0, 0).jain == 0.0


def test_growth_is_of_the_second_half():
    found = crowd(1, 2)
    assert (found.growth("service"), found.growth("ranks")) == (2e6, 0.0)


def test_errors_are_told():
    found = crowd(1, 2)
    found.shares[1].error = "it broke"
    assert found.errors == ["it broke"]
    assert ["clients, errors", "2, 1"] in crowd_lines(found)


def test_a_run_is_drawn_and_written(tmp_path):
    overhead = Overhead(512)
    overhead.note(2100.0, after(FIRST), after(FIRST, SECOND))
    draw(overhead, crowd(1, 2), tmp_path / "all.png")
    draw(None, crowd(1, 2), tmp_path / "crowd.svg")
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "crowd.svg").read_text()
    written = json.loads(json.dumps(to_json(overhead, crowd(1, 2), {"tokens": 512})))
    assert written["overhead"]["median_ms"] == pytest.approx(1100.0)
    assert written["crowd"]["jain"] == pytest.approx(0.9)

"""Metrics of several parts are one exposition that Prometheus can read."""

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from megatrain.service.observe.series import CommitSeries, PassSeries, RequestSeries, merged
from megatrain.service.observe.timing import Timing


class Parts(Collector):
    def __init__(self, *parts) -> None:
        self._parts = parts

    def collect(self):
        return merged(each.collect() for each in self._parts)


def samples(*parts) -> dict[tuple[str, ...], float]:
    registry = CollectorRegistry()
    registry.register(Parts(*parts))
    text = generate_latest(registry).decode()
    assert len(set(text.splitlines())) == len(text.splitlines()), "a name stands there twice"
    return {
        (sample.name.removeprefix("megatrain_service_"), *sorted(sample.labels.values())): (
            sample.value
        )
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def test_models_share_the_names_of_their_metrics():
    first, second = PassSeries("a"), PassSeries("b")
    for series, tokens in ((first, 10), (second, 20), (second, 30)):
        series.passed("forward", runs=2, data=3, tokens=tokens, seconds=0.2, ranks_s=0.1)
    second.stepped()
    found = samples(first, second)
    assert found["pass_tokens_total", "a", "forward"] == 10
    assert found["pass_tokens_total", "b", "forward"] == 50
    assert found["pass_rank_seconds_count", "b", "forward"] == 2
    assert found["optimizer_steps_total", "b"] == 1


def test_requests_and_commits_are_counted():
    requests, commits = RequestSeries(), CommitSeries()
    timing = Timing(accepted=1.0, committed=1.5, began=2.0, replied=3.0, ended=3.5)
    requests.ended("optim_step", "done", timing)
    requests.ended("optim_step", "failed", timing)
    commits.committed(3, 0.01)
    found = samples(requests, commits)
    assert found["requests_total", "failed", "optim_step"] == 1
    assert found["request_seconds_sum", "optim_step"] == 5.0
    assert found["request_phase_seconds_sum", "optim_step", "queue"] == 1.0
    assert found["commit_writes_sum",] == 3

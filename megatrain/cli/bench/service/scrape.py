"""What a running service says of itself at /metrics, as numbers."""

from dataclasses import dataclass

import httpx
from prometheus_client.parser import text_string_to_metric_families

PREFIX = "megatrain_service_"


@dataclass(frozen=True, slots=True)
class Scrape:
    """One look at a service."""

    samples: dict[tuple[str, frozenset[tuple[str, str]]], float]

    def total(self, name: str, **labels: str) -> float:
        """Return the sum of a metric over all series that have these labels."""
        wanted = labels.items()
        return sum(
            value
            for (found, pairs), value in self.samples.items()
            if found == PREFIX + name and wanted <= dict(pairs).items()
        )

    def labels(self, name: str, label: str) -> list[str]:
        """Return the values that a label of a metric has, in their order."""
        found = [dict(pairs) for (known, pairs) in self.samples if known == PREFIX + name]
        return list(dict.fromkeys(each[label] for each in found if label in each))


def scrape(client: httpx.Client) -> Scrape:
    """Return what a service says now.  Raises httpx.HTTPError."""
    answer = client.get("/metrics")
    answer.raise_for_status()
    return Scrape(
        {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(answer.text)
            for sample in family.samples
        }
    )

"""What requests have used, once they have a result."""

from megatrain.sampler.types import SampleRequest
from megatrain.service.auth.authenticate import Authenticator
from megatrain.service.work.ticket import Ticket


class Ledger:
    """Counts tokens of requests that are over."""

    def __init__(self, auth: Authenticator) -> None:
        self._auth = auth

    def settle(self, ticket: Ticket, *, failed: bool) -> None:
        """Count what a request has used, while its content is there; nothing if it has failed."""
        charge, ticket.charge = ticket.charge, None
        if charge is not None:
            self._auth.settle(charge, 0 if failed else ticket.tokens)
        if failed or not ticket.tokens:
            return
        kinds = {"training": ticket.tokens}
        if isinstance(ticket.content, SampleRequest):
            prompt = len(ticket.content.prompt)
            kinds = sampled(prompt, ticket.tokens - prompt)
        self._auth.use(ticket.project, ticket.session, ticket.base_model, kinds)


def sampled(prompt: int, drawn: int) -> dict[str, int]:
    """Return the tokens of a sample by kind."""
    return {"sampling_prefill": prompt, "sampling_sample": drawn}

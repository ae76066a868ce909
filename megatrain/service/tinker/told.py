"""What routes tell, for the document: replies are made by hand, and are not checked once more."""

from typing import Any

from megatrain.service.wire.schema import (
    CreateModelReply,
    FailedReply,
    LoadWeightsReply,
    MetadataReply,
    OptimStepReply,
    SaveWeightsExternalReply,
    SaveWeightsForSamplerReply,
    SaveWeightsReply,
    TryAgainReply,
    UnloadModelReply,
)

PROTOBUF = "application/x-protobuf"
RESULTS = (
    CreateModelReply
    | OptimStepReply
    | SaveWeightsReply
    | SaveWeightsForSamplerReply
    | SaveWeightsExternalReply
    | LoadWeightsReply
    | UnloadModelReply
    | MetadataReply
    | FailedReply
)
"""What a request's future may give as JSON; passes and samples are protobuf."""


def told(reply: Any) -> dict[str, Any]:
    """Return a route's options: its reply is of this schema."""
    return {"response_model": None, "responses": {200: {"model": reply}}}


def told_later() -> dict[str, Any]:
    """Return the options of the route that gives results."""
    protobuf = {PROTOBUF: {"schema": {"type": "string", "format": "binary"}}}
    later = {200: {"model": RESULTS, "content": protobuf}, 408: {"model": TryAgainReply}}
    return {"response_model": None, "responses": later}

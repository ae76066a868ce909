"""Routes of the API server: an unload that reaches the workers, and a word that we are there."""

from argparse import Namespace
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.lora.protocol import UnloadLoRAAdapterRequest

router = APIRouter()


class Endpoints:
    """An EndpointPlugin."""

    name = "megatrain"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add our routes; one replaces vLLM's own."""
        app.include_router(router)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Do nothing: the routes use vLLM's own state."""


@router.get("/v1/megatrain")
async def here() -> dict[str, int]:
    """Tell the plug-in's version."""
    return {"plugin": 1}


@router.post("/v1/unload_lora_adapter")
async def unload(request: UnloadLoRAAdapterRequest, raw_request: Request) -> Response:
    """Forget an adapter's name, and let the workers forget its weights.

    vLLM's own route does the first alone: a slot of the device keeps weights that nobody can ask
    for, and what is evicted instead may be in use.
    """
    models: OpenAIServingModels = raw_request.app.state.openai_serving_models
    known = models.lora_requests.get(request.lora_name)
    answer = await models.unload_lora_adapter(request)
    if isinstance(answer, ErrorResponse):
        return JSONResponse(answer.model_dump(), status_code=answer.error.code)
    if known is not None:
        await models.engine_client.remove_lora(known.lora_int_id)
    return Response(answer)

"""Requests and replies of Tinker's API, as pydantic models by group of endpoints."""

from megatrain.service.wire.schema.admin import AuditEntry as AuditEntry
from megatrain.service.wire.schema.admin import AuditReply as AuditReply
from megatrain.service.wire.schema.admin import StorageItem as StorageItem
from megatrain.service.wire.schema.admin import StorageReply as StorageReply
from megatrain.service.wire.schema.admin import UsageEvent as UsageEvent
from megatrain.service.wire.schema.admin import UsageOfKind as UsageOfKind
from megatrain.service.wire.schema.admin import UsageReply as UsageReply
from megatrain.service.wire.schema.admin import UsageSession as UsageSession
from megatrain.service.wire.schema.base import Empty as Empty
from megatrain.service.wire.schema.checkpoints import Checkpoint as Checkpoint
from megatrain.service.wire.schema.checkpoints import CheckpointsReply as CheckpointsReply
from megatrain.service.wire.schema.checkpoints import Cursor as Cursor
from megatrain.service.wire.schema.checkpoints import (
    ExternalWeightsUrlsReply as ExternalWeightsUrlsReply,
)
from megatrain.service.wire.schema.checkpoints import SetTtlRequest as SetTtlRequest
from megatrain.service.wire.schema.checkpoints import TrainingRun as TrainingRun
from megatrain.service.wire.schema.checkpoints import TrainingRunsReply as TrainingRunsReply
from megatrain.service.wire.schema.client import CapabilitiesReply as CapabilitiesReply
from megatrain.service.wire.schema.client import ClientConfigReply as ClientConfigReply
from megatrain.service.wire.schema.client import ClientConfigRequest as ClientConfigRequest
from megatrain.service.wire.schema.client import (
    ClientDynamicConfigReply as ClientDynamicConfigReply,
)
from megatrain.service.wire.schema.client import HealthReply as HealthReply
from megatrain.service.wire.schema.client import KeyDetails as KeyDetails
from megatrain.service.wire.schema.client import KeyReply as KeyReply
from megatrain.service.wire.schema.client import OrgDetails as OrgDetails
from megatrain.service.wire.schema.client import SupportedModel as SupportedModel
from megatrain.service.wire.schema.client import TelemetryReply as TelemetryReply
from megatrain.service.wire.schema.client import TelemetryRequest as TelemetryRequest
from megatrain.service.wire.schema.client import UserDetails as UserDetails
from megatrain.service.wire.schema.futures import CancelFutureRequest as CancelFutureRequest
from megatrain.service.wire.schema.futures import Completion as Completion
from megatrain.service.wire.schema.futures import FailedReply as FailedReply
from megatrain.service.wire.schema.futures import FutureReply as FutureReply
from megatrain.service.wire.schema.futures import FutureRetrieveRequest as FutureRetrieveRequest
from megatrain.service.wire.schema.futures import FuturesRetrieveReply as FuturesRetrieveReply
from megatrain.service.wire.schema.futures import FuturesRetrieveRequest as FuturesRetrieveRequest
from megatrain.service.wire.schema.futures import FuturesTarget as FuturesTarget
from megatrain.service.wire.schema.futures import MetadataReply as MetadataReply
from megatrain.service.wire.schema.futures import TryAgainReply as TryAgainReply
from megatrain.service.wire.schema.optimizers import AdamParams as AdamParams
from megatrain.service.wire.schema.optimizers import OptimizerConfig as OptimizerConfig
from megatrain.service.wire.schema.optimizers import OptimizerParams as OptimizerParams
from megatrain.service.wire.schema.sampling import Chunk as Chunk
from megatrain.service.wire.schema.sampling import (
    CreateSamplingSessionReply as CreateSamplingSessionReply,
)
from megatrain.service.wire.schema.sampling import (
    CreateSamplingSessionRequest as CreateSamplingSessionRequest,
)
from megatrain.service.wire.schema.sampling import (
    JoinSamplingSessionReply as JoinSamplingSessionReply,
)
from megatrain.service.wire.schema.sampling import (
    JoinSamplingSessionRequest as JoinSamplingSessionRequest,
)
from megatrain.service.wire.schema.sampling import ModelInput as ModelInput
from megatrain.service.wire.schema.sampling import SampleBody as SampleBody
from megatrain.service.wire.schema.sampling import SamplerReply as SamplerReply
from megatrain.service.wire.schema.sampling import SamplingParams as SamplingParams
from megatrain.service.wire.schema.sampling import TargetTokens as TargetTokens
from megatrain.service.wire.schema.search import ActiveStatus as ActiveStatus
from megatrain.service.wire.schema.search import CancelledStatus as CancelledStatus
from megatrain.service.wire.schema.search import FinishedStatus as FinishedStatus
from megatrain.service.wire.schema.search import NextCursor as NextCursor
from megatrain.service.wire.schema.search import ReasonReply as ReasonReply
from megatrain.service.wire.schema.search import SearchCursor as SearchCursor
from megatrain.service.wire.schema.search import SearchOwner as SearchOwner
from megatrain.service.wire.schema.search import SessionSearchReply as SessionSearchReply
from megatrain.service.wire.schema.search import SessionSearchRequest as SessionSearchRequest
from megatrain.service.wire.schema.search import SessionSummary as SessionSummary
from megatrain.service.wire.schema.search import StatusQuery as StatusQuery
from megatrain.service.wire.schema.sessions import CreateSessionReply as CreateSessionReply
from megatrain.service.wire.schema.sessions import CreateSessionRequest as CreateSessionRequest
from megatrain.service.wire.schema.sessions import FinishReason as FinishReason
from megatrain.service.wire.schema.sessions import FinishSessionRequest as FinishSessionRequest
from megatrain.service.wire.schema.sessions import SessionHeartbeatReply as SessionHeartbeatReply
from megatrain.service.wire.schema.sessions import (
    SessionHeartbeatRequest as SessionHeartbeatRequest,
)
from megatrain.service.wire.schema.sessions import SessionReply as SessionReply
from megatrain.service.wire.schema.sessions import SessionsReply as SessionsReply
from megatrain.service.wire.schema.sessions import SetProjectRequest as SetProjectRequest
from megatrain.service.wire.schema.sessions import TraceExportReply as TraceExportReply
from megatrain.service.wire.schema.training import (
    CreateCustomLossRequest as CreateCustomLossRequest,
)
from megatrain.service.wire.schema.training import CreateModelReply as CreateModelReply
from megatrain.service.wire.schema.training import CreateModelRequest as CreateModelRequest
from megatrain.service.wire.schema.training import GetInfoReply as GetInfoReply
from megatrain.service.wire.schema.training import GetInfoRequest as GetInfoRequest
from megatrain.service.wire.schema.training import LoraConfig as LoraConfig
from megatrain.service.wire.schema.training import ModelData as ModelData
from megatrain.service.wire.schema.training import OptimizerReply as OptimizerReply
from megatrain.service.wire.schema.training import OptimStepReply as OptimStepReply
from megatrain.service.wire.schema.training import OptimStepRequest as OptimStepRequest
from megatrain.service.wire.schema.training import UnloadModelReply as UnloadModelReply
from megatrain.service.wire.schema.training import UnloadModelRequest as UnloadModelRequest
from megatrain.service.wire.schema.training import WeightsInfoReply as WeightsInfoReply
from megatrain.service.wire.schema.weights import CopyWeightsReply as CopyWeightsReply
from megatrain.service.wire.schema.weights import CopyWeightsRequest as CopyWeightsRequest
from megatrain.service.wire.schema.weights import LoadWeightsReply as LoadWeightsReply
from megatrain.service.wire.schema.weights import LoadWeightsRequest as LoadWeightsRequest
from megatrain.service.wire.schema.weights import (
    SaveWeightsExternalReply as SaveWeightsExternalReply,
)
from megatrain.service.wire.schema.weights import (
    SaveWeightsExternalRequest as SaveWeightsExternalRequest,
)
from megatrain.service.wire.schema.weights import (
    SaveWeightsForSamplerReply as SaveWeightsForSamplerReply,
)
from megatrain.service.wire.schema.weights import (
    SaveWeightsForSamplerRequest as SaveWeightsForSamplerRequest,
)
from megatrain.service.wire.schema.weights import SaveWeightsReply as SaveWeightsReply
from megatrain.service.wire.schema.weights import SaveWeightsRequest as SaveWeightsRequest
from megatrain.service.wire.schema.weights import WeightsInfoRequest as WeightsInfoRequest

"""The Serve application: which deployments there are and how they hang together.

Named by ``deploy/serve.yaml`` as ``deploy.app:build_app``; replica counts, autoscaling and resources
of each deployment are set there.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application

from encoders.media import Modality
from services.deployments import (
    AgentReplica,
    DecoderReplica,
    EncoderReplica,
    GatewayReplica,
    LanguageModelReplica,
    ReplicaArgs,
    decoder_name,
    deployment_names,
)
from services.presets import load_preset

QUEUED_BATCHES = 4
"""Batches that a replica with an engine takes on, the one it works at included.

They wait in the engine, where they are counted; a decoder knows their seconds and refuses too many. A
replica that has taken on all that it may answers no question about itself before one of them is done.
"""

QUEUED_MEDIA = 16
"""Media that one replica of the encoder takes on."""

ROOT = Path(__file__).resolve().parent.parent


class AppArgs(BaseModel):
    """Arguments from ``deploy/serve.yaml``. An unknown key is an error, not a silent default."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    preset: str = "toybox"
    store: str = Field(
        default="",
        description="URL of the artefact store; the folder var/files of this checkout by default",
    )
    page_url: str | None = Field(
        default=None, description="where the chat page finds the API; without it there is no page"
    )
    torch_threads: int = Field(default=1, ge=1, description="threads of each model replica")
    language_model_threads: int = Field(
        default=0,
        ge=0,
        description="most threads of the language model, for large passes on idle cores; 0: as many as cores",
    )
    cpus_per_replica: float = Field(default=0.1, ge=0, description="what Ray books for each replica")

    @property
    def store_url(self) -> str:
        """URL of the artefact store."""
        return self.store or (ROOT / "var" / "files").as_uri()


def build_app(args: AppArgs) -> Application:
    """Wire the deployment graph. Called by Serve with the ``args:`` block of the config."""
    preset = load_preset(args.preset)
    replica = ReplicaArgs(
        preset=str(preset.file),
        store=args.store_url,
        torch_threads=args.torch_threads,
        language_model_threads=args.language_model_threads or os.cpu_count() or 1,
    )
    usual: dict[str, Any] = {
        "num_replicas": 1,
        "ray_actor_options": {"num_cpus": args.cpus_per_replica},
        "health_check_period_s": 3,
        "max_constructor_retry_count": 1,
        "graceful_shutdown_wait_loop_s": 0.2,
        "graceful_shutdown_timeout_s": 5,
        "logging_config": {"log_level": "WARNING", "enable_access_log": False},
    }
    # One at a time is encoded; the others are there because what is known already need not wait for it.
    encoding = {**usual, "max_ongoing_requests": QUEUED_MEDIA}
    door: dict[str, Any] = {**usual, "max_ongoing_requests": 256}

    names = deployment_names(preset)
    encoder = serve.deployment(name=names["encoder"], **encoding)(EncoderReplica).bind(replica)
    speaking = {**usual, "max_ongoing_requests": QUEUED_BATCHES * preset.language_model.slots}
    language_model = serve.deployment(name=names["language_model"], **speaking)(LanguageModelReplica).bind(
        replica
    )
    makes: dict[str, list[Modality]] = {}
    for modality in preset.decoders:
        makes.setdefault(decoder_name(modality, preset), []).append(modality)
    decoders: dict[Modality, Application] = {}
    for name, modalities in makes.items():
        at_once = QUEUED_BATCHES * sum(preset.decoders[modality].max_batch for modality in modalities)
        options = {**usual, "max_ongoing_requests": at_once}
        bound = serve.deployment(name=name, **options)(DecoderReplica).bind(replica, modalities)
        decoders |= dict.fromkeys(modalities, bound)
    agent = serve.deployment(name=names["agent"], **door)(AgentReplica).bind(
        replica, encoder, language_model, decoders
    )
    gateway = serve.deployment(name="Gateway", **door)(serve.ingress()(GatewayReplica))
    return gateway.bind(replica, agent, args.page_url)

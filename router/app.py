"""build(config) -> the Ray Serve application: the one file that binds the serving graph.

HTTP -> Ingress (router, knowledge, feedback; one hop)  ->  a PersonaPool per `pools:` entry (base + adapters; one hop)
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from persona_models.deployment import PersonaPool, replica_threads
from persona_models.errors import DeskrouteError, NotReadyError, QueueFullError
from persona_models.protocol import BASE, EngineStatus, GenerateRequest, TokenEvent
from router.config import Config, Pool
from router.desk import Desk
from router.feedback import FeedbackStore
from router.ingress import create_app
from router.loading import load_classifier, load_knowledge

APP_NAME = "deskroute"
# An answer whose replica dies before its first token is asked for again, this often.
RETRIES = 2
# How long running answers may take to finish once the server is told to stop.
DRAIN_S = 5


def build(config: Config | Mapping[str, Any]) -> serve.Application:
    """Bind the graph. Takes a Config, or the mapping that `serve deploy` passes as args."""
    if not isinstance(config, Config):
        config = Config.model_validate(dict(config))
    total = sum(pool.replicas for pool in config.pools)
    pools = {pool.name: _pool(config, pool, total) for pool in config.pools}
    ingress = serve.deployment(
        Ingress,
        name="ingress",
        num_replicas=config.http.replicas,
        max_ongoing_requests=1000,
        ray_actor_options={"num_cpus": 0.1},
        graceful_shutdown_timeout_s=DRAIN_S,
        graceful_shutdown_wait_loop_s=0.5,
    )
    return ingress.bind(config, pools)


def _pool(config: Config, pool: Pool, total_replicas: int) -> serve.Application:
    gpus: float = 0.0 if pool.gpus == "auto" else pool.gpus
    if pool.gpus == "auto":
        # Fewer GPUs than replicas are shared out, so that every replica can be placed.
        seen = ray.cluster_resources().get("GPU", 0) if ray.is_initialized() else 0
        gpus = min(1.0, seen / total_replicas)
    deployment = serve.deployment(
        PersonaPool,
        name=f"pool-{pool.name}",
        num_replicas=pool.replicas,
        # The engine queues and refuses by itself, with its own clear error; status calls need room beside.
        max_ongoing_requests=pool.rows + pool.queue + 16,
        max_queued_requests=pool.replicas * (pool.rows + pool.queue) + 64,
        ray_actor_options={"num_cpus": pool.cpus, "num_gpus": gpus},
        graceful_shutdown_timeout_s=DRAIN_S,
        graceful_shutdown_wait_loop_s=0.5,
    )
    return deployment.bind(
        base=config.base,
        dtype=config.dtype,
        personas=config.personas_of(pool),
        manners={p.id: p.manner for p in config.catalogue()},
        engine=config.generation.engine,
        rows=pool.rows,
        queue=pool.queue,
        threads=replica_threads(pool.threads, total_replicas),
        gpu=gpus > 0,
        merge=pool.merge,
        registry_uri=config.registry_uri,
        cache=config.state / "cache",
    )


class RemotePool:
    """A pool seen from the ingress: an Engine whose answers come from a replica."""

    def __init__(self, name: str, handle: DeploymentHandle) -> None:
        self.name = name
        self._stream = handle.options(method_name="generate", stream=True)
        self._status = handle.options(method_name="status")

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenEvent]:
        """See Engine.generate."""
        for attempt in range(RETRIES + 1):
            began = False
            events = self._stream.remote(request)
            try:
                async for event in events:
                    if isinstance(event, DeskrouteError):
                        raise event
                    began = True
                    yield event
                return
            except BackPressureError:
                raise QueueFullError(f"the pool {self.name} is full; try again in a moment") from None
            except (RayActorError, DeploymentUnavailableError) as e:
                if began or attempt == RETRIES:
                    raise NotReadyError(f"the pool {self.name} went away while answering; try again") from e
                await asyncio.sleep(0.2)
            except (RayError, RayServeException) as e:
                raise NotReadyError(f"the pool {self.name} failed: {str(e).strip().splitlines()[-1]}") from e
            finally:
                events.cancel()

    async def remote_status(self) -> EngineStatus:
        try:
            return await self._status.remote()
        except (RayError, RayServeException) as e:
            raise NotReadyError(
                f"the pool {self.name} does not answer ({type(e).__name__}); it is being restarted, or see the server's log"
            ) from None

    def status(self) -> EngineStatus:
        raise NotReadyError("a remote pool is asked by remote_status")

    async def close(self) -> None:
        """The replica belongs to Serve."""


@serve.ingress()
class Ingress:
    """The front door's replica: loads router and knowledge, then serves the FastAPI app of `router/ingress.py`."""

    def __init__(self, config: Config, pools: Mapping[str, DeploymentHandle]) -> None:
        self._pools = {name: RemotePool(name, handle) for name, handle in pools.items()}
        engines: dict[str, RemotePool] = {}
        for pool in config.pools:
            for persona in config.personas_of(pool):
                engines.setdefault(persona, self._pools[pool.name])
            if not pool.merge:
                engines.setdefault(BASE, self._pools[pool.name])
        store = FeedbackStore(config.feedback_url, remember=config.feedback.remember, keep_text=config.feedback.keep_text != "never")
        self._desk = Desk(config, load_classifier(config), load_knowledge(config), engines, store)

    def __serve_build_asgi_app__(self) -> Any:
        return create_app(self._desk, self._status)

    async def _status(self) -> dict[str, EngineStatus]:
        found = await asyncio.gather(*(p.remote_status() for p in self._pools.values()))
        return dict(zip(self._pools, found, strict=True))

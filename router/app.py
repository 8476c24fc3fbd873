"""build(config) -> the Ray Serve application: the one file that binds the serving graph.

HTTP -> Ingress (router, knowledge, feedback; one hop)  ->  a PersonaPool per `pools:` entry (base + adapters; one hop)
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import replace
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from persona_models.deployment import PersonaPool, replica_threads
from persona_models.errors import DeskrouteError, NotReadyError, QueueFullError
from persona_models.heap import keep_loaded
from persona_models.lineup import Ack, Lineup, Pinned
from persona_models.protocol import BASE, BUILTIN, EngineStatus, GenerateRequest, TokenEvent
from router.config import Config, Pool
from router.desk import Desk
from router.feedback import FeedbackStore
from router.ingress import create_app
from router.live import Live
from router.loading import lineup_in_force, router_in_force

APP_NAME, INGRESS = "deskroute", "ingress"
# How long a reload waits for replicas that are being started; loading an adapter takes far less.
EVERY_REPLICA_S = 60.0
# An answer whose replica dies before its first token is asked for again, this often.
RETRIES = 2
# How long a replica that is to stop waits for its answers; those of a whole server were waited for by then, see server.DRAIN_S.
REPLICA_GRACE_S = 5


def build(config: Config | Mapping[str, Any], *, since_ms: int | None = None) -> serve.Application:
    """Bind the graph. Takes a Config, or the mapping that `serve deploy` passes as args.

    since_ms: when the lineup in the state folder was read that replicas come up on, also those that Serve restarts later; None: they ask the registry,
    until this server has written one down.
    """
    if not isinstance(config, Config):
        config = Config.model_validate(dict(config))
    total = sum(pool.replicas for pool in config.pools)
    since_ms = time.time_ns() // 1_000_000 if since_ms is None else since_ms
    pools = {pool.name: _pool(config, pool, total, since_ms) for pool in config.pools}
    ingress = serve.deployment(
        Ingress,
        name=INGRESS,
        num_replicas=config.http.replicas,
        max_ongoing_requests=1000,
        ray_actor_options={"num_cpus": 0.1},
        graceful_shutdown_timeout_s=REPLICA_GRACE_S,
        graceful_shutdown_wait_loop_s=0.5,
    )
    return ingress.bind(config, pools, since_ms)


def _pool(config: Config, pool: Pool, total_replicas: int, since_ms: int) -> serve.Application:
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
        graceful_shutdown_timeout_s=REPLICA_GRACE_S,
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
        prefix_mb=config.generation.prefix_cache_mb,
        guess=config.generation.lookup,
        registry_uri=config.registry_uri,
        state=config.state,
        since_ms=since_ms,
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


class RayFleet:
    """The Fleet of `router/live.py`: every replica of every deployment, reached by broadcast."""

    def __init__(self, pools: Mapping[str, DeploymentHandle]) -> None:
        self._pools = pools

    async def hold(self, lineup: Lineup) -> list[Ack]:
        """See Fleet.hold."""
        return await self._every_pool("hold", lineup)

    async def settle(self, lineup: Lineup) -> list[Ack]:
        """See Fleet.settle."""
        return await self._every_pool("settle", lineup)

    async def tell(self, lineup: Lineup) -> int:
        """See Fleet.tell."""
        return len(await self._all(INGRESS, serve.get_deployment_handle(INGRESS, APP_NAME), "adopt", lineup))

    async def _every_pool(self, method: str, lineup: Lineup) -> list[Ack]:
        found = await asyncio.gather(*(self._all(f"pool-{name}", handle, method, lineup) for name, handle in self._pools.items()))
        return [ack for acks in found for ack in acks]

    async def _all(self, name: str, handle: DeploymentHandle, method: str, lineup: Lineup) -> list[Any]:
        """One reply of every replica of a deployment; waits for those that are being started or replaced."""
        deadline = time.monotonic() + EVERY_REPLICA_S
        fault = "it is not running"
        while time.monotonic() < deadline:
            wanted, running = await asyncio.to_thread(_replicas, name)
            if wanted and running == wanted:
                try:
                    replies = await handle.broadcast(method, lineup).results_async(timeout_s=EVERY_REPLICA_S, return_exceptions=True)
                except (RayError, RayServeException, TimeoutError) as e:
                    fault = f"{type(e).__name__}: {e}"
                else:
                    failed = [r for r in replies if isinstance(r, BaseException)]
                    # A replica may have died unnoticed, or come up only now: then its replacement is asked with the others.
                    if not failed and len(replies) == wanted:
                        return replies
                    fault = str(failed[0]).strip().splitlines()[-1] if failed else f"{len(replies)} of its {wanted} replicas answered"
            else:
                fault = f"{running} of its {wanted} replicas are running"
            await asyncio.sleep(0.3)
        raise NotReadyError(f"{name} could not be told of new versions: {fault}")


def _replicas(name: str) -> tuple[int, int]:
    """(replicas that a deployment has or should have, those that run)."""
    status = serve.status().applications.get(APP_NAME)
    found = status.deployments.get(name) if status else None
    states = dict(found.replica_states) if found else {}
    live = {str(getattr(k, "value", k)): n for k, n in states.items() if str(getattr(k, "value", k)) != "STOPPING"}
    return sum(live.values()), live.get("RUNNING", 0)


@serve.ingress()
class Ingress:
    """The front door's replica: loads router and knowledge, then serves the FastAPI app of `router/ingress.py`."""

    def __init__(self, config: Config, pools: Mapping[str, DeploymentHandle], since_ms: int) -> None:
        self._pools = {name: RemotePool(name, handle) for name, handle in pools.items()}
        engines: dict[str, RemotePool] = {}
        for pool in config.pools:
            for persona in config.personas_of(pool):
                engines.setdefault(persona, self._pools[pool.name])
            if not pool.merge:
                engines.setdefault(BASE, self._pools[pool.name])
        store = FeedbackStore(config.feedback_url, remember=config.feedback.remember, keep_text=config.feedback.keep_text != "never")
        lineup = lineup_in_force(config, since_ms=since_ms)
        classifier, knowledge = router_in_force(config, lineup)
        if config.router.artefact == BUILTIN and classifier.version == BUILTIN:
            lineup = replace(lineup, router=Pinned())
        self._desk = Desk(config, classifier, knowledge, engines, store)
        self._live = Live(config, self._desk, RayFleet(pools), lineup)
        keep_loaded()

    def __serve_build_asgi_app__(self) -> Any:
        return create_app(self._desk, self._status, self._live)

    async def adopt(self, lineup: Lineup) -> None:
        """See Live.adopt; one front door takes up a reload and tells the others."""
        await self._live.adopt(lineup)

    async def _status(self) -> dict[str, EngineStatus]:
        found = await asyncio.gather(*(p.remote_status() for p in self._pools.values()))
        return dict(zip(self._pools, found, strict=True))

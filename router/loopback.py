"""Keeps Ray Serve on the loopback interface, and its request id out of answers that have one.

Ray binds by itself what RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 tells it to (set in server.py). Two things stay open on every interface: each replica's
inner gRPC port, and HAProxy's statistics and metrics ports; Serve 2.60 has no setting for them. This hook runs in every Ray worker before user code
and changes these binds. Serve also writes an `x-request-id` of its own behind the application's. `tests/serving` looks at sockets and headers, so a Ray
release that moves them is noticed.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

HOOK = "router.loopback.bind_loopback"


def bind_loopback() -> None:
    """Install the hook; modules are changed when they are first imported, so a worker that needs neither imports neither."""
    sys.meta_path.insert(0, _Finder())


def _haproxy_templates(module: ModuleType) -> None:
    template = module.HAPROXY_CONFIG_TEMPLATE
    template = template.replace("bind *:{{ config.stats_port }}", "bind 127.0.0.1:{{ config.stats_port }}")
    module.HAPROXY_CONFIG_TEMPLATE = template.replace("bind :{{ config.metrics_port }}", "bind 127.0.0.1:{{ config.metrics_port }}")  # type: ignore[attr-defined]


def _tls_utils(module: ModuleType) -> None:
    add_port = module.add_port_to_grpc_server

    def add_loopback_port(server: Any, address: str) -> Any:
        return add_port(server, address.replace("[::]:", "127.0.0.1:").replace("0.0.0.0:", "127.0.0.1:"))

    module.add_port_to_grpc_server = add_loopback_port  # type: ignore[attr-defined]


def _http_util(module: ModuleType) -> None:
    middleware = module.RequestIdMiddleware
    answer = middleware.__call__

    async def with_one_id(self: Any, scope: Any, receive: Any, send: Any) -> None:
        async def send_one_id(message: Any) -> None:
            if message["type"] == "http.response.start":
                ids = [h for h in message["headers"] if h[0].lower() == b"x-request-id"]
                message["headers"] = [h for h in message["headers"] if h not in ids] + ids[:1]
            await send(message)

        await answer(self, scope, receive, send_one_id)

    middleware.__call__ = with_one_id


_CHANGES = {
    "ray.serve._private.haproxy_templates": _haproxy_templates,
    "ray._common.tls_utils": _tls_utils,
    "ray.serve._private.http_util": _http_util,
}


class _Finder(MetaPathFinder):
    """Wraps the loaders of the modules in _CHANGES; every other import passes by."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in _CHANGES:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            spec.loader = _ChangingLoader(spec.loader, name)
        return spec


class _ChangingLoader(Loader):
    def __init__(self, inner: Loader, name: str) -> None:
        self.inner, self.name = inner, name

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.inner.exec_module(module)
        _CHANGES[self.name](module)

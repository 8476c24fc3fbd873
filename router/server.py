"""Runs the application on this machine: checks, Ray, Serve, the ready line, a clean end. The serving graph itself is in app.py."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import math
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from persona_models.errors import ConfigError, NotReadyError, WorkError
from router import whereabouts
from router.config import Config
from router.feedback import FeedbackStore
from router.loading import router_in_force, settle_lineup
from router.loopback import HOOK

READY_TIMEOUT_S = 180
# How long answers in flight may take to end once the server is told to stop.
DRAIN_S = 20


def check(config: Config) -> None:
    """Everything that can be wrong before Ray is started, which would bury it in a replica's log. Raises ConfigError, ArticleError."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.http.host, config.http.port))
        except socket.gaierror:
            raise ConfigError(f"http.host: {config.http.host!r} is not an address of this machine") from None
        except OSError as e:
            raise ConfigError(f"http.port: {config.http.host}:{config.http.port} cannot be used ({e.strerror}); choose another with --port") from None
    router_in_force(config)
    FeedbackStore(config.feedback_url).close()
    if config.generation.engine == "model":
        from persona_models.base_model import check_base, gpu_count

        check_base(config.base, config.dtype)
        wanted = sum(pool.replicas * pool.gpus for pool in config.pools if pool.gpus != "auto")
        if wanted > gpu_count():
            raise ConfigError(f"pools: {wanted:g} GPUs are asked for and this machine has {gpu_count()}; use gpus: auto, or 0")


@contextlib.contextmanager
def running(config: Config) -> Iterator[dict[str, Any]]:
    """Start Ray and the application, yield the pools' status once all are ready, and stop both, once answers in flight have ended.

    Raises NotReadyError, with what the pools say, if they are not ready in time.
    """
    lineup = settle_lineup(config)
    scratch = Path(tempfile.mkdtemp(prefix="deskroute-"))
    _environment(scratch)
    import ray
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.config import HTTPOptions

    from router.app import APP_NAME, build

    # Serve's own lines would bury the ready line.
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        with _own_signals():
            ray.init(
                address="local",
                include_dashboard=False,
                _temp_dir=str(scratch),
                num_cpus=_logical_cpus(config),
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=True,
                runtime_env={"worker_process_setup_hook": HOOK, "env_vars": {"PYTHONPATH": _python_path()}},
            )
        try:
            serve.start(
                http_options=HTTPOptions(host=config.http.host, port=config.http.port),
                logging_config={"log_level": "WARNING", "enable_access_log": False},
            )
            serve.run(build(config, since_ms=lineup.read_ms), name=APP_NAME, route_prefix="/")
        except (RuntimeError, RayError) as e:
            raise WorkError(f"the application did not start: {_cause(str(e))}") from None
        yield _wait_until_ready(config)
        with contextlib.suppress(KeyboardInterrupt):
            _drain(scratch)
    finally:
        # Whatever state start-up had reached, nothing may stay behind. Ray reports its own actors' end as failures; nobody needs to read that.
        with _undisturbed(), open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
            with contextlib.suppress(Exception):
                serve.shutdown()
            with contextlib.suppress(Exception):
                ray.shutdown()
            shutil.rmtree(scratch, ignore_errors=True)


def serve_forever(config: Config) -> None:
    """`deskroute serve`: until Ctrl-C or SIGTERM."""
    check(config)
    stop, up = threading.Event(), threading.Event()

    def asked(*_: object) -> None:
        again = stop.is_set()
        stop.set()
        if again or not up.is_set():
            # Nobody waits for `stop` any more, or yet: break off start-up, or waiting for answers.
            raise KeyboardInterrupt

    previous = {s: signal.signal(s, asked) for s in (signal.SIGINT, signal.SIGTERM)}
    began = time.monotonic()
    print(f"deskroute: starting on {config.http.host}:{config.http.port} ...", file=sys.stderr, flush=True)
    try:
        with running(config) as pools:
            up.set()
            versions = {p: v for pool in pools.values() for p, v in pool["versions"].items()}
            for name, pool in pools.items():
                for note in pool["notes"]:
                    print(f"deskroute: note from pool {name}: {note}", file=sys.stderr)
            shown = ", ".join(f"{p}={v}" for p, v in versions.items())
            devices = ", ".join(sorted({p["device"] for p in pools.values()}))
            url = f"http://{config.http.host}:{config.http.port}"
            whereabouts.announce(config.state, url)
            print(f"deskroute: ready in {time.monotonic() - began:.0f} s at {url}/v1 (base {config.base} on {devices}; {shown})", flush=True)
            while not stop.wait(0.5):
                pass
            # Promotions and the like need not look for this server any more.
            whereabouts.withdraw(config.state)
            print(f"deskroute: stopping; answers in flight have {DRAIN_S} s to end, Ctrl-C again stops at once ...", file=sys.stderr, flush=True)
    finally:
        whereabouts.withdraw(config.state)
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Ray's core installs a handler that ends the process on SIGTERM, with a trace and its files left behind; ours come back afterwards."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """What is done here is not broken off by Ctrl-C or SIGTERM."""
    with _own_signals():
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
        yield


def _drain(scratch: Path) -> None:
    """Take no more requests, and wait until those in flight have ended, at most DRAIN_S; HAProxy knows of all of them."""
    deadline = time.monotonic() + DRAIN_S
    with contextlib.suppress(OSError):
        for address in scratch.glob("*/admin.sock"):
            _tell_haproxy(address, "disable frontend http_frontend")
            # Connections that are open already could bring more.
            for backend, server in _servers(_tell_haproxy(address, "show stat")):
                _tell_haproxy(address, f"set server {backend}/{server} state drain")
            while time.monotonic() < deadline and _in_flight(_tell_haproxy(address, "show stat")):
                time.sleep(0.1)


def _tell_haproxy(address: Path, command: str) -> str:
    with socket.socket(socket.AF_UNIX) as admin:
        admin.settimeout(5)
        admin.connect(str(address))
        admin.sendall(f"{command}\n".encode())
        return b"".join(iter(lambda: admin.recv(65536), b"")).decode()


def _table(stats: str) -> list[dict[str, str]]:
    return [r for r in csv.DictReader(io.StringIO(stats.removeprefix("# "))) if r["pxname"] != "stats"]


def _servers(stats: str) -> list[tuple[str, str]]:
    """(backend, server) of what answers requests, by HAProxy's table of statistics."""
    return [(r["pxname"], r["svname"]) for r in _table(stats) if r["svname"] not in ("FRONTEND", "BACKEND")]


def _in_flight(stats: str) -> int:
    """Requests that are being answered or wait for it."""
    return sum(int(r["scur"] or 0) + int(r["qcur"] or 0) for r in _table(stats) if r["svname"] == "BACKEND")


def _logical_cpus(config: Config) -> int:
    """CPUs that Ray may hand out: the machine's, or as many as the pools reserve, so that a small machine can still run several replicas."""
    reserved = sum(pool.replicas * pool.cpus for pool in config.pools) + 0.1 * config.http.replicas
    return max(os.cpu_count() or 1, math.ceil(reserved) + 1)


def _environment(scratch: Path) -> None:
    """Settings that Ray reads once, at import or start; measured effects are in docs/LOG.md."""
    settings = {
        # Two hops went from 44 to 365 requests/s and a streamed token from 1.7 to 0.23 ms with these two.
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        # Without these shutdown waits 30 s.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "1",
        # On Linux "no cluster" means: bind the loopback interface.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # HAProxy's files and side ports are fixed by default, and two servers on one machine would share them.
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(scratch / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(scratch / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(scratch),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(scratch / "server-state"),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(_free_port()),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(_free_port()),
        # Where HAProxy sends requests while the front door is not up: at the fixed port another server's proxy listens as well, past this one's keys.
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(_free_port()),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(_free_port()),
        "TOKENIZERS_PARALLELISM": "false",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def _python_path() -> str:
    """The replicas import the same packages as this process, also from a checkout that is not installed."""
    return os.pathsep.join(dict.fromkeys([str(Path(__file__).parent.parent), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]))


def _cause(message: str) -> str:
    """The last line of a replica's traceback that says something."""
    lines = [line.strip() for line in message.splitlines() if line.strip() and not line.startswith((" ", "Traceback"))]
    return lines[-1] if lines else message


def _free_port() -> int:
    """A free port below those that the system gives to outgoing connections, of which Ray opens many before HAProxy binds this one."""
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port
    raise WorkError("no free port from 20000 to 32000 on 127.0.0.1; stop something that listens there")


def _wait_until_ready(config: Config) -> dict[str, Any]:
    """Ask the endpoint itself until every pool is ready; returns /readyz's pools."""
    url = f"http://{config.http.host}:{config.http.port}/readyz"
    deadline = time.monotonic() + READY_TIMEOUT_S
    fault = "no answer"
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return dict(json.load(answer)["pools"])
        except urllib.error.HTTPError as e:
            fault = e.read().decode(errors="replace")[:500]
        except OSError as e:
            fault = str(e)
        time.sleep(0.3)
    raise NotReadyError(f"the pools were not ready after {READY_TIMEOUT_S} s: {fault}")

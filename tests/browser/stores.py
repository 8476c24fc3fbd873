"""A Postgres and a real `mlflow server`, started by a test on loopback and stopped by process id."""

from __future__ import annotations

import contextlib
import os
import pwd
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from serving.running import ROOT, free_port

PASSWORD = "correct horse battery"


def _postgres_programs() -> Path | None:
    """Debian keeps them off the PATH, by version."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: int(p.parts[-3]))
    return found[-1].parent if found else None


@contextlib.contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """An empty database of a server of its own; its SQLAlchemy URL."""
    programs = _postgres_programs()
    if programs is None:
        pytest.skip("no Postgres under /usr/lib/postgresql (Debian: apt install postgresql)")
    as_user: dict = {}
    folder.mkdir()
    if os.getuid() == 0:
        # Postgres refuses to run as root.
        try:
            user = pwd.getpwnam("postgres")
        except KeyError:
            pytest.skip("Postgres does not run as root, and this machine has no user postgres")
        as_user = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        os.chown(folder, user.pw_uid, user.pw_gid)
        for parent in folder.parents:
            # Others must be able to walk there; pytest's own folders are closed to them.
            if parent.stat().st_uid == 0 and parent != Path("/"):
                parent.chmod(parent.stat().st_mode | 0o011)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": folder, **as_user}
    subprocess.run([programs / "initdb", "-D", folder / "data", "-U", "mlflow", "-A", "trust", "-N"], check=True, **quiet)
    port = free_port()
    command = [programs / "postgres", "-D", folder / "data", "-p", str(port), "-k", folder, "-h", "127.0.0.1", "-F"]
    process = subprocess.Popen(command, **quiet)
    try:
        for _ in range(100):
            made = subprocess.run([programs / "createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "mlflow", "mlflow"], **quiet)
            if made.returncode == 0:
                break
            time.sleep(0.2)
        yield f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/mlflow"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)


@contextlib.contextmanager
def team_server(folder: Path, store: str, *, accounts: bool) -> Iterator[str]:
    """The server of mlflow/compose.yaml on another store, with local artefacts; without accounts it is `deskroute ui`'s. Its URL."""
    service = yaml.safe_load((ROOT / "mlflow" / "compose.yaml").read_text())["services"]["mlflow"]
    port = free_port()
    ours = {
        "--host": "127.0.0.1",
        "--port": str(port),
        "--workers": "1",
        "--backend-store-uri": store,
        "--artifacts-destination": str(folder / "artefacts"),
    }
    options = [part.partition("=")[::2] for part in service["command"][2:]]
    chosen = [f"{name}={ours.get(name, value)}" for name, value in options if accounts or name != "--app-name"]
    env = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    env |= {k: v for k, v in service["environment"].items() if k.startswith("MLFLOW_") and not v.startswith("$") and "S3" not in k}
    settings = (ROOT / "mlflow" / "basic_auth.ini").read_text().replace("/var/lib/mlflow", str(folder))
    (folder / "basic_auth.ini").write_text(settings)
    env |= {"MLFLOW_AUTH_CONFIG_PATH": str(folder / "basic_auth.ini")}
    env |= {"MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD, "MLFLOW_FLASK_SERVER_SECRET_KEY": "a key of this test"}
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *chosen], cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            assert process.poll() is None, (folder / "server.log").read_text()
            time.sleep(0.2)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)

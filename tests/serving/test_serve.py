"""The whole product as its users start it: `deskroute serve` in a process of its own, real Ray Serve, real clients over HTTP.

One server for the file, on the built-in models; a second one for start-up faults. Ports are free ones; only processes started here are stopped.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from serving.running import ROOT, Server, descendants, listening

pytestmark = [pytest.mark.serving, pytest.mark.timeout(400)]
PERSONAS = ("leadership", "knowledge_worker", "field", "admin", "new_hire")
ASK = "My VPN keeps dropping at the customer's site, no Wi-Fi here"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("serve"))
    try:
        server.wait()
        yield server
    finally:
        if server.process.poll() is None:
            server.stop()


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def test_the_ready_line_names_url_personas_and_versions(server):
    line = next(x for x in server.log.read_text().splitlines() if "ready in" in x)
    assert f"http://127.0.0.1:{server.port}/v1" in line
    assert all(f"{p}=builtin" in line for p in PERSONAS)


def test_auto_answers_as_field_from_the_vpn_article_piece_by_piece(client):
    stream = client.chat.completions.create(model="auto", messages=[{"role": "user", "content": ASK}], stream=True)
    chunks = list(stream)
    block = chunks[0].model_extra["deskroute"]
    assert (block["decision"], block["persona"], block["versions"]) == ("persona", "field", {"field": "builtin"})
    assert block["sources"][0]["id"] == "vpn"
    text = "".join(c.choices[0].delta.content or "" for c in chunks)
    assert len(chunks) > 8
    assert re.search("hotspot|mobile data", text.lower())
    assert chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize("persona", PERSONAS)
def test_every_persona_answers_and_ends_by_itself(client, persona):
    answer = client.chat.completions.create(model=persona, messages=[{"role": "user", "content": "I forgot my password and cannot sign in"}])
    assert answer.choices[0].finish_reason == "stop"
    assert len(answer.choices[0].message.content) > 80
    assert answer.model_extra["deskroute"]["versions"] == {persona: "builtin"}


def test_the_readmes_program_runs_as_it_stands(server, capsys):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    program = re.search(r"(?s)```python\n(.*?)```", readme)[1].replace("127.0.0.1:8000", f"127.0.0.1:{server.port}")
    names: dict = {}
    try:
        exec(program, names)
    finally:
        names["client"].close()
    printed = capsys.readouterr().out
    shown = re.search(r"(?s)<!-- begin:answer -->\n```text\n(.*?)```", readme)[1]
    assert printed.splitlines()[-1].startswith("field [{'id': 'vpn'")
    assert printed == shown


def test_the_base_answers_and_an_unknown_model_is_a_404(client):
    base = client.chat.completions.create(model="base", messages=[{"role": "user", "content": "the printer is stuck"}], max_tokens=30)
    assert base.choices[0].message.content
    with pytest.raises(openai.NotFoundError) as fault:
        client.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": "hi"}])
    assert fault.value.body["code"] == "model_not_found"


def test_requests_at_once_get_the_answers_they_get_alone(client):
    """Answers must not depend on who else is in the batch, nor be given to somebody else."""
    jobs = [(p, f"{q} (case {i})") for i, (p, q) in enumerate(zip(PERSONAS * 2, ["vpn drops", "mailbox is full", "locked out"] * 4, strict=False))]

    def ask(job):
        persona, text = job
        return client.chat.completions.create(model=persona, messages=[{"role": "user", "content": text}], max_tokens=40).choices[0].message.content

    alone = [ask(job) for job in jobs]
    with ThreadPoolExecutor(len(jobs)) as pool:
        together = list(pool.map(ask, jobs))
    assert together == alone


def test_a_conversations_next_turn_is_not_read_from_the_beginning(client):
    messages = [{"role": "user", "content": "the VPN drops whenever I am on a customer's site, told once"}]
    first = client.chat.completions.create(model="field", messages=messages)
    messages += [{"role": "assistant", "content": first.choices[0].message.content}, {"role": "user", "content": "where do I find that?"}]
    second = client.chat.completions.create(model="field", messages=messages)
    sources = [answer.model_extra["deskroute"]["sources"][0]["id"] for answer in (first, second)]
    assert sources == ["vpn", "vpn"]
    known = second.usage.prompt_tokens_details.cached_tokens
    assert first.usage.prompt_tokens - 16 <= known < second.usage.prompt_tokens
    again = client.chat.completions.create(model="field", messages=messages)
    assert again.choices[0].message.content == second.choices[0].message.content


def test_a_client_that_leaves_frees_its_row(server, client):
    """The answer is sampled hot, so that it would go on for hundreds of tokens after the client has left."""
    long = {"temperature": 2.0, "seed": 1, "max_tokens": 500}
    with client.chat.completions.create(model="admin", messages=[{"role": "user", "content": "vpn drops"}], stream=True, **long) as stream:
        next(iter(stream))
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        page = httpx.get(f"http://127.0.0.1:{server.port}/metrics").text
        if "deskroute_active_requests 0.0" in page:
            return
        time.sleep(0.05)
    raise AssertionError("the row is still busy")


def test_bad_input_over_the_wire(server):
    url = f"http://127.0.0.1:{server.port}/v1/chat/completions"
    assert httpx.post(url, content=b"{").json()["error"]["message"].startswith("the body is not valid JSON")
    assert httpx.post(url, content=b"x" * 1_100_000).status_code == 413
    # Of which the built-in models read the beginning.
    long = httpx.post(url, json={"messages": [{"role": "user", "content": "the printer jams. " * 2000}]}, timeout=60)
    assert long.json()["choices"][0]["finish_reason"] == "stop"


def test_feedback_reaches_the_store(server, client):
    answer = client.chat.completions.create(model="auto", messages=[{"role": "user", "content": ASK}], max_tokens=5)
    body = {"request_id": answer.model_extra["deskroute"]["request_id"], "rating": "up"}
    assert httpx.post(f"http://127.0.0.1:{server.port}/v1/feedback", json=body).json()["text_stored"] is True


def test_everything_listens_on_loopback_only(server):
    """Ray binds every interface by default; router/loopback.py changes that."""
    loopback = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
    sockets = listening({server.process.pid, *descendants(server.process.pid)})
    assert sockets
    assert {address for address, _ in sockets} <= loopback
    # Ray's fixed ports for what comes while the front door is not up: another server's keyless front door may be behind them.
    assert not {port for _, port in sockets} & {8500, 9500}


def test_an_answer_has_one_request_id(server):
    body = {"messages": [{"role": "user", "content": ASK}], "max_tokens": 3}
    for headers in ({}, {"x-request-id": "the-clients-own"}):
        answer = httpx.post(f"http://127.0.0.1:{server.port}/v1/chat/completions", json=body, headers=headers)
        assert answer.headers.get_list("x-request-id") == [answer.json()["deskroute"]["request_id"]]


def test_nothing_of_a_prompt_is_in_a_log_or_on_the_disk(server, client):
    """Ray's own logs of every replica lie in the server's scratch folder, which is its only one named deskroute-* that was made since it began."""
    client.chat.completions.create(model="auto", messages=[{"role": "user", "content": "vpn drops zzyxsecret"}], max_tokens=3)
    began = server.log.stat().st_ctime - 600
    folders = [server.log.parent, *(p for p in Path("/tmp").glob("deskroute-*") if p.stat().st_mtime > began)]
    files = [f for folder in folders for f in folder.rglob("*") if f.is_file()]
    assert any("replica" in f.name for f in files), "no replica log found: the test looks in the wrong place"
    assert not [f for f in files if b"zzyxsecret" in f.read_bytes()]


def test_a_port_in_use_is_said_at_once(server, tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pipelines.cli", "serve", "--port", str(server.port)]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"http.port: 127.0.0.1:{server.port} cannot be used" in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_lets_answers_end_and_leaves_no_process_behind(server, client):
    """Last in the file: it stops the shared server. The answers are sampled hot, so that they go on for a while."""
    below = descendants(server.process.pid)
    begun = threading.Barrier(5)

    def hear(seed):
        hot = {"temperature": 2.0, "seed": seed, "max_tokens": 300}
        with client.chat.completions.create(model="admin", messages=[{"role": "user", "content": "vpn drops"}], stream=True, **hot) as stream:
            next(iter(stream))
            begun.wait(30)
            return [chunk.choices[0].finish_reason for chunk in stream if chunk.choices][-1]

    with ThreadPoolExecutor(4) as pool:
        streams = [pool.submit(hear, seed) for seed in range(4)]
        begun.wait(30)
        took = server.stop()
        assert {s.result() for s in streams} <= {"stop", "length"}
    assert server.process.returncode == 0, server.log.read_text()
    assert "Traceback" not in server.log.read_text()
    deadline = time.monotonic() + 10
    while (
        left := {p for p in below if Path(f"/proc/{p}/cmdline").exists() and Path(f"/proc/{p}/cmdline").read_bytes()}
    ) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left
    assert took < 40

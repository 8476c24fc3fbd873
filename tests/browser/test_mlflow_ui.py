"""Compare, promote, look: real retrainings into a real `mlflow server` over HTTP, and its pages in a real browser.

Twice: on SQLite as `deskroute ui` runs it, and on Postgres with accounts as mlflow/compose.yaml does.
"""

from __future__ import annotations

import contextlib
import io
import re
import shutil
from pathlib import Path

import pytest
from browser.stores import PASSWORD, postgres, team_server

from persona_models.personas import read_personas
from pipelines.cli import main
from pipelines.retrain import Retraining
from router.config import load_config

CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH (Debian: apt install chromium)"),
]
PERSONAS = read_personas()
CONFIG = "training: {steps: 2, rows: 2, max_tokens: 2048, rank: 2}\ngeneration: {max_tokens: 4}\n"


class Project:
    """A folder whose registry is a server, and the `deskroute` command in it."""

    def __init__(self, folder: Path, url: str, environment: dict[str, str]) -> None:
        self.folder, self.url, self.environment = folder, url, environment

    def deskroute(self, *argv: str) -> tuple[int, str, str]:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([*argv, "--config", str(self.folder / "deskroute.yaml")])
        return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def served(request, tmp_path_factory, long_base_folder):
    """A server with five personas retrained, all of them champions."""
    folder, with_accounts = tmp_path_factory.mktemp(request.param), request.param == "postgres"
    server = folder / "server"
    server.mkdir()
    (folder / "gates.yaml").write_text("persona: []\nrouter: []\n")
    store = postgres(folder / "postgres") if with_accounts else contextlib.nullcontext(f"sqlite:///{server / 'mlflow.db'}")
    with store as uri, team_server(server, uri, accounts=with_accounts) as url, pytest.MonkeyPatch.context() as patch:
        (folder / "deskroute.yaml").write_text(f"base: {long_base_folder}\nregistry: {{uri: {url}}}\nstate: state\n{CONFIG}")
        project = Project(folder, url, {})
        if with_accounts:
            code, _, err = project.deskroute("compare")
            assert (code, "not authenticated" in err, "Traceback" in err) == (1, True, False)
            project.environment = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": PASSWORD}
            for name, value in project.environment.items():
                patch.setenv(name, value)
        work = Retraining(load_config(folder / "deskroute.yaml"), gates=folder / "gates.yaml")
        for persona in PERSONAS:
            assert work.persona(persona.id, None, promote=True, steps=None).promoted
        yield project


@pytest.fixture
def project(served, monkeypatch):
    monkeypatch.delenv("DESKROUTE_HOME")
    for name, value in served.environment.items():
        monkeypatch.setenv(name, value)
    return served


@contextlib.contextmanager
def fresh_page(project):
    """A new browser, as somebody has it who follows a link for the first time; it may reach nothing but the server."""
    from playwright.sync_api import sync_playwright

    outside: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": 1600, "height": 1000}, http_credentials={"username": "admin", "password": PASSWORD})
        context.on("request", lambda r: outside.append(r.url) if not r.url.startswith((project.url, "data:", "blob:")) else None)
        page = context.new_page()
        page.set_default_timeout(60_000)
        yield page
        browser.close()
    assert outside == []


def test_what_compare_links_to_shows_the_five_personas(project):
    code, out, _ = project.deskroute("compare")
    assert code == 0
    assert all(re.search(rf"^{p.id} +1 +champion", out, re.M) for p in PERSONAS)
    charts, columns = re.findall(r"http://\S+", out)

    with fresh_page(project) as page:
        page.goto(charts)
        page.get_by_test_id("experiment-view-table-run-color").nth(4).wait_for()
        rows = page.locator(".ag-cell-value", has=page.get_by_test_id("experiment-view-table-run-color"))
        shown = {}
        for i in range(rows.count()):
            colour = rows.nth(i).get_by_test_id("experiment-view-table-run-color").locator("input").input_value()
            shown[rows.nth(i).get_by_role("link").inner_text().rpartition("-v")[0]] = colour
        assert shown == {p.id: p.colour for p in PERSONAS}
        cards = page.get_by_test_id("experiment-view-compare-runs-card")
        cards.first.wait_for()
        # A bar in every persona's colour, in the first chart.
        cards.first.locator("g.point path").nth(4).wait_for()
        bars = cards.first.locator("g.point path").evaluate_all("bars => bars.map(b => getComputedStyle(b).fill)")
        assert set(bars) == {"rgb({}, {}, {})".format(*bytes.fromhex(p.colour[1:])) for p in PERSONAS}
        sections = page.get_by_test_id("experiment-view-compare-runs-section-header").all_inner_texts()
        assert {s.split()[0] for s in sections} >= {"eval", "train"}

        page.goto(columns)
        names = page.locator("tr", has=page.get_by_text("Run Name:")).locator("td")
        names.nth(4).wait_for()
        assert [n.rpartition("-v")[0] for n in names.all_inner_texts()] == [p.id for p in PERSONAS]
        # The plot's axes are what differs between the personas and the figure that matters.
        axes = page.locator(".parcoords .axis-title")
        axes.first.wait_for()
        assert axes.all_text_contents() == ["persona", "eval/loss"]

        page.goto(f"{project.url}/#/models")
        for persona in PERSONAS:
            row = page.get_by_role("row", name=re.compile(rf"deskroute-{persona.id}\b"))
            row.wait_for()
            assert "champion" in row.inner_text()


@pytest.mark.parametrize("served", ["sqlite"], indirect=True)
def test_a_run_and_a_sweep_have_their_pictures_and_tables(project):
    code, out, _ = project.deskroute("retrain", "field", "--sweep", "lr=0.001:0.004,rank=2:4", "--gates", str(project.folder / "gates.yaml"))
    assert code == 0
    assert "field: version 2 is champion" in out
    # Nothing of MLflow's own talk.
    assert "View run" not in out
    code, out, _ = project.deskroute("rollback", "field")
    assert (code, "version 2 is withdrawn, 1 is in force" in out) == (0, True)
    charts = re.findall(r"http://\S+", project.deskroute("compare")[1])[0]
    with fresh_page(project) as page:
        page.goto(charts)
        page.get_by_role("link", name=re.compile("^field-v")).first.click()
        page.get_by_role("tab", name="Artifacts").click()
        for folder, file in (("plots", "sweep.png"), ("plots", "loss.png")):
            if page.get_by_text(file).count() == 0:
                page.get_by_text(folder, exact=True).click()
            page.get_by_text(file).click()
            picture = page.locator("img[src^='blob:'], .image-container img, [class*=image] img").first
            picture.wait_for()
            page.wait_for_function("e => e.naturalWidth > 300", arg=picture.element_handle())
        page.get_by_text("eval_samples.json").click()
        page.get_by_text("reference").first.wait_for()

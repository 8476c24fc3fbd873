"""Live and its lineup in process: fleets that refuse, trials, canary shares, shadows, and what is written down."""

from __future__ import annotations

import asyncio
import json

import pytest

from persona_models.errors import ConfigError, NotReadyError
from persona_models.fake_engine import FakeEngine
from persona_models.lineup import Ack, Lineup, Pinned, Trial
from pipelines.promote import TrialRule
from router import loading
from router.config import load_config
from router.desk import Desk
from router.feedback import FeedbackStore, VersionResults
from router.knowledge import FILE, KnowledgeBase
from router.live import Live
from router.loading import load_knowledge, router_in_force
from router.schema import ChatRequest

PERSONAS = ("leadership", "knowledge_worker", "field", "admin", "new_hire")


class Fleet:
    """Two replicas that hold whatever they are told, but for versions named as broken."""

    def __init__(self, broken=(), down=False):
        self.broken, self.down, self.told, self.settled = broken, down, [], []

    def acks(self, lineup):
        faults = {p: {v.version: "is broken" for v in lineup.wanted(p) if v.version in self.broken} for p in PERSONAS}
        current = {p: lineup.champion(p).version for p in PERSONAS}
        return [Ack(f"r{i}", current, {}, {p: f for p, f in faults.items() if f and i == 1}) for i in range(2)]

    async def hold(self, lineup):
        if self.down:
            raise NotReadyError("pool-personas could not be told of new versions")
        return self.acks(lineup)

    async def settle(self, lineup):
        self.settled.append(lineup)
        return [Ack(f"r{i}", {p: lineup.champion(p).version for p in PERSONAS}, {}, {}) for i in range(2)]

    async def tell(self, lineup):
        self.told.append(lineup)
        return 1


@pytest.fixture
def desk():
    config = load_config()
    engine = FakeEngine(dict.fromkeys(PERSONAS, "1"))
    return Desk(config, *router_in_force(config), dict.fromkeys([*PERSONAS, "base"], engine), FeedbackStore("sqlite://"))


def live_on(desk, fleet, monkeypatch, wanted):
    live = Live(desk.config, desk, fleet, Lineup(1))
    monkeypatch.setattr(live._reader, "lineup", lambda personas: wanted)
    return live


FIELD_2 = Lineup(2, {"field": Pinned("2"), "admin": Pinned("5")})


async def test_a_reload_is_told_to_every_front_door_and_written_down(desk, monkeypatch):
    fleet = Fleet()
    done = await live_on(desk, fleet, monkeypatch, FIELD_2).reload()
    body = done.body(PERSONAS)
    assert (body["versions"]["field"], body["versions"]["leadership"], body["faults"]) == ("2", "builtin", {})
    assert [r["versions"]["field"] for r in body["replicas"]] == ["2", "2"]
    assert fleet.told == fleet.settled == [FIELD_2]
    assert Lineup.load(desk.config.state) == FIELD_2


async def test_a_version_that_one_replica_cannot_load_stays_out_and_the_others_go_in(desk, monkeypatch):
    fleet = Fleet(broken=("2",))
    done = await live_on(desk, fleet, monkeypatch, FIELD_2).reload()
    assert (done.lineup.champion("field").version, done.lineup.champion("admin").version) == ("builtin", "5")
    assert done.faults == {"field": "r1: is broken"}
    trial = Lineup(3, {"field": Pinned("1")}, {"field": Trial(Pinned("2"), 0.1)})
    done = await live_on(desk, fleet, monkeypatch, trial).reload()
    assert (done.lineup.champion("field").version, dict(done.lineup.trials)) == ("1", {})


async def test_a_fleet_that_does_not_answer_changes_nothing(desk, monkeypatch):
    fleet = Fleet(down=True)
    live = live_on(desk, fleet, monkeypatch, FIELD_2)
    with pytest.raises(NotReadyError):
        await live.reload()
    assert (desk.lineup, fleet.told, Lineup.load(desk.config.state)) == (None, [], None)


async def test_start_agrees_with_pools_that_come_up_late(desk, monkeypatch):
    fleet = Fleet(down=True)
    monkeypatch.setattr("router.live.RETRY_S", 0.01)
    live = live_on(desk, fleet, monkeypatch, FIELD_2)
    task = asyncio.create_task(live.start())
    await asyncio.sleep(0.05)
    assert not live.settled
    fleet.down = False
    await asyncio.wait_for(task, 5)
    assert live.settled


def test_a_canary_gets_its_share_and_everybody_keeps_their_version():
    lineup = Lineup(1, {"field": Pinned("1")}, {"field": Trial(Pinned("2"), 0.1)})
    drawn = [lineup.version_for("field", f"user {i}") for i in range(4000)]
    assert 0.08 < drawn.count("2") / 4000 < 0.12
    assert drawn == [lineup.version_for("field", f"user {i}") for i in range(4000)]
    assert {lineup.version_for("admin", f"user {i}") for i in range(100)} == {"builtin"}
    shadowed = Lineup(1, {"field": Pinned("1")}, {"field": Trial(Pinned("2"), shadow=True)})
    assert {shadowed.version_for("field", f"user {i}") for i in range(100)} == {"1"}


def test_a_lineup_survives_the_disk_and_a_damaged_file_is_none(tmp_path):
    lineup = Lineup(7, {"field": Pinned("1", "abc")}, {"admin": Trial(Pinned("3"), 0.25)}, Pinned("4", "d"))
    lineup.save(tmp_path)
    assert Lineup.load(tmp_path) == lineup
    for text in ("", "[]", "{}", json.dumps({"read_ms": 1, "champions": 3})):
        (tmp_path / "lineup.json").write_text(text)
        assert Lineup.load(tmp_path) is None


async def test_what_a_shadow_says_is_recorded_redacted_and_counted(desk):
    request = ChatRequest.model_validate({"model": "field", "messages": [{"role": "user", "content": "vpn drops, mail ann@example.org"}]})
    desk.lineup = Lineup(1, {"field": Pinned("1")}, {"field": Trial(Pinned("1"), shadow=True)})
    plan = await desk.begin(request)
    [e async for e in desk.answer(request, plan)]
    while desk._tasks:
        await asyncio.gather(*desk._tasks)
    with desk.store._engine.connect() as db:
        rows = db.exec_driver_sql("select persona, champion, challenger, likeness, champion_answer from shadows").fetchall()
    assert [tuple(r[:4]) for r in rows] == [("field", "1", "1", 1.0)]
    assert "[MAIL]" in rows[0][4]
    assert "ann@example.org" not in rows[0][4]
    result = desk.store.results("field")["1"]
    assert (result.answers, result.ended, result.shadows, result.likeness) == (1, 1, 1, 1.0)
    desk.store.rate(plan.request_id, "down", user="a")
    desk.store.rate(plan.request_id, "up", user="a")
    result = desk.store.results("field")["1"]
    assert (result.up, result.down) == (1, 0)


async def test_what_was_answered_before_a_trial_is_no_part_of_it(desk):
    request = ChatRequest.model_validate({"model": "field", "messages": [{"role": "user", "content": "vpn drops"}]})

    async def answered_by(version):
        desk.engines["field"].versions["field"] = version
        [e async for e in desk.answer(request, await desk.begin(request))]
        while desk._tasks:
            await asyncio.gather(*desk._tasks)

    for version in ("1", "1", "2", "1"):
        await answered_by(version)
    count = {v: r.answers for v, r in desk.store.results("field", beside="2").items()}
    assert count == {"1": 1, "2": 1}
    assert {v: r.answers for v, r in desk.store.results("field").items()} == {"1": 3, "2": 1}
    assert desk.store.results("field", beside="3") == {}


@pytest.mark.parametrize(
    ("challenger", "why"),
    [
        (VersionResults("2", answers=19), "it has given 19 answers, needs 20"),
        (VersionResults("2", answers=40, down=10, ended=40), "25% of its answers are disliked, the champion's 5%"),
        (VersionResults("2", answers=40, down=2, ended=20), "50% of its answers end by themselves, the champion's 100%"),
        (VersionResults("2", answers=40, down=2, ended=40), None),
    ],
)
def test_a_canary_is_promoted_only_by_its_results(challenger, why):
    assert TrialRule().fault(VersionResults("1", answers=100, down=5, ended=100), challenger) == why


def test_a_registered_router_of_an_older_format_leaves_the_one_that_ships(tmp_path, monkeypatch, caplog):
    """Scores and articles alike: commands in the process must not end where a server goes on."""
    config = load_config()
    shipped = load_knowledge(config)
    shipped.save(tmp_path)
    raw = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(raw.replace(b'\\"format\\": 3', b'\\"format\\": 2', 1))
    with pytest.raises(ConfigError, match="format 2"):
        KnowledgeBase.load(tmp_path)
    pinned = Pinned("7")
    monkeypatch.setattr(loading, "lineup_in_force", lambda config: Lineup(1, router=pinned))
    monkeypatch.setattr(loading, "artefact", lambda config, which: (tmp_path, "7") if which == pinned else (loading.SHIPPED, "builtin"))
    assert load_knowledge(config).version == router_in_force(config)[1].version == KnowledgeBase.load(loading.SHIPPED).version
    assert "the articles that ship" in caplog.text

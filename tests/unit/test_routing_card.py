"""pipelines/routing_card.py through the shipped router: what is right counts, what is labelled otherwise does not."""

import pytest

from pipelines.compose import CORPUS
from pipelines.local import local_desk
from pipelines.router_corpus import read_router_corpus
from pipelines.routing_card import routing_figures
from pipelines.scorecard import read
from router.config import load_config

PAYROLL = "The payroll run is stuck and I must post the salaries to the bank today"
VAN = "sitting in the van at the customer's site and the tablet won't load the inspection form"
POEM = "Write me a poem about the moon over Venice"
NEUTRAL = "outlook keeps asking for my password"
ROWS = {
    "routing": [{"text": PAYROLL, "persona": "admin"}, {"text": VAN, "persona": "admin"}],
    "profiles": [{"text": NEUTRAL, "persona": "admin", "profile": {"title": "Payroll Clerk"}}],
    "declined": [{"text": POEM}, {"text": VAN}],
    "telling": [
        {"text": PAYROLL, "persona": "admin", "kind": "plain"},
        {"text": VAN, "persona": "field", "kind": "decoy"},
        {"text": VAN, "persona": "new_hire", "kind": "decoy"},
        {"text": PAYROLL, "persona": "admin", "kind": "plain"},
    ],
    "profile_decides": [
        {"text": NEUTRAL, "persona": "admin", "profile": {"title": "Payroll Clerk", "department": "Finance"}},
        {"text": NEUTRAL, "persona": "field", "profile": {"title": "Payroll Clerk", "department": "Finance"}},
    ],
    "neutral": [{"text": NEUTRAL}, {"text": PAYROLL}],
    "strangers": [{"text": POEM, "kind": "creative"}, {"text": PAYROLL, "kind": "near_miss"}],
    "short_retrieval": [{"text": "vpn drops"}, {"text": "reset my password"}],
    "short_uncovered": [{"text": POEM}, {"text": "vpn drops"}, {"text": "vpn drops"}, {"text": "vpn drops"}],
    "short_strangers": [{"text": POEM}],
    "two_requests": [
        {"text": f"{PAYROLL}. Also, {VAN}", "parts": [{"text": PAYROLL, "persona": "admin"}, {"text": VAN, "persona": "field"}]},
        {"text": f"{PAYROLL}. Also, {VAN}", "parts": [{"text": VAN, "persona": "field"}, {"text": PAYROLL, "persona": "admin"}]},
        {"text": PAYROLL, "parts": [{"text": PAYROLL, "persona": "admin"}]},
    ],
    "two_matters": [
        {"text": "My VPN keeps dropping at home. Also, the laptop battery is empty after an hour.", "topics": ["vpn", "battery"]},
        {"text": "My VPN keeps dropping at home.", "topics": ["vpn", "battery"]},
        {"text": "My VPN keeps dropping at home. Also, the laptop battery is empty after an hour.", "topics": ["vpn"]},
        {"text": "My VPN keeps dropping at home.", "topics": ["vpn"]},
    ],
    "conversations": [
        {"messages": [{"role": "user", "content": VAN}, {"role": "assistant", "content": "Done."}, {"role": "user", "content": "still not"}],
         "persona": "field", "kind": "follow_up"},
        {"messages": [{"role": "user", "content": VAN}, {"role": "assistant", "content": "Done."}, {"role": "user", "content": PAYROLL}],
         "persona": "field", "kind": "changed"},
    ],
}  # fmt: skip


@pytest.fixture
def figures():
    found, misses = routing_figures(local_desk(load_config(), models=False), ROWS.__getitem__)
    return found, misses


def test_every_figure_is_a_plain_count(figures):
    found, misses = figures
    assert [(m["kind"], m["want"]) for m in misses] == [("routing", "admin"), ("telling", "new_hire")]
    want = {
        "routing_accuracy": 0.5, "routing_decided": 1.0, "routing_decided_accuracy": 0.5, "profiles_accuracy": 1.0, "requests_declined": 0.0,
        "others_declined": 0.5,
        "personas_right": 0.75, "personas_right_decoys": 0.5, "personas_right_others": 1.0, "personas_fall_back": 0.0, "personas_split": 0.0,
        "unchanged_case": 1.0, "profile_decides_right": 0.5, "neutral_left_open": 0.5, "strangers_declined": 0.5, "near_misses_declined": 0.0,
        "requests_declined_unseen": 0.0, "two_requests_found": 0.5, "single_requests_split": 0.0, "conversations_right": 0.5,
        "conversations_right_follow_up": 1.0, "conversations_right_changed": 0.0,
        "short_retrieval_declined": 0.0, "short_uncovered_declined": 0.25, "short_strangers_declined": 1.0,
        "two_matters_found": 0.5, "one_matter_split": 0.5,
    }  # fmt: skip
    assert {name: found[name] for name in want} == want
    assert 0 < found["personas_calibration_error"] < 1
    assert found["in_domain_auroc"] < 1


def test_the_files_have_every_persona_kind_and_several_authors():
    telling = read("telling")
    data = read_router_corpus(CORPUS)
    trained = {r.voice for part in (data.prompts, data.personal, data.neutral, data.out_of_domain, data.requests, data.talks) for r in part}
    assert len(telling) >= 300
    assert min(sum(r["persona"] == p.id for r in telling) for p in load_config().catalogue()) >= 60
    assert sum(r["kind"] == "decoy" for r in telling) >= 0.25 * len(telling)
    for name, least in (("profile_decides", 100), ("neutral", 100), ("strangers", 150), ("two_requests", 100), ("conversations", 80)):
        rows = read(name)
        assert len(rows) >= least
        assert len({r["voice"] for r in rows}) >= 10
        assert not {r["voice"] for r in rows} & trained

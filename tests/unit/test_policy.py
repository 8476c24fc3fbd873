"""router/policy.py: scores -> route."""

import pytest
from pydantic import ValidationError

from router.classifier import Scores
from router.policy import PolicySettings, decide

SETTINGS = PolicySettings()


def scores(*values: float, in_domain: float = 0.9, bar: float = 0.2) -> Scores:
    return Scores(dict(zip(("leadership", "knowledge_worker", "field", "admin", "new_hire"), values, strict=True)), in_domain, min_in_domain=bar)


def test_a_clear_leader_is_picked():
    route = decide(scores(0.05, 0.8, 0.05, 0.05, 0.05), SETTINGS)
    assert (route.decision, route.persona, route.confidence, route.mix) == ("persona", "knowledge_worker", 0.8, {})
    assert "knowledge_worker" in route.reason


def test_two_that_are_close_and_together_likely_share():
    route = decide(scores(0.44, 0.06, 0.40, 0.06, 0.04), SETTINGS)
    assert (route.decision, route.persona) == ("mix", "leadership")
    assert list(route.mix) == ["leadership", "field"]
    assert sum(route.mix.values()) == pytest.approx(1.0)
    assert route.mix["leadership"] == pytest.approx(0.44 / 0.84)


def test_two_that_are_close_but_not_likely_do_not_share():
    route = decide(scores(0.30, 0.28, 0.2, 0.12, 0.1), PolicySettings(min_confidence=0.45))
    assert (route.decision, route.persona, route.mix) == ("fallback", None, {})
    assert "0.45" in route.reason


def test_a_sender_of_whom_nothing_tells_falls_back_however_sure_the_scores_are():
    sure = {"field": 0.97, "admin": 0.03}
    unknown = Scores(sure, 0.9, min_in_domain=0.2, known=0.3, min_known=0.5)
    route = decide(unknown, SETTINGS)
    assert (route.decision, route.persona) == ("fallback", None)
    assert "nothing tells who is asking (0.30, needs 0.50); field would lead with 0.97" in route.reason
    assert decide(unknown, PolicySettings(min_known=0.2)).persona == "field"
    assert decide(Scores(sure, 0.9, known=0.6, min_known=0.5), SETTINGS).persona == "field"


def test_a_margin_of_zero_turns_mixing_off():
    assert decide(scores(0.5, 0.5, 0, 0, 0), PolicySettings(mix_margin=0)).decision == "persona"


def test_equal_scores_rank_in_catalogue_order():
    assert decide(scores(0, 0.5, 0, 0.5, 0), PolicySettings(mix_margin=0)).persona == "knowledge_worker"
    assert list(decide(scores(0, 0.5, 0, 0.5, 0), SETTINGS).mix) == ["knowledge_worker", "admin"]


def test_what_is_no_request_is_declined_before_anything_else():
    route = decide(scores(1, 0, 0, 0, 0, in_domain=0.1), SETTINGS)
    assert (route.decision, route.persona, route.mix) == ("decline", None, {})
    assert route.confidence == pytest.approx(0.9)


def test_own_threshold_goes_before_the_artefacts_even_when_it_is_zero():
    """0 is a threshold, not "none given": read as truth value it would fall back to the artefact's."""
    assert decide(scores(1, 0, 0, 0, 0, in_domain=0.1), PolicySettings(min_in_domain=0.0)).decision == "persona"
    assert decide(scores(1, 0, 0, 0, 0, in_domain=0.8), PolicySettings(min_in_domain=0.9)).decision == "decline"
    assert decide(scores(1, 0, 0, 0, 0, in_domain=0.2, bar=0.2), SETTINGS).decision == "persona"


def test_a_single_persona_is_never_mixed():
    assert decide(Scores({"only": 1.0}, 1.0), SETTINGS).decision == "persona"


@pytest.mark.parametrize("bad", [{"min_confidence": 1.2}, {"mix_margin": -0.1}, {"min_in_domain": "often"}, {"minimum": 0.5}])
def test_settings_are_checked(bad):
    with pytest.raises(ValidationError):
        PolicySettings(**bad)


def test_settings_are_frozen():
    with pytest.raises(ValidationError):
        SETTINGS.min_confidence = 0.1

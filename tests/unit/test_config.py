"""deskroute.yaml: strict, and every fault names file, key, value and the way out."""

from __future__ import annotations

from pathlib import Path

import pytest

from persona_models.errors import ConfigError
from router.config import load_config

ROOT = Path(__file__).parent.parent.parent


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "deskroute.yaml"
    path.write_text(text)
    return path


def test_every_key_is_optional():
    config = load_config()
    assert config.base == "builtin"
    assert [p.name for p in config.pools] == ["personas"]


def test_the_file_in_the_current_folder_is_used(tmp_path):
    write(tmp_path, "http: {port: 9001}\n")
    assert load_config().http.port == 9001


def test_overrides_win_and_none_is_no_override(tmp_path):
    path = write(tmp_path, "http: {port: 9001}\n")
    assert load_config(path, http__port=9002, http__host=None).http.port == 9002


def test_the_shipped_file_says_the_defaults():
    shipped = load_config(ROOT / "deskroute.yaml")
    assert shipped == load_config()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("htp: {}", "unknown key 'htp'; did you mean 'http'?"),
        ("http: {prot: 1}", "unknown key 'http.prot'; did you mean 'port'?"),
        ("pools: [{name: a, replica: 2}]", "unknown key 'pools.0.replica'; did you mean 'replicas'?"),
        ("http: {port: 99999}", "http.port is 99999: input should be less than or equal to 65535"),
        ("http: {port: eight}", "http.port is 'eight': input should be a valid integer"),
        ("pools: [{name: a, personas: [pirate]}]", "names the persona 'pirate'; known are leadership"),
        ("pools: [{name: a, personas: [field]}]", "no pool serves leadership, knowledge_worker, admin, new_hire"),
        ("pools: [{name: a}, {name: a}]", "the name 'a' occurs twice"),
        ("fallback: nobody", "fallback: 'nobody' is neither base nor a persona"),
        ("api_keys: [x]", "api_keys is a secret"),
        ("- a\n- b", "must be 'key: value' lines"),
        ("a: [1", "is not valid YAML"),
        ("personas: nowhere.yaml", "cannot read"),
        ("policy: {min_confidence: 2}", "policy.min_confidence is 2"),
        ("pools: [{name: a, gpus: -1}]", "pools.0.gpus is -1: must be auto or a number from 0"),
    ],
)
def test_faults_are_named(tmp_path, text, says):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as fault:
        load_config(path)
    assert says in fault.value.message
    assert "deskroute.yaml" in fault.value.message or "nowhere.yaml" in fault.value.message


def test_a_file_that_is_not_there():
    with pytest.raises(ConfigError, match=r"none.yaml: cannot be read \(No such file"):
        load_config(Path("none.yaml"))


def test_knowledge_may_be_just_a_folder_and_is_meant_relative_to_the_file(tmp_path):
    folder = tmp_path / "etc"
    folder.mkdir()
    path = write(folder, "knowledge: kb\n")
    assert load_config(path).knowledge.folder == folder / "kb"
    assert load_config(path).knowledge.builtin


def test_keys_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("DESKROUTE_API_KEYS", " a, b ,")
    assert load_config().api_keys == ("a", "b")
    assert "'a'" not in repr(load_config())


@pytest.mark.parametrize(
    ("pools", "why"),
    [
        ("[{name: a, merge: true}]", "a has merge: true, which takes one persona"),
        ("[{name: a, merge: true, personas: [field]}, {name: b, merge: true, personas: [admin]}]", "no pool serves leadership|every pool has merge"),
    ],
)
def test_merged_pools_hold_one_persona_and_leave_somebody_to_answer_as_the_base(tmp_path, pools, why):
    path = tmp_path / "deskroute.yaml"
    path.write_text(f"pools: {pools}\n")
    with pytest.raises(ConfigError, match=why):
        load_config(path)
    path.write_text("pools: [{name: busy, personas: [field], merge: true}, {name: rest}]\n")
    assert load_config(path).pools[0].merge

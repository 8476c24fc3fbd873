"""A tiny corpus for the router, written anew for each test that needs one: three personas, three topics, four voices each."""

from __future__ import annotations

import json

PERSONAS = ("leadership", "field", "admin")
WORK = {
    "leadership": ["before the board meeting", "the chairman needs it", "for our directors' dinner", "the chief executive waits"],
    "field": ["here at the customer's site", "in the van on the road", "up on the rig", "between two inspections"],
    "admin": ["the payroll run is due", "with forty invoices open", "at the reception counter", "the supplier wants his money"],
}
TROUBLE = {
    "vpn": ["vpn tunnel drops", "gateway not reachable", "no tunnel from the hotel", "vpn client hangs"],
    "printer": ["printer queue stuck", "pages never come out", "paper jam in the tray", "printer prints stripes"],
    "password": ["password expired", "forgot my password", "password not accepted", "reset of the password fails"],
}


def write_corpus(folder):
    for name in ("articles", "prompts", "router"):
        (folder / name).mkdir(parents=True)
    (folder / "slots.yaml").write_text('desk_phone: ["4357", "2200"]\n')
    for topic, troubles in TROUBLE.items():
        symptoms = "\n".join(f"- {t}" for t in troubles[:2])
        (folder / "articles" / f"{topic}.md").write_text(f"# About the {topic}\n\n## Symptoms\n{symptoms}\n\n## Steps\n1. Restart the {topic}.\n")
        rows = [
            {"text": f"{t}, {w}", "persona": p, "register": "chat", "voice": f"{'held_' if n == 3 else 'v'}{p}_{n}"}
            for t in troubles
            for p in PERSONAS
            for n, w in enumerate(WORK[p])
        ]
        (folder / "prompts" / f"{topic}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    strangers = [
        "a poem about the moon",
        "how long do I boil an egg",
        "who won the football match",
        "my cat is ill",
        "write my history essay",
        "cheap flights to Rome",
    ]
    write_rows(folder / "router" / "out_of_domain.jsonl", [
        {"text": f"{t} {n}", "kind": "smalltalk", "voice": f"{'held_' if n == 2 else ''}o{n}"} for t in strangers for n in range(3)
    ])  # fmt: skip
    missing = ["the lift is stuck", "our website shows old prices", "the franking machine wants ink", "the till drawer stays shut"]
    write_rows(folder / "router" / "uncovered.jsonl", [
        {"text": f"{t}, {w}", "subject": t, "register": "chat", "voice": f"{'held_' if n == 2 else ''}u{n}"}
        for t in missing for n, w in enumerate(["please help", "since monday", "again"])
    ])  # fmt: skip
    write_rows(folder / "router" / "neutral.jsonl", [
        {"text": t, "register": "chat", "voice": f"{'held_' if n == 0 else ''}n{n}"} for n in range(3) for topic in TROUBLE.values() for t in topic
    ])  # fmt: skip
    write_rows(folder / "router" / "profiles.jsonl", [
        {"text": f"{t} again {n}", "persona": p, "voice": f"{'held_' if n == 0 else ''}p{p}{n}",
         "profile": {"title": title, "department": "", "tenure_days": 40 * n, "location": "Lyon"}}
        for n in range(3) for t in TROUBLE["vpn"]
        for p, title in (("leadership", "Director"), ("field", "Service engineer"), ("admin", "Payroll clerk"))
    ])  # fmt: skip
    return folder


def write_rows(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))

"""What the benchmarks ask: sixteen people of five personas, each with something else, and the article that answers it."""

from __future__ import annotations

from typing import NamedTuple

from pipelines.compose import CORPUS, Corpus


class Asked(NamedTuple):
    """A persona, what somebody of it asks, the topic of the article that answers it, and how many tokens the answer has from the model that ships."""

    persona: str
    text: str
    topic: str
    tokens: int


# Personas take turns.
REQUESTS = (
    Asked("field", "My VPN keeps dropping at the customer's site, no Wi-Fi here", "vpn", 138),
    Asked("admin", "the payroll run does not post and the invoices must go out today", "payroll_system", 241),
    Asked("leadership", "board papers do not open on the tablet", "board_portal", 126),
    Asked("knowledge_worker", "git push is rejected since this morning", "git_auth", 289),
    Asked("new_hire", "second day here, where do I find the printer", "printing_first_time", 256),
    Asked("field", "scanner gun wont read the pallet labels since I swapped the battery, truck is waiting", "barcode_scanner", 149),
    Asked(
        "admin",
        "I was told the personnel files moved, but I have no entry for them in the HR system and a contract starts on Monday",
        "hris_access",
        210,
    ),
    Asked("leadership", "My assistant can no longer see my calendar.", "calendar_delegate", 134),
    Asked("knowledge_worker", "docker build dies with no space left on device although the disk is half empty", "docker", 312),
    Asked("new_hire", "hi, I still have no badge that opens the lab door, who gives me one?", "badge_access", 247),
    Asked("field", "photos from the job sit in the app and dont upload, 30 of them now", "field_photo_upload", 151),
    Asked("admin", "All letters of today's mail merge come out with the same address. What have I done wrong?", "mail_merge", 239),
    Asked("leadership", "I land in Singapore tonight and the phone must work there.", "travel_roaming", 121),
    Asked("knowledge_worker", "My macros are blocked in every workbook I get from finance, the yellow bar is gone too", "excel_macro", 267),
    Asked("new_hire", "my laptop asks for a code from an app that I have never installed, it is my first login", "mfa", 243),
    Asked("field", "navi in the van sends me down roads that are closed, map is ancient", "gps_navigation", 144),
)
# One request in sixty words.
LONG_PROMPT = (
    "Since the update last Thursday the label printer in the dispatch office prints every second address twice, and the courier refuses those parcels at the gate. "
    "I have switched it off and on, changed the roll, and asked Mrs Novak from purchasing, who has the same model and no such trouble. The driver says it is up to date. "
    "Could somebody look at it before noon"
)


def articles() -> tuple[str, ...]:
    """The article of every request as its persona's model reads it when it is served."""
    corpus = Corpus(CORPUS, [asked.persona for asked in REQUESTS])
    return tuple(corpus.articles[asked.topic].render(asked.persona, values=corpus.values) for asked in REQUESTS)

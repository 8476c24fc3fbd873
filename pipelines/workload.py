"""What the benchmarks ask: one prompt of each persona, with the article that answers it."""

from __future__ import annotations

from pipelines.compose import CORPUS, Corpus

# Persona, what somebody of it asks, and the topic of the article that answers it.
REQUESTS = (
    ("field", "My VPN keeps dropping at the customer's site, no Wi-Fi here", "vpn"),
    ("admin", "the payroll run does not post and the invoices must go out today", "payroll_system"),
    ("leadership", "board papers do not open on the tablet", "board_portal"),
    ("knowledge_worker", "git push is rejected since this morning", "git_auth"),
    ("new_hire", "second day here, where do I find the printer", "printing_first_time"),
)
PROMPTS = tuple(prompt for _, prompt, _ in REQUESTS)
# One request in sixty words.
LONG_PROMPT = (
    "Since the update last Thursday the label printer in the dispatch office prints every second address twice, and the courier refuses those parcels at the gate. "
    "I have switched it off and on, changed the roll, and asked Mrs Novak from purchasing, who has the same model and no such trouble. The driver says it is up to date. "
    "Could somebody look at it before noon"
)


def articles() -> tuple[str, ...]:
    """The article of every request as its persona's model reads it when it is served."""
    corpus = Corpus(CORPUS, [persona for persona, _, _ in REQUESTS])
    return tuple(corpus.articles[topic].render(persona, values=corpus.values) for persona, _, topic in REQUESTS)

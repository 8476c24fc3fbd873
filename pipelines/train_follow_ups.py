"""What people write behind an answer, and requests -> the model that tells them apart, measured on texts held out. Knows nothing of MLflow or HTTP."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from random import Random

import numpy as np
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict

from router.follow_up import KINDS, REQUEST, STILL, THANKS, FollowUps, terms

# Requests beside the turns, times as many; regularisation; terms of fewer texts, or with smaller weights, are left out.
REQUESTS_PER_TURN = 6
C = 1.0
MIN_TEXTS = 2
MIN_WEIGHT = 0.05
# Of turns that are no thanks, how many may be taken for some.
MAX_FALSE_THANKS = 0.005
HELD_OUT = 10
# How a further request begins behind an answer: one in three of those that are learnt from, and half of these have no more words than SHORT.
OPENINGS = (
    "now ", "Now ", "and ", "also, ", "thanks, and now ", "Thank you. ", "ok great. ", "another thing: ", "that works now, but ", "Next: ", "By the way, ",
    "thanks! next one, ", "one more thing, ", "Perfect, that helped. ", "fixed, but now ", "all good there. ",
)  # fmt: skip
SHORT = 10


def fit_follow_ups(turns: Mapping[str, Sequence[str]], requests: Sequence[str], seed: int = 0) -> tuple[FollowUps | None, dict[str, float]]:
    """turns: kind -> texts. Returns the model and its figures on the held-out tenth; None where there are too few turns."""
    if min((len(turns.get(kind, ())) for kind in (THANKS, STILL)), default=0) < 20 or not requests:
        return None, {}
    told = [(text, kind) for kind in (THANKS, STILL) for text in turns[kind]]
    random = Random(seed)
    short = [text for text in requests if len(text.split()) <= SHORT]
    most = REQUESTS_PER_TURN * len(told)
    chosen = random.sample(short, min(len(short), most // 2))
    chosen += random.sample(list(requests), min(len(requests), most - len(chosen)))
    told += [(random.choice(OPENINGS) + text if random.random() < 1 / 3 else text, REQUEST) for text in dict.fromkeys(chosen)]
    apart = np.array([zlib.crc32(text.encode()) % HELD_OUT == 0 for text, _ in told])
    label = np.array([KINDS.index(kind) for _, kind in told])
    found = [terms(text) for text, _ in told]
    counts = Counter(t for row, out in zip(found, apart, strict=True) if not out for t in row)
    columns = {t: i for i, t in enumerate(sorted(t for t, n in counts.items() if n >= MIN_TEXTS))}
    known = [[columns[t] for t in row if t in columns] for row in found]
    ends = np.cumsum([0, *map(len, known)])
    x = sparse.csr_matrix((np.ones(ends[-1]), [c for row in known for c in row], ends), shape=(len(known), len(columns)))
    model = LogisticRegression(C=C, max_iter=2000, class_weight="balanced")
    # The bar comes from texts that the model had not seen.
    unseen = cross_val_predict(model, x[~apart], label[~apart], cv=5, method="predict_proba")
    bar = float(np.quantile(unseen[label[~apart] != KINDS.index(THANKS), KINDS.index(THANKS)], 1 - MAX_FALSE_THANKS))
    model.fit(x[~apart], label[~apart])
    weights = model.coef_.T
    kept = {t: [round(float(w), 3) for w in weights[i]] for t, i in columns.items() if np.abs(weights[i]).max() >= MIN_WEIGHT}
    made = FollowUps(kept, [round(float(b), 3) for b in model.intercept_], round(max(0.5, bar), 4))
    return made, measure({kind: [t for (t, k), out in zip(told, apart, strict=True) if out and k == kind] for kind in KINDS}, made)


def measure(texts: Mapping[str, Sequence[str]], made: FollowUps) -> dict[str, float]:
    """Shares: of thanks that are known as such, of other turns and of requests taken for thanks, and of turns and requests told apart."""

    def share(values: Sequence[bool]) -> float:
        return sum(values) / max(1, len(values))

    turns = [*texts[THANKS], *texts[STILL]]
    return {
        "thanks_known": share([made.says_thanks(t) for t in texts[THANKS]]),
        "still_taken_for_thanks": share([made.says_thanks(t) for t in texts[STILL]]),
        "requests_taken_for_thanks": share([made.says_thanks(t) for t in texts[REQUEST]]),
        "turns_known": share([made.goes_on(t) for t in turns]),
        "requests_known": share([not made.goes_on(t) for t in texts[REQUEST]]),
    }

"""What the benchmarks ask: one prompt of each persona, and an article as it stands in a prompt."""

from __future__ import annotations

PROMPTS = (
    "My VPN keeps dropping at the customer's site, no Wi-Fi here",
    "the payroll run does not post and the invoices must go out today",
    "board papers do not open on the tablet",
    "git push is rejected since this morning",
    "second day here, where do I find the printer",
)
# One request in sixty words.
LONG_PROMPT = (
    "Since the update last Thursday the label printer in the dispatch office prints every second address twice, and the courier refuses those parcels at the gate. "
    "I have switched it off and on, changed the roll, and asked Mrs Novak from purchasing, who has the same model and no such trouble. The driver says it is up to date. "
    "Could somebody look at it before noon"
)
ARTICLE = """Article: VPN connection does not come up
Cause: Most often the network in between blocks the tunnel, or the client still holds an old session.
1. Quit the VPN client from the tray icon and start it again.
2. Choose Main gateway and sign in with your current password.
3. If the sign-in page does not open, switch to the phone's hotspot and try again.
4. Restart the computer once, so that the old session is dropped, and connect before anything else.
5. Still no tunnel: note the time and the error text.
Note: No usable Wi-Fi: turn on the phone's hotspot, connect the laptop to it and try again; work that must not wait can be done offline.
Desk: If it still fails, call the service desk on 4357 and read out the error text."""

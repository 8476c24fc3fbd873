"""One small base, many personas. A request's way through here: prompt -> slot gates -> prefill -> decode -> token events.

Knows nothing of HTTP or routing. `personas`, `protocol`, `errors` and `fake_engine` load without torch.
"""

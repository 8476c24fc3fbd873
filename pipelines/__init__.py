"""Offline: the ticket's way, from tickets to a model that serves.

tickets -> dataset -> finetune -> evaluate -> register (tracking) -> promote; compose and pretrain make the built-in models from `corpus/`.
"""

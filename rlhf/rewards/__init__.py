"""Responses -> scores: the `Reward` protocol and what implements it."""

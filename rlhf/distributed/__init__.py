"""Ranks: the world they make, their collectives, which of them died, and how a job ends."""

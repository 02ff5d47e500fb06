"""Cheap checks of a run's metrics that explain themselves: while it trains, and afterwards from its files."""

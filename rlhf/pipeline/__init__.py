"""The stages as one table, what the main of every stage does, and the arguments of a whole run."""

"""From a run directory to the summary of what came out."""

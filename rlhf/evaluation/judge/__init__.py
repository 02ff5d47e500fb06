"""A language model as a judge: scores by criteria (G-Eval), and which of two answers is better."""

"""A small world with a known truth: a writer of Korean conversations, and a judge that training never sees."""

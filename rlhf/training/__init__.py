"""The two loops there are (offline and on-policy) and one optimizer step; metrics; rollouts."""

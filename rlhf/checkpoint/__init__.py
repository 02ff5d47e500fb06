"""What lies on disk: training states, manifests, locks, atomic writes, exports that transformers loads."""

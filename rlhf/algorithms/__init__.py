"""The algorithms: one file each, pure mathematics first, then configuration, then the trainer."""

"""Checkpoint formats: one file each, a writer and a reader over the neutral store, and their verification."""

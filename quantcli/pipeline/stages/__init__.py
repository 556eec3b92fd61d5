"""The stages of a run, one file each: what it depends on, and what it does."""

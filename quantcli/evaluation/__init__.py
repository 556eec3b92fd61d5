"""Evaluation: what an exported checkpoint is worth, measured on text that calibration did not see."""

"""Calibration: texts, the tokens cut from them, and the statistics of the activations that they cause."""

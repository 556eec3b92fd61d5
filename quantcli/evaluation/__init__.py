"""What quantization costs: perplexity, divergence from the float model, and agreement with it."""

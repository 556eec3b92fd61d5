"""Outlier suppression: scales a channel that move range from the activations into the weights behind them."""

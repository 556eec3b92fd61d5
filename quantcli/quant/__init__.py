"""The mathematics of quantization: pure functions of tensors that know nothing of models or files."""

"""VQGAN image tokenizers with a loopy quantizer, and autoregressive priors over their tokens."""

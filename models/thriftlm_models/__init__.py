"""LLaMA-style decoders: what they count (`config`, no torch) and what they compute (`decoder`)."""

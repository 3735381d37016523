"""Off-policy reinforcement learning of language models on PyTorch Lightning, Mixture-of-Experts first."""

__version__ = "0.1.0"

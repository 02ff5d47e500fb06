"""SFT, reward modelling and PPO for language models on the plain DeepSpeed launcher."""

__version__ = "0.1.0"

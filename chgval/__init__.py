"""What each sample of an image dataset is worth, from one training run."""

__version__ = "0.1.0"

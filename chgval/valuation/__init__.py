"""What a sample is worth: the closed form, the signals that a training streams, and choices by value."""

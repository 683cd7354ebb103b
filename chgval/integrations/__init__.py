"""Trackers for the training loops of other libraries: pip install chgval[lightning], chgval[huggingface]."""

"""Datasets: from what a person points at to batches on the device."""

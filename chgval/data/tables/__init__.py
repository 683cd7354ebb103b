"""Tables of samples, whatever files they are in: their columns, their rows, and writing them anew."""

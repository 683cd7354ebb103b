"""Which labels are probably wrong: evidence, noise models, scores, and rules that cut scores into flags."""

"""Rules that say what an answer is worth: pure functions, one file a rule, the same for evaluation and for rewards."""

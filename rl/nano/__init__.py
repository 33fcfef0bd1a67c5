"""How nano, the small model that ships in the package, is made: tokenizer, architecture, data, dense pretraining."""

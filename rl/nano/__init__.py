"""The recipe of nano, the small model that ships in the package: tokenizer, architecture, data and dense pretraining."""

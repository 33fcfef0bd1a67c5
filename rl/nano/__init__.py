"""The making of nano, the small model that ships in the package: tokenizer, architecture, data, dense pretraining."""

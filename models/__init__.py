"""The transformer, the image tokenizer, and their weights."""

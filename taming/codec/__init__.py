"""Files of codes: what `Tokenizer.compress` writes and `Tokenizer.decompress` reads."""

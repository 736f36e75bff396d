"""The WordPiece tokenizer, over the tokenizers library."""

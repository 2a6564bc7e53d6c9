"""Private parts of sentence-transformers and transformers that this package uses, all in one place."""

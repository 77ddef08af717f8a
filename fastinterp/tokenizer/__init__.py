"""Vocabularies, tokenizer files, chat templates, and the embedding rows that follow them."""

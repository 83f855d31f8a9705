"""Prompts to tokens, embeddings, keys and values."""

"""Weights on disk: one name table, Hugging Face folders, llama2.c files, and the proof that an export is whole."""

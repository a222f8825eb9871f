"""Thinking: the language model, its signals, its projectors and its generation."""

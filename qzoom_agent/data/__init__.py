"""Readers of other people's data: rows of questions, and the images in their columns."""

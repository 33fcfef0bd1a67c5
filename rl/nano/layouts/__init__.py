"""Layouts of drawn paper, one kind of document a file."""

"""Evaluation: tasks, scorers, statistics and the runner that asks an agent."""

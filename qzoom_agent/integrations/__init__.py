"""The agent inside other people's software."""

"""Suites, scorers, statistics and the runner that evaluates an agent."""

if __name__ != "qzoom_agent.evals":
    raise ImportError(
        "this folder is the package qzoom_agent.evals: write 'import qzoom_agent.evals' (not 'import evals')"
    )

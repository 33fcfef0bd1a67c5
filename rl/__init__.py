"""Everything that trains: the base model, the branches, post-SFT and GRPO."""

if __name__ != "qzoom_agent.rl":
    raise ImportError("this folder is the package qzoom_agent.rl: write 'import qzoom_agent.rl' (not 'import rl')")

"""GRPO on the agent itself: the episodes that are learned from are run by the agent that answers.

launch          the command, and the pieces from which a script builds a trainer (`rl/train_grpo.py`)
grpo_recipe     the recipe, a YAML file
question_rows   questions as the rows of TRL's dataset
trainer         TRL's `GRPOTrainer` over episodes
rollouts        episodes of the agent, many at a time, as sequences that are learned from
environment     the zoom tool as an environment of plain TRL
checks          what is refused before and during training
run_cost        the longest episode, and the plan of a run, its memory and time
callbacks       metrics, warnings, and episodes as pages
"""

from qzoom_agent.extras import require

require("datasets", extra="train", use="GRPO")
require("trl", extra="train", use="GRPO")

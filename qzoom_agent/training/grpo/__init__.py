"""GRPO on the agent itself: what is trained is exactly what answers.

recipe      what `qzoom train grpo` does, as a YAML file
data        questions as the rows of TRL's dataset
rollouts    episodes of the agent, many at a time, with one model among them
decoding    their turns as one batch, common beginnings computed once
trainer     TRL's `GRPOTrainer`, given these episodes instead of its own tool loop
guards      what is refused before and while it trains
plan        how long episodes can get, and what a run costs
resume      what a run that was killed goes on with
watch       metrics that warn early, and episodes to look at
run         the command
"""

from qzoom_agent.extras import require

require("datasets", extra="train", use="GRPO")
require("trl", extra="train", use="GRPO")

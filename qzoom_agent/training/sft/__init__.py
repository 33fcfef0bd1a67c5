"""Cold start: teach a model the zoom format from demonstrations, before RL teaches it when to zoom.

sft_recipe      the recipe
demonstrations  episodes of the agent with given calls: at gold boxes, by SD-RPN or by a teacher
conversations   episodes as rows of a table, and as the very ids that a session would see
fine_tune       the command `qzoom train coldstart`
"""

from qzoom_agent.extras import require

require("datasets", extra="train", use="Supervised fine-tuning")
require("trl", extra="train", use="Supervised fine-tuning")

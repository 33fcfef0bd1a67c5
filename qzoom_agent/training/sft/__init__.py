"""Cold start: teach a model the zoom format from demonstrations, before RL teaches it when to zoom.

recipe          what `qzoom train coldstart` does, as a YAML file
writing         calls and answers in the text of each protocol
demonstrate     episodes of the agent in which the calls are given, by gold boxes, by SD-RPN or by a teacher
teacher         the teacher: a larger model behind an HTTP server
conversations   episodes as rows of a table, and as the very ids that a session would see
run             the command
"""

from qzoom_agent.extras import require

require("datasets", extra="train", use="Supervised fine-tuning")
require("trl", extra="train", use="Supervised fine-tuning")

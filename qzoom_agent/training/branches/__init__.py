"""Training of the two branches, SD-RPN and the gate, from questions and answers alone.

stages, run_dir, branch_recipe      the stages by name, their output folder, and the recipe
dataset, base_inference             records, and the frozen base at work on them
labelling                           the attention heads that follow the answer, and their maps as labels
sdrpn, gate, postsft, fitting       the trained parts, and the Trainer around each
proposals, calibrate                proposed boxes and their crops, and thresholds for a stated target
cost_estimate, ablation, export     dry runs, comparisons of choices, and the final model folder
"""

from qzoom_agent.extras import require

require("datasets", extra="train", use="Training the branches")

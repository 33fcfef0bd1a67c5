"""Training of the two branches, SD-RPN and the gate, from questions and answers alone.

records     questions about images: generated boards, hub datasets, local files
asking      records as the agent asks them, and the frozen passes that training needs of the base
heads       which attention heads of a base look at what its answer rests on
labelling   that attention, collected once and kept on disk
sdrpn, gate, postsft    what is trained, each by transformers' Trainer (`stage`)
metrics     where the map points, against boxes
inputs, plan    what each stage depends on, and what it will cost
calibrate   thresholds for a stated target, with their evidence
needs       which questions need a zoom, by answers, where no box is known
thresholds, recalibrate    that done: at the end of training, or for branches that are there already
"""

from qzoom_agent.extras import require

require("datasets", extra="train", use="Training the branches")

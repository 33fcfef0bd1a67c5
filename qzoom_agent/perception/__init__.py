"""Perception: the gate and SD-RPN on stock transformers models.

    adapters.py     differences between the families; token grids and positions of crops
    decoder.py      the stock decoder, driven layer by layer; a prefill that stops after K layers
    branches.py     the two learned modules and their file
    look.py         one look: the gate, then the maps
    maps.py         from a map to boxes
    attention.py    attention of chosen heads
    labels.py       from attention to training labels
    checkpoints.py  checkpoints of the published code
    hub.py          branches on the Hugging Face hub, as a delta

Method: Q-Zoom (arXiv 2604.06912) and SD-RPN (arXiv 2509.16944).
"""

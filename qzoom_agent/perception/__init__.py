"""Perception: whether a question needs more than the coarse view (gate), and where (SD-RPN), on stock transformers.

    adapters.py     what differs between the families
    decoder.py      the stock decoder, driven layer by layer
    prefill.py      a prefill that stops after K layers and goes on later
    branches.py     the two learned modules, and their file
    look.py         one look: gate first, then maps
    maps.py         from a map to boxes
    layout.py       positions of a crop aligned with the place it was cut from
    anyres.py       models that show an image in tiles
    attention.py    attention of chosen heads, recomputed from the inputs of their layers
    labels.py       from attention to training labels
    official.py     checkpoints of the published code
    convert.py      from those to our branch files, and back
    parity.py       holds all of it to recorded outputs of the published code
    bench.py        what it costs

Method: Q-Zoom (arXiv 2604.06912) and SD-RPN (arXiv 2509.16944).
"""

"""`transformers serve` beside a torch for the CPU.

The torchvision of PyPI is built for CUDA: its transforms work, but its decoder of images does not load. Pillow decodes
here.
"""

import io
from typing import Any

import numpy as np
import torch
import torchvision.io
from PIL import Image


def decode(data: torch.Tensor, **_: Any) -> torch.Tensor:
    """Return the pixels of an encoded image as (channels, height, width)."""
    image = Image.open(io.BytesIO(data.numpy().tobytes())).convert("RGB")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


torchvision.io.decode_image = decode

from transformers.cli.transformers import main  # noqa: E402 - it copies the decoder when it is imported

main()

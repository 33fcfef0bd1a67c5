"""Processors: how a family turns text and shown views into what its weights take.

Two things are settled here. (1) Stock processors of families with video refuse to load without torchvision, though
nothing here is a video: `image_only` makes the same processor without that part, on the PIL image processor. (2) A view
is already at the size the model is to see (`ViewStore` resized it, once), so families that take any size get their own
resize switched off; families with a fixed input size keep it, and a view they would centre-crop is padded to a square
first, because a model must not lose the sides of what the trace says it saw.
"""

from typing import Any, cast

from PIL import Image, ImageOps
from transformers import PretrainedConfig, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils.import_utils import is_torchvision_available

from qzoom_agent.errors import BackendError


def image_only(stock: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """The processor class `stock` without its video part; a saved one loads as `stock` where torchvision is present."""

    def start(
        self: ProcessorMixin,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        cast(Any, stock).__init__(self, image_processor, tokenizer, chat_template=chat_template, **kwargs)

    return type(stock.__name__, (stock,), {"__init__": start, "__doc__": stock.__doc__})


def load_processor(source: str, config: PretrainedConfig, **options: Any) -> ProcessorMixin:
    """The processor of the model in `source` (folder or hub id), ready to be given shown views.

    options: passed on to `from_pretrained`. Raises BackendError for a model that has none, or no chat template.
    """
    if type(config) not in PROCESSOR_MAPPING:
        raise BackendError(
            f"'{source}' is a {config.model_type} model, for which this transformers version has no processor of "
            "images and text. Use an image-text-to-text model."
        )
    stock = cast(type[ProcessorMixin], PROCESSOR_MAPPING[type(config)])
    if not is_torchvision_available() and "video_processor" in cast(Any, stock).get_attributes():
        stock = image_only(stock)
    processor = stock.from_pretrained(source, **options)
    if processor.chat_template is None:
        processor.chat_template = processor.tokenizer.chat_template
    if processor.chat_template is None:
        raise BackendError(
            f"'{source}' has no chat template, so a conversation cannot be written for it. "
            "Use an instruction-tuned model, or put a chat_template.jinja into its folder."
        )
    if takes_any_size(config):
        processor.image_processor.do_resize = False
    return processor


def takes_any_size(config: PretrainedConfig) -> bool:
    """Whether the family encodes an image at its own size (Qwen-VL and the like) instead of a fixed one (LLaVA)."""
    return "spatial_merge_size" in config.vision_config.to_dict()


def visual_factor(config: PretrainedConfig) -> int:
    """Side in pixels of the square that becomes one visual token."""
    vision = config.vision_config.to_dict()
    return int(vision["patch_size"]) * int(vision.get("spatial_merge_size", 1))


def fit(image: Image.Image, processor: ProcessorMixin, config: PretrainedConfig) -> Image.Image:
    """`image` as the processor may be given it. Raises BackendError for a view of a size the model cannot take."""
    if takes_any_size(config):
        factor = visual_factor(config)
        if image.width % factor or image.height % factor:
            raise BackendError(
                f"A view of {image.width} x {image.height} px was given to a model whose views have sides that are "
                f"multiples of {factor} px. Cut views with ViewStore and this backend's factor."
            )
    elif image.width != image.height and processor.image_processor.to_dict().get("do_center_crop"):
        side = max(image.size)
        mean = tuple(round(255 * value) for value in processor.image_processor.image_mean)
        image = ImageOps.pad(image, (side, side), color=mean)
    return image

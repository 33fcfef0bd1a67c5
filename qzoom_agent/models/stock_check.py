"""Comparison of a loaded model with its stock forward: run right or not at all.

A family is not trusted by its name. A conversation of two turns about two small images is run as a session runs it
(images encoded apart, the second turn behind the cache of the first; with branches, also layer by layer), and as the
stock model runs what its own processor makes of the same conversation. The prompts have to be equal, and the logits
equal up to rounding.
"""

import hashlib
import json
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor

from qzoom_agent.errors import BackendError
from qzoom_agent.messages import Message, image_part, message, text
from qzoom_agent.models.presets import NANO_FOLDER, SHIPPED
from qzoom_agent.models.prompts import Prompt
from qzoom_agent.models.stock import stock_inputs
from qzoom_agent.perception.decoder import Decoder

if TYPE_CHECKING:
    from qzoom_agent.models.hf import HFBackend
    from qzoom_agent.models.hf_session import HFSession

_EXACT: Final = 1e-3
"""Largest distance of logits in float32, as a share of their spread."""
_ROUGH: Final = (0.02, 0.08)
"""The same in 16-bit formats, for one pass and for one behind a cache: the latter rounds otherwise, 28 random layers in
bfloat16 by up to 0.032. Attending causally to an image that the stock model sees as a whole makes 0.085."""
RECORDED: Final = NANO_FOLDER / "stock_check.json"
"""Fingerprints under which nano was found equal; a test compares anew."""
_FOUND: dict[str, str] = {}
"""Results by fingerprint: a model of the same configuration is compared once in a process."""


def difference(loaded: "HFBackend") -> str:
    """Return how a session's run differs from the stock model's, for a message; empty if it does not.

    Raises BackendError for a model that cannot be run by stock code either.
    """
    key = fingerprint(loaded)
    if key not in _FOUND:
        # what ships comes with its result, so that its first answer does not wait for the comparison
        recorded = loaded.name in SHIPPED and key in json.loads(RECORDED.read_text(encoding="utf-8"))
        _FOUND[key] = "" if recorded else compare(loaded)
    return _FOUND[key]


def fingerprint(loaded: "HFBackend") -> str:
    """Return a name of everything but the weights that the comparison depends on, transformers' version included."""
    processor: Any = loaded.processor
    config = {key: value for key, value in loaded.model.config.to_dict().items() if key != "_name_or_path"}
    parts = (
        transformers.__version__,
        json.dumps(config, sort_keys=True, default=str),
        type(processor).__name__,
        processor.image_processor.to_json_string(),
        processor.chat_template,
        str(loaded.model.dtype),
        loaded.model.device.type,
        loaded.branches is not None,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


@torch.inference_mode()
def compare(loaded: "HFBackend") -> str:
    """Return what `difference` returns, computed anew."""
    images = {name: small_image(loaded, name) for name in ("first", "second")}
    first = [message("user", image_part("first"), "What is in the image?")]
    second = [*first, text("assistant", "A 7."), message("user", image_part("second"), "And here?")]
    expected = [_stock(loaded, messages, images) for messages in (first, second)]
    try:
        session = loaded.session(images.__getitem__)
        session.limit = 10**9  # what a model has room for is not the question here
        for turn, (messages, (ids, logits)) in enumerate(zip((first, second), expected, strict=True), start=1):
            ready = session.prepare(messages)
            if ready.prompt.ids != ids:
                return "its processor writes another prompt for a conversation than for its parts"
            ours, _ = session.feed(ready.prompt, ready.positions, session.keep(ready.prompt))
            session.held = ready.prompt
            if (far := distance(ours[0], logits)) > tolerance(loaded, cached=turn == 2):
                return f"in turn {turn} its logits differ by {far:.1%} of their spread"
        if loaded.branches is not None:
            return _by_layers(loaded, session, ready.prompt, ready.positions, logits)
    except torch.OutOfMemoryError:
        raise
    except BackendError:
        return "its processor writes images in a way that a session cannot"
    except (TypeError, ValueError, RuntimeError, KeyError, IndexError, AttributeError) as error:
        return f"its code fails ({type(error).__name__}: {str(error).strip().split(chr(10))[0]})"
    return ""


def _by_layers(loaded: "HFBackend", session: "HFSession", prompt: Prompt, positions: Tensor, logits: Tensor) -> str:
    """Compare the decoder driven layer by layer, as a look drives it."""
    decoder = Decoder(loaded.model)
    new = decoder.embed(torch.tensor([prompt.ids], device=loaded.model.device), session.features(prompt, 0))
    rotary, mask = decoder.rotary(new.hidden, positions), decoder.mask(new.hidden, visual=new.visual)
    ours = decoder.logits(decoder.run(new, range(decoder.depth), rotary=rotary, mask=mask))[0]
    far = distance(ours, logits)
    return f"layer by layer its logits differ by {far:.1%} of their spread" if far > tolerance(loaded) else ""


def _stock(
    loaded: "HFBackend", messages: list[Message], images: dict[str, Image.Image]
) -> tuple[tuple[int, ...], Tensor]:
    """Return the ids that the stock processor makes of a conversation, and the stock model's logits after them."""
    model: Any = loaded.model
    inner = model.base_model
    before = getattr(inner, "rope_deltas", None)
    try:
        inputs = stock_inputs(loaded, messages, images)
        logits = model(**inputs, use_cache=False).logits[0, -1]
    except (TypeError, ValueError, RuntimeError, KeyError, IndexError, AttributeError, ImportError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
        raise BackendError(
            f"The {model.config.model_type} model '{loaded.name}' cannot be run on an image here, not even by "
            f"transformers' own code ({reason}). Serve it elsewhere and use Agent.from_server (--server), or use "
            "another model."
        ) from error
    finally:
        if hasattr(inner, "rope_deltas"):
            inner.rope_deltas = before
    return tuple(inputs["input_ids"][0].tolist()), logits


def small_image(loaded: "HFBackend", name: str) -> Image.Image:
    """Return an image of noise, 2 x 2 visual tokens (3 x 2 for the second) where the family takes any size."""
    factor = loaded.defaults.factor
    columns = 3 if name == "second" else 2
    noise = np.random.default_rng(columns).integers(0, 255, (2 * factor, columns * factor, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def tolerance(loaded: "HFBackend", *, cached: bool = False) -> float:
    """Return the largest distance of logits that is rounding; `cached` if one of them came from behind a cache."""
    return _ROUGH[cached] if loaded.model.dtype in (torch.float16, torch.bfloat16) else _EXACT


def distance(ours: Tensor, stock: Tensor) -> float:
    """Return the largest difference of two rows of logits, as a share of the spread of the second."""
    one, other = ours.float(), stock.float()
    spread = float(other.max() - other.min())
    return float((one - other).abs().max()) / spread if spread else float("inf")

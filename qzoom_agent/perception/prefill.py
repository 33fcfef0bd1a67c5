"""A prefill that stops after K layers and goes on later, with more tokens or without.

After `extend`, the cache of layers 0..K-1 and `hidden` (the states after them) cover all tokens so far while layers K..
have seen nothing. A crop inserted behind a shared beginning costs only its own tokens in the lower layers: `keep` what
is shared, `extend` by the rest, `finish` through the upper layers. Attention is causal, so the result is that of one
pass over the final conversation (Q-Zoom 3.3; a test compares them).
"""

import torch
from torch import Tensor
from transformers import DynamicCache

from qzoom_agent.perception.branches import last_token, layer_share
from qzoom_agent.perception.decoder import Decoder, Embedded, Rotary


class Prefill:
    """The unfinished prefill of one conversation (batch of one)."""

    def __init__(self, decoder: Decoder, k: int) -> None:
        self.decoder, self.k = decoder, k
        self.cache = DynamicCache(config=decoder.model.config)
        self.hidden: Tensor | None = None
        """States after K layers, (1, tokens, hidden)."""

    def extend(self, new: Embedded, rotary: Rotary) -> int:
        """Run the lower layers on new tokens, at the end of what is there; returns the work in token-layers."""
        mask = self.decoder.mask(new.hidden, self.cache if self.hidden is not None else None)
        states = self.decoder.run(
            new.hidden,
            range(self.k),
            rotary=rotary,
            mask=mask,
            cache=self.cache,
            visual=new.visual,
            deepstack=new.deepstack,
        )
        self.hidden = states if self.hidden is None else torch.cat((self.hidden, states), dim=1)
        return self.k * states.shape[1]

    def keep(self, count: int) -> None:
        """Forget all but the first `count` tokens."""
        assert self.hidden is not None
        surplus = self.hidden.shape[1] - count
        if surplus:
            self.cache.crop(-surplus)
            self.hidden = self.hidden[:, :count]

    def finish(self, rotary: Rotary, *, lean: bool = False) -> tuple[Tensor, float]:
        """Run the upper layers on everything; returns logits (1, vocabulary) after the last token, and the work.

        The cache then is that of an ordinary prefill, and the states are dropped. With `lean` the last layer computes
        its keys and values for all tokens and the rest for the last one alone, which is all that anybody reads: the
        same up to rounding, a layer cheaper.
        """
        assert self.hidden is not None
        states, self.hidden = self.hidden, None
        decoder, tokens, mask = self.decoder, states.shape[1], self.decoder.mask(states)
        full = range(self.k, decoder.depth - int(lean))
        out = decoder.run(states, full, rotary=rotary, mask=mask, cache=self.cache)
        work = float(len(full) * tokens)
        if lean:
            last = decoder.text.layers[-1]
            out = last_token(last, out, rotary=rotary, mask=mask, cache=self.cache)
            work += layer_share((last.self_attn.k_proj, last.self_attn.v_proj), last) * tokens
        return decoder.logits(out), work

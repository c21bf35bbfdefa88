"""Parts of text generation: the cache of what was read, and the choice of the next token."""

import torch
import torch.nn.functional as F


class KVCache:
    """The keys and values of the tokens that a layer's attention has already read, at most N of them."""

    def __init__(self, N):
        self.N, self.length, self.keys, self.values = N, 0, None, None

    def append(self, k, v):
        """Store the keys and values of T more tokens, each (B, nh, T, hs), and return those of all tokens so far."""
        if self.keys is None:
            B, nh, _, hs = k.shape
            self.keys, self.values = k.new_empty(B, nh, self.N, hs), v.new_empty(B, nh, self.N, hs)
        first, self.length = self.length, self.length + k.size(2)
        self.keys[:, :, first : self.length] = k
        self.values[:, :, first : self.length] = v
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


def pick_next_id(logits, temperature, top_k, top_p, generator):
    """Return the next id (B, 1) of each row of logits (B, V): see GPT.generate."""
    likeliest, ids = logits.topk(min(top_k or logits.size(-1), logits.size(-1)))  # (B, k), sorted
    if temperature == 0:
        return ids[:, :1]
    probabilities = F.softmax(likeliest / max(temperature, 1e-6), dim=-1)  # less than 1e-6 could overflow
    if top_p < 1:
        before = probabilities.cumsum(-1) - probabilities  # total probability of the likelier ids
        probabilities = probabilities.masked_fill(before >= top_p, 0)
    return ids.gather(1, torch.multinomial(probabilities, 1, generator=generator))

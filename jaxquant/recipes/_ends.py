"""The first and the last thing that a model does to a token, which most recipes leave."""

from ..intercept import Rule

# Tied logits read the embedding, so the first pattern speaks of them as well; the second one is of
# a head of its own (`head/kernel`, `lm_head/kernel`).
EMBEDDING, HEAD = "*embed*", "*head/*"

LEAVE_ENDS = (Rule(match=EMBEDDING, optional=True), Rule(match=HEAD, optional=True))

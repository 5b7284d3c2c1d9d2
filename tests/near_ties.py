"""Where two decoders choose different tokens, float64 must show that rounding could decide.

A greedy decoder branches at two places: at the argmax of its logits, and at every selection of blocks. Where two
correct ones part, one of these was a near tie: in float64 the two tokens' logits, or the last score chosen and the
first left out, lie closer than rounding can tell apart. How much that is, is measured and not assumed: the float32
reference is led along the same tokens with float64's selections forced upon it, so that its scores and logits differ
from float64's by rounding alone. ALLOWANCE times the largest such difference is the rounding allowance, because the
decoder that is judged may err the other way and sums in another order.
"""

from copy import deepcopy
from dataclasses import dataclass, replace

import torch

from resa.reference import REFERENCE_OPS, Generation, prefill
from small_models import feed

ALLOWANCE = 4
MEASURED_STEPS = 16  # how many steps the float32 reference is led along
EPS, TINY = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).tiny


def first_that_matters(n_fed, config):
    """Number of the `n_fed` tokens that lie in an exact cache: only their ids matter to the next choice."""
    n_drifted, first = 0, 0
    for place in range(n_fed):
        if config.schedule == "fused" and config.is_pass_due(n_drifted):
            n_drifted, first = 0, place + 1
            continue
        first = place - n_drifted
        n_drifted += 1
        if config.is_pass_due(n_drifted) and config.schedule == "paper":
            n_drifted = 0
    return first


@dataclass
class Recorder:
    """Operations that note scores and selections, and that select what `forced` has noted before them."""

    forced: "Recorder | None" = None

    def __post_init__(self):
        self.scores, self.indices = [], []

    def ops(self):
        return replace(REFERENCE_OPS, select_blocks=self.select)

    def select(self, scores, lengths, config):
        place = len(self.scores)
        self.scores.append(scores)
        chosen = REFERENCE_OPS.select_blocks(scores, lengths, config) if self.forced is None else None
        self.indices.append(self.forced.indices[place] if chosen is None else chosen)
        return self.indices[place]


def selection_gap(scores, indices, n_blocks, local_blocks):
    """Distance by which the lowest score chosen lies above the highest left out, per KV head: scores [Hkv, M] -> [Hkv].

    Infinite where nothing is left out. The newest blocks take no part.
    """
    candidates = torch.arange(scores.shape[-1], device=scores.device) < n_blocks - local_blocks
    chosen = torch.zeros(scores.shape[0], scores.shape[1] + 1, dtype=torch.bool, device=scores.device)
    chosen = chosen.scatter(1, indices.long() + 1, True)[:, 1:]  # the place of −1 in front
    lowest = scores.masked_fill(~(candidates & chosen), float("inf")).amin(dim=1)
    highest = scores.masked_fill(~(candidates & ~chosen), float("-inf")).amax(dim=1)
    return lowest - highest


def near_tie(model, prompt, tokens, config, rivals=None):
    """The narrowest branch of decoding `prompt` and then `tokens`, in units of the rounding allowance: ≤ 1 is a tie.

    `model` is the float32 one. With `rivals`, two token ids, the choice between them after the last token counts as
    well. Steps before the last rectification don't: it has made the cache exact, whatever was selected before it.
    """
    fed = first_that_matters(len(tokens), config)
    exact = Recorder()
    rounded = Recorder(forced=exact)
    models = {"exact": deepcopy(model).double().with_ops(exact.ops()), "rounded": model.with_ops(rounded.ops())}
    text, states, logits = [*prompt, *tokens[:fed]], {}, {}
    for name, each in models.items():
        cache = each.new_cache(len(prompt) + len(tokens), config.block_size, config.kept_bits)
        logits[name] = prefill(each, text, cache)
        states[name] = Generation([], cache)

    # Nobody is expected to do better than one rounding.
    narrowest, score_error, logit_error = [], EPS, max(distance(logits), EPS * float(logits["exact"].abs().max()))
    for step, token in enumerate(tokens[fed:]):
        is_measured = step < MEASURED_STEPS
        first = len(exact.scores)
        for name in ("exact", "rounded") if is_measured else ("exact",):
            logits[name] = feed(models[name], states[name], config, token)
        n_blocks = -(-(len(text) + step + 1) // config.block_size)
        for place in range(first, len(exact.scores)):
            scores, indices = exact.scores[place][0], exact.indices[place][0]
            valid = scores[:, :n_blocks]
            size = valid.abs().amax(dim=1).clamp(min=TINY)
            narrowest.append(selection_gap(valid, indices, n_blocks, config.local_blocks) / size)
            if is_measured:
                errors = (rounded.scores[place][0, :, :n_blocks].double() - valid).abs().amax(dim=1)
                score_error = max(score_error, float((errors / size).max()))
        if is_measured:
            logit_error = max(logit_error, distance(logits))

    ratios = [float(torch.stack(narrowest).min()) / (ALLOWANCE * score_error)] if narrowest else []
    if rivals is not None:
        one, other = (logits["exact"][token] for token in rivals)
        ratios.append(float((one - other).abs()) / (ALLOWANCE * max(logit_error, TINY)))
    return min(ratios, default=float("inf"))


def distance(logits):
    """The largest difference between the float64 and the float32 model's logits."""
    return float((logits["exact"] - logits["rounded"].double()).abs().max())


def parting(found, expected):
    """The first place at which two lists of tokens differ, or None."""
    assert len(found) == len(expected), f"{len(found)} tokens instead of {len(expected)}"
    return next((place for place, (one, other) in enumerate(zip(found, expected, strict=True)) if one != other), None)


def agreement(model, prompt, found, expected, config):
    """Number of tokens that two decoders have chosen alike; where they part, float64 must show a near tie."""
    place = parting(found, expected)
    if place is None:
        return len(found)
    rivals = (found[place], expected[place])
    tie = near_tie(model, prompt, expected[:place], config, rivals)
    assert tie <= 1, (
        f"they part at token {place}, {rivals[0]} instead of {rivals[1]}, and the narrowest branch before it is "
        f"{tie:.3g} rounding allowances wide"
    )
    return place

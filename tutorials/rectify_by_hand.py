# %% [markdown]
# # Rectification by hand
#
# `generate` does all of this in one call. Here the loop is written out with the three functions it is made of,
# `prefill`, `sparse_step` and `rectify`, so that you can watch the cache go wrong and be put right.
# It takes about 20 seconds on a laptop. Run it with `python tutorials/rectify_by_hand.py`.

# %%
import torch

from resa.reference import ReSAConfig, load_model, load_tokenizer, prefill, rectify, sparse_step
from resa.reference.demo import demo_prompt

model, tokenizer = load_model(), load_tokenizer()
_, text = demo_prompt()  # a library module that the model has never seen
tokens = tokenizer.encode_ordinary(text)
prompt, continuation = tokens[:2048], tokens[2048:2080]  # 32 tokens, one window

# %% [markdown]
# Two caches take in the same prompt densely. One of them then takes in the next 32 tokens densely as well: that is
# what every cache should look like. The other takes them in one by one, each step reading the few blocks that the
# bounds recommend.

# %%
config = ReSAConfig(active_ratio=0.1, min_blocks=8)
exact = model.new_cache(batch=1, capacity=len(tokens), block_size=config.block_size)
prefill(model, [prompt + continuation], exact)

cache = model.new_cache(batch=1, capacity=len(tokens), block_size=config.block_size)
prefill(model, [prompt], cache)
for token in continuation:
    sparse_step(model, torch.tensor([token]), cache, config)


# %% [markdown]
# The drift of a token is how far its keys and values have moved, relative to their length, in the layer and head
# where they moved most. The first layer's keys depend on the token alone and cannot drift; every layer above sees
# what the layer below got wrong.


# %%
def drift_by_layer(ours, wanted):
    """Largest relative error of the newest 32 keys, per layer."""
    newest = slice(len(prompt), len(prompt) + len(continuation))
    ours, wanted = ours.keys[:, 0, :, newest], wanted.keys[:, 0, :, newest]  # [layer, Hkv, 32, D]
    return ((ours - wanted).norm(dim=-1) / wanted.norm(dim=-1)).amax(dim=(1, 2))


before = drift_by_layer(cache, exact)

# %% [markdown]
# Rectification runs the 32 tokens through the model once more, densely and all at once, and overwrites their keys and
# values. It needs nothing but their ids and the cache before them, which is exact: so the result is exact too, and the
# next window starts from an exact cache again.

# %%
rectify(model, [continuation], cache, window=torch.tensor([len(continuation)]))
after = drift_by_layer(cache, exact)

print("layer   drift before   after rectification")
for layer, (wrong, right) in enumerate(zip(before.tolist(), after.tolist(), strict=True)):
    print(f"{layer:5}   {wrong:12.2g}   {right:19.2g}")
assert before[0] < 1e-5
assert before[1:].min() > 1e-3
assert after.max() < 1e-4

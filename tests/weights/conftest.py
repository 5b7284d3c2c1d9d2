"""A model of each family beside the folder that it saves itself in."""

import pytest

from families import FAMILIES, random_model


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """A random model by `transformers`, and its folder: several small shards."""
    theirs = random_model(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder, max_shard_size="60KB")
    return theirs, folder

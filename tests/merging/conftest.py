"""Three experts to merge, of different ranks and modules."""

import pytest
from dense_merges import save_experts


@pytest.fixture(scope="session")
def experts(tmp_path_factory):
    """A plain folder of three adapters, opened."""
    return save_experts(tmp_path_factory.mktemp("experts"))

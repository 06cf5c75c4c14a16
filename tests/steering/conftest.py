"""A tiny random model of each layout, loaded through TransformerBridge as a user's is; its weights large enough that
its predictions are not nearly uniform, so that steering can move them."""

from __future__ import annotations

import pytest

from tests.tiny_models import save_tiny_model

PROMPTS = [[0, 5, 17, 40], [0, 33, 8], [0, 60, 61, 62, 63, 12]]


@pytest.fixture(scope="session", params=["llama", "gpt2"])
def model(request, tmp_path_factory):
    from activation_store.harvest.language_model import load_language_model, resolve_model

    folder = save_tiny_model(tmp_path_factory.mktemp("steered") / request.param, request.param, initializer_range=0.3)
    return load_language_model(resolve_model(str(folder)))


@pytest.fixture
def prompts():
    from dictlearn.steering.edit import padded

    return padded(PROMPTS)

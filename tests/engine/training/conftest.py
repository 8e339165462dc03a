"""Fixtures of the training tests."""

import copy
from collections.abc import Callable

import pytest
from transformers import PreTrainedModel

from tests.engine.checkpoints import family_model


@pytest.fixture(scope="session")
def _families() -> dict[str, PreTrainedModel]:
    return {}


@pytest.fixture
def family(_families: dict[str, PreTrainedModel]) -> Callable[..., PreTrainedModel]:
    """Gives a private copy of the random float32 model of a family, with an attention."""

    def get(name: str, attention: str = "eager") -> PreTrainedModel:
        if name not in _families:
            _families[name] = family_model(name)
        model = copy.deepcopy(_families[name])
        model.set_attn_implementation(attention)
        return model

    return get

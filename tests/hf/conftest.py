"""The model that most tests here are about."""

import pytest

from tests.hf.common import BASELINES, make_model


@pytest.fixture(scope="module", params=[{}, BASELINES], ids=["ovq", "baselines"])
def model(request):
    return make_model(**request.param)

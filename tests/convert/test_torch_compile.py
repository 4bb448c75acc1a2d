"""A converted model under `torch.compile`: PyTorch compiles its modules, and no part of its memory."""

import pytest
import torch

from ovq.hf.cache import CACHE_KEY
from tests.convert.common import converted, tokens

# Of torch's own modules, as dynamo imports and runs them.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.fixture(autouse=True)
def forgotten_graphs():
    yield
    torch._dynamo.reset()


def compiled(model, graphs):
    """The model, compiled by a backend that adds each graph to a list and runs it as it is."""

    def note(graph, inputs):
        graphs.append(graph)
        return graph.forward

    return torch.compile(model, backend=note)


@torch.no_grad()
def test_decoding_compiles_nothing_after_the_first_tokens():
    model, graphs, num = converted(), [], []
    ids, cache = tokens(2, 60), model.make_cache()
    fast = compiled(model, graphs)
    found = []
    # Over several merges and re-positionings.
    for part in ids.split([20] + [1] * 40, 1):
        found.append(fast(part, **{CACHE_KEY: cache}).logits)
        num.append(len(graphs))
    torch.testing.assert_close(torch.cat(found, 1), model(ids).logits, atol=1e-4, rtol=1e-4)
    assert num[-1] == num[2]


def test_calls_without_a_cache_and_gradients_are_those_of_the_model():
    model, ids = converted(), tokens(2, 70)
    results = []
    for run in (model, compiled(model, [])):
        model.zero_grad()
        out = run(ids, labels=ids, use_cache=False)
        out.loss.backward()
        results.append((out.logits, [x.grad.clone() for x in model.parameters()]))
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-3)


def test_export_is_refused():
    model, ids = converted(), tokens(1, 20)
    for use_cache in (True, False):
        with pytest.raises(ValueError, match=r"expected no torch.export of a converted model"):
            torch.export.export(model, (ids,), {"use_cache": use_cache}, strict=False)

"""Evaluation mode for a while."""

from torch import nn

from ovq.runtime.modes import evaluating


class Merging(nn.Linear):
    """A part that changes its weights with its mode, as adapters that are merged for inference do."""

    is_merged = False

    def train(self, mode=True):
        self.is_merged = not mode
        return super().train(mode)


def test_parts_that_act_on_their_mode_are_told_of_it():
    model = nn.Sequential(Merging(1, 1), Merging(1, 1), nn.Sequential(Merging(1, 1)))
    model[1].eval()
    model[2].eval()
    model[2][0].train()
    before = [(part, part.training) for part in model.modules()]
    with evaluating(model):
        assert all(part.is_merged for part in model.modules() if isinstance(part, Merging))
    assert [(part, part.training) for part in model.modules()] == before
    assert [part.is_merged for part in model.modules() if isinstance(part, Merging)] == [False, True, False]

"""Settings shared by all tests."""

import hypothesis
import torch

# One thread a worker: two pytest workers on two cores would otherwise wait for each other's threads.
torch.set_num_threads(1)

# Derandomized, so that a run is repeatable; no deadline, since machines are noisy.
hypothesis.settings.register_profile("ovq", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("ovq")

"""OVQ: online vector-quantized attention for PyTorch and Hugging Face.

The package is layered, and imports go one way: runtime, fields, byte_tokens, hidden_values, prompts <-
plugins <- moved <- ops <- layers <- hf <- parallel <- convert <- inspect, serve <- cli. `import ovq` is
light; `import ovq.hf` registers the models with transformers' Auto classes. A separate package, `ovq_lab`,
imports this one and produces the figures.
"""

from ovq import moved

__version__ = "0.2.0"

moved.install()

"""OVQ: online vector-quantized attention for PyTorch and Hugging Face.

The package is layered, and imports go one way: `ops` <- `layers` <- `hf` <- `tasks`, `train`, `eval`, `bench`
<- `cli`. `import ovq` is light; `import ovq.hf` registers the models with transformers' Auto classes.
"""

__version__ = "0.1.0"

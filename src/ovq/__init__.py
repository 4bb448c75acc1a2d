"""OVQ: online vector-quantized attention for PyTorch and Hugging Face.

The package is layered, and imports go one way: runtime, fields <- plugins <- ops <- layers <- hf <- parallel,
text <- convert <- tasks <- train, eval, inspect <- plots <- research, serve <- cli. `import ovq` is light;
`import ovq.hf` registers the models with transformers' Auto classes.
"""

__version__ = "0.2.0"

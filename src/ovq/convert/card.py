"""The card of a converted model: README.md in the folder that `ovq convert` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- ovq{base}
---

# {name}

{model} with a memory of constant size, by ovq {version}: each key/value head keeps
{rows:.0f} rows of a key and a value on average, whatever it has read ({how}).
Its weights are those of the original in {dtype}; nothing was trained.

    ovq generate --model {name} --prompt "Once upon a time"

In Python, where `transformers` alone would load it with full attention:

```python
import ovq.convert

model = ovq.convert.load("{name}")
```

What this loses was measured for SmolLM2-135M-Instruct (docs/results/convert.md of ovq), not for this folder.
"""


def converted_card(model: Any, *, original: str, name: str, how: str) -> str:
    """The text of the card of the converted model `name`, which tells how rows were allocated to heads.

    `original` is the original model's name on the hub, or its folder or file.
    """
    import ovq

    is_on_hub = not Path(original).exists() and original.count("/") == 1
    return _CARD.format(
        name=name,
        # Without the local path, which is private.
        model=f"[{original}](https://huggingface.co/{original})" if is_on_hub else Path(original).name,
        base=f"\nbase_model: {original}" if is_on_hub else "",
        version=ovq.__version__,
        rows=model.memory_config.rows_per_head,
        how=how,
        dtype=str(model.dtype).removeprefix("torch."),
    )

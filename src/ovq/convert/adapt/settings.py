"""`AdaptSettings`: how much text an adaptation reads, and how it learns from it."""

from __future__ import annotations

import dataclasses

from ovq.fields import check_fields


def _check(name: str, value: int, at_least: int) -> None:
    if value < at_least:
        raise ValueError(f"{name}: expected an integer of at least {at_least}, found {value}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptSettings:
    """The two stages of an adaptation, see `adapt`.

    Attributes:
        head_tokens: tokens that stage 1 reads, in which heads learn by their outputs; 0 to leave it out.
        logit_tokens: tokens that stage 2 reads, in which the model learns by its logits; 0 to leave it out.
        length: tokens of a sequence, whose memory starts empty: as long as the model is to read, if possible.
        batch_size: sequences side by side.
        piece_size: tokens of a sequence that are read at a time, and after which the weights change.
        head_rate: learning rate of temperatures and biases, at its highest.
        lora_rank: rank of the changes of the attention's matrices in stage 2.
        lora_rate: learning rate of these.
        short_windows: share of the sequences of stage 2 that are read with shorter windows.
        needle_share: share of the sequences, of both stages, in which numbers are hidden and asked for at the
            end (`hidden_numbers`), so that single tokens of long ago matter.
        save_every: batches of sequences after which a checkpoint is written.
        seed: of the order of texts, of the new matrices and of the windows' lengths.

    Raises:
        ValueError: a number out of range.

    Example:
        >>> settings = AdaptSettings(head_tokens=10_000, logit_tokens=30_000, length=2048, batch_size=2)
        >>> settings.num_batches(1), settings.num_batches(2)
        (3, 8)
    """

    head_tokens: int = 50_000
    logit_tokens: int = 300_000
    length: int = 3072
    batch_size: int = 1
    piece_size: int = 512
    head_rate: float = 0.02
    lora_rank: int = 16
    lora_rate: float = 5e-4
    short_windows: float = 0.5
    needle_share: float = 0.0
    save_every: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("head_tokens", "logit_tokens", "seed"):
            _check(name, getattr(self, name), 0)
        for name in ("batch_size", "piece_size", "lora_rank", "save_every"):
            _check(name, getattr(self, name), 1)
        _check("length", self.length, 2)
        for name in ("head_rate", "lora_rate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: expected a number above 0, found {getattr(self, name)}")
        for name in ("short_windows", "needle_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a share in [0, 1], found {getattr(self, name)}")
        if not self.head_tokens + self.logit_tokens:
            raise ValueError("expected head_tokens or logit_tokens, found 0 for both: nothing to learn from")

    def num_batches(self, stage: int) -> int:
        """Batches of whole sequences of stage 1 or 2, of as many tokens at least as that stage is to read."""
        tokens = (self.head_tokens, self.logit_tokens)[stage - 1]
        return -(-tokens // (self.length * self.batch_size))


PRESETS = {
    # About two hours of one core for a model of 135M. `docs/convert_results.md` has it with fewer tokens.
    "cpu": AdaptSettings(head_tokens=0, lora_rate=1e-3, short_windows=0.0, needle_share=0.15),
    # 0.5B tokens, as in the work on larger models that this follows.
    "gpu": AdaptSettings(
        head_tokens=50_000_000,
        logit_tokens=450_000_000,
        length=8192,
        batch_size=8,
        piece_size=1024,
        head_rate=0.01,
        lora_rank=64,
        lora_rate=2e-4,
        save_every=50,
    ),
}
"""Settings by name, for `ovq adapt --preset`."""

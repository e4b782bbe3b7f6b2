"""How a config's samples share rows."""

from bert.config import Config, DataConfig
from data.rows import RowShape

__all__ = ["packing_of", "row_shape", "samples_per_row"]


def packing_of(data: DataConfig, static: bool) -> str:
    """data.packing with `auto` decided: the same samples either way; `static`: a device takes one shape only."""
    if data.packing == "auto":
        return "off" if static else "samples"
    return data.packing


def samples_per_row(data: DataConfig, static: bool) -> int:
    """How many samples a row holds at most."""
    return 1 if packing_of(data, static) == "off" else data.samples_per_row


def row_shape(config: Config, static: bool) -> RowShape:
    """What a row of pre-training holds at most."""
    data = config.data
    return RowShape.of(data.sequence_length, data.mask_tokens, samples_per_row(data, static))

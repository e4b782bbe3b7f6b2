"""What a plan knows of an optimizer: its name, and what it keeps for each parameter on IPUs."""

from bert.config import Config

__all__ = ["name_of_optimizer", "state_bytes", "state_in_words"]

NAMES = {"lamb": "LAMB", "adamw": "AdamW", "muon": "Muon"}
MOMENTS = {"lamb": 2, "adamw": 2}  # of each parameter; of several, the first may be float16, the others are float32


def name_of_optimizer(config: Config) -> str:
    return NAMES.get(config.optimizer.name, config.optimizer.name)


def state_in_words(config: Config) -> str:
    count = MOMENTS[config.optimizer.name]
    return f"{name_of_optimizer(config)}'s {'two' if count == 2 else count} moments"


def state_bytes(config: Config, parameters: int) -> int:
    """Bytes that the state of so many parameters takes on one IPU."""
    ipu = config.ipu
    if ipu.optimizer_state_offchip:
        return 0
    half = ipu.enable_half_first_order_momentum and config.training.precision != "float32"
    moments = MOMENTS[config.optimizer.name]
    each = 4 * moments - (2 if half else 0)
    return -(-parameters * each // (ipu.replication_factor if ipu.replicated_tensor_sharding else 1))

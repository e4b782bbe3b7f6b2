"""`--plan`: what would run where, how full each IPU gets, how long the run takes. Nothing is trained."""

from bert.config import Config

__all__ = ["plan"]


def plan(config: Config) -> None:
    """Prints the plan of a run. For IPUs it also draws it, into the current folder.

    For IPUs everything comes from the traced graph and one published speed; for CUDA and CPU a micro-batch is measured.

    Raises InputError for a config, device or shards that cannot be used.
    """
    from bert.plan.report import print_plan  # here: torch takes seconds to import

    print_plan(config)

"""What to do about episodes that the infrastructure failed."""

from collections.abc import Sequence

from vlm4vla.errors import UserError
from vlm4vla.types import EpisodeResult


def require_decided(results: Sequence[EpisodeResult], where: str, again: str) -> None:
    """Raises ``UserError`` where an episode is neither a success nor a failure, with what happened to the first.

    Args:
        where: the file with all that is known of the others.
        again: the command that repeats them, and only them.
    """
    faults = [result for result in results if result.success is None]
    if faults:
        first = faults[0]
        raise UserError(
            f"{len(faults)} of {len(results)} episodes that the infrastructure failed (the column `fault` of {where}); "
            f"the first, episode {first.episode} of {first.protocol}: {(first.fault or 'unknown').strip()}",
            "a success or a failure for each",
            again,
        )

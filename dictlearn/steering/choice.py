"""Which latent of a dictionary to steer with, and at which hook. No torch: the command line asks first."""

from __future__ import annotations

from collections.abc import Sequence

from activation_store.errors import UserError


def choose_hook(hooks: Sequence[str], hook: str | None) -> str:
    """The hook asked for, or the only one there is.

    Raises:
        UserError: it is not among them, or none was asked for and they are several.
    """
    if hook is None and len(hooks) > 1:
        raise UserError(f"The dictionary rebuilds {', '.join(hooks)}; choose one of them with --hook.")
    if hook is not None and hook not in hooks:
        raise UserError(f"The dictionary does not rebuild {hook!r} but {', '.join(hooks)}; choose among these.")
    return hooks[0] if hook is None else hook


def check_latent(latent: int, d_sae: int) -> None:
    """Refuse, with a UserError, a latent that is not there."""
    if not 0 <= latent < d_sae:
        raise UserError(f"There is no latent {latent}; the dictionary has {d_sae:,}, numbered 0 to {d_sae - 1}.")

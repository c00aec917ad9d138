"""KFP component ``promote``: make a registered draft the champion, if the gate lets it through."""

from kfp import dsl
from kfp.dsl import Markdown, Output

from components.image import DEFAULT_IMAGE


@dsl.component(base_image=DEFAULT_IMAGE, install_kfp_package=False)
def promote(
    model: str,
    version: str,
    reason: str,
    force: bool,
    summary: Output[Markdown],
) -> None:
    """Make a version the champion and wait until the endpoint uses it.

    Args:
        model: Registered model.
        version: A version or an alias.
        reason: Kept in the audit trail.
        force: Overrule the gate; needs a reason.
        summary: Receives the verdict for the KFP page.
    """
    from components.promote.step import promote_registered

    promote_registered(model, version, reason, force, summary)

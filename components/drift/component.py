"""KFP component ``drift``: has a server reported that the champion became worse than evaluated?"""

from kfp import dsl
from kfp.dsl import Markdown, Output

from components.image import DEFAULT_IMAGE


@dsl.component(base_image=DEFAULT_IMAGE, install_kfp_package=False)
def drift(
    spec_uri: str,
    force: bool,
    summary: Output[Markdown],
) -> bool:
    """Look for a drift event at the champion of the spec's registered model.

    Args:
        spec_uri: Path or object URI of the resolved run spec (YAML).
        force: Say yes in any case.
        summary: Receives what was found, for the KFP page.

    Returns:
        Whether to train anew.
    """
    from components.drift.step import look_for_drift

    return look_for_drift(spec_uri, force, summary)

"""Which revision of qvlm measured a line."""

from collections.abc import Iterator

import pandas as pd

_NAME = "qvlm "


def revision_of(versions: str) -> str:
    """Returns the part of a line's versions that names the revision of qvlm, or nothing."""
    return next((part for part in versions.split("; ") if part.startswith(_NAME)), "")


def differences(lines: pd.DataFrame) -> Iterator[str]:
    """Yields a sentence if the forms in some lines were measured with different revisions."""
    revisions = lines["versions"].map(revision_of)
    if revisions.nunique() < 2:
        return
    forms = [
        f"{', '.join(dict.fromkeys(some['form']))} with {revision or 'an unknown revision'}"
        for revision, some in lines.groupby(revisions, sort=False)
    ]
    yield (
        f"These forms were measured with different revisions: {'; '.join(forms)}. Ratios between "
        "them also compare the decoders of these revisions."
    )

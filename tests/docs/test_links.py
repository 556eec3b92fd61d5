"""Links between documents lead somewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
from doc_blocks import DOCUMENTS, ROOT, anchors, links

DOCUMENTED = [*DOCUMENTS, ROOT / "CHANGELOG.md"]


@pytest.mark.parametrize("document", DOCUMENTED, ids=lambda document: document.stem)
def test_relative_links_lead_to_files_and_headings(document: Path) -> None:
    for link in links(document):
        if link.startswith(("https://", "http://")):
            continue
        name, _, anchor = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        assert target.exists(), f"{document.name}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{document.name}: {link}"


def test_every_page_can_be_reached_from_the_readme() -> None:
    readme = ROOT / "README.md"
    found, waiting = {readme}, [readme]
    while waiting:
        page = waiting.pop()
        for link in links(page):
            target = (page.parent / link.partition("#")[0]).resolve()
            if target.suffix == ".md" and target.exists() and target not in found:
                found.add(target)
                waiting.append(target)
    assert set(DOCUMENTS) <= found

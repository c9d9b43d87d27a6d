# SPDX-License-Identifier: Apache-2.0
"""Lets the pages link to files of the repository, as a reader of the source can.

A page in `docs/` links to `../benchmarks/README.md`. Such files become part of the
site, below `repository/`, and the links are turned to them.
"""

import pathlib
import posixpath
import re

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parents[1]
SHOWN = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "benchmarks/*.md",
    "benchmarks/*.png",
    "benchmarks/results/*.png",
    "configs/*.py",
    "notebooks/*.ipynb",
    "notebooks/*.png",
    "notebooks/pod/README.md",
)
AT = "repository"
LINK = re.compile(r"(\]\()(?!\w+:|#|/)([^)#\s]+)")


def on_files(files, config):
    """Adds the files of the repository that pages link to."""
    for pattern in SHOWN:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, f"{AT}/{name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turns the links of a page from places in the repository to places in the site."""
    here = page.file.src_uri
    shown = here.removeprefix(f"{AT}/")
    source = shown if shown != here else f"docs/{here}"

    def turned(match):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
        if not (ROOT / target).exists():  # brackets in code
            return match[0]
        inside = target.startswith("docs/")
        place = target.removeprefix("docs/") if inside else f"{AT}/{target}"
        return match[1] + posixpath.relpath(place, posixpath.dirname(here) or ".")

    return LINK.sub(turned, markdown)

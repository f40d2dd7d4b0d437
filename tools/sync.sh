#!/usr/bin/env bash
# Bring package, notebooks and README in step; with --check, fail if they were not (and leave them mended).
set -eu
cd "$(dirname "$0")/.."
state() { cat nbs/*.ipynb nbs/*.qmd fastai_accum/*.py README.md | sha1sum; }
before=$(state)
nbdev-export
python tools/badges.py
nbdev-clean
python tools/tables.py
python tools/readme.py
[ "${1:-}" != --check ] || [ "$before" = "$(state)" ] || {
    echo 'Notebooks, package, README.md and the changelog page were out of step. They have been brought in step: look at `git diff` and commit.' >&2
    exit 1
}
